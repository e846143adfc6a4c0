"""Where compiled programs are kept: a place for every kind of machine."""

import importlib.metadata

import pytest

from early_exit.storage import programs

X86 = """processor\t: 0
vendor_id\t: GenuineIntel
model name\t: Xeon
cpu MHz\t\t: 2100.000
flags\t\t: fpu sse2 avx2 avx512f
bogomips\t: 4200.00
"""
ARM = """processor\t: 0
BogoMIPS\t: 243.75
Features\t: fp asimd sve
CPU implementer\t: 0x41
CPU part\t: 0xd40
"""


@pytest.fixture
def place(tmp_path, monkeypatch):
    """The folder on a machine whose kernel describes its processors so."""
    monkeypatch.setenv("EARLY_EXIT_CACHE", str(tmp_path))

    def folder(cpuinfo):
        (tmp_path / "cpuinfo").write_text(cpuinfo)
        monkeypatch.setattr(programs, "_CPUINFO", tmp_path / "cpuinfo")
        return programs.folder()

    return folder


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (X86, X86.replace(" avx512f", "")),
        (X86, X86.replace("Xeon", "Xeon v2")),
        (ARM, ARM.replace(" sve", "")),
        (ARM, ARM.replace("0xd40", "0xd4f")),
        (X86, ARM),
    ],
)
def test_unlike_machines_have_nothing_in_common(place, one, other):
    assert place(one) != place(other)
    assert place(one) == place(one)


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (X86, X86.replace("2100.000", "3300.512")),  # now
        (X86, X86 + "\n" + X86.replace(": 0", ": 1")),  # more of a kind
        (X86, X86.replace("avx2 avx512f", "avx512f avx2")),  # another kernel
        (ARM, ARM.replace("243.75", "200.00")),
    ],
)
def test_machines_of_a_kind_share(place, one, other):
    assert place(one) == place(other)


def test_another_jax_has_a_place_of_its_own(place, monkeypatch):
    before = place(X86)
    assert before.parent.name == "xla" and importlib.metadata.version("jaxlib") in before.name
    monkeypatch.setattr(importlib.metadata, "version", lambda name: "99.1")
    assert place(X86).name.startswith("jax99.1-jaxlib99.1-")


def test_a_system_without_such_a_file(tmp_path, monkeypatch):
    monkeypatch.setattr(programs, "_CPUINFO", tmp_path / "none")
    assert programs.folder() == programs.folder()
