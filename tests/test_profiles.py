"""Examples are the same in each run of `fixed`, and new in each run of `fuzz`."""

import os
import pathlib
import subprocess
import sys

import profiles
import pytest

TESTS = pathlib.Path(__file__).parent

DRAWS = """
import pathlib
from hypothesis import given, settings, strategies as st

@settings(derandomize={derandomize}, max_examples=20)
@given(st.integers(0, 2**40))
def test_draws(drawn):
    with open(pathlib.Path(__file__).with_suffix(".txt"), "a") as file:
        print(drawn, file=file)
"""


def examples(folder, profile, derandomize) -> list[int]:
    """What a test with settings of its own is given by a new process of pytest."""
    (folder / "conftest.py").write_text(
        "import profiles\n"
        "profiles.register_profiles()\n"
        "def pytest_collection_modifyitems(items):\n"
        "    profiles.keep_to_profile(items)\n"
    )
    (folder / "test_draws.py").write_text(DRAWS.format(derandomize=derandomize))
    written = folder / "test_draws.txt"
    written.unlink(missing_ok=True)
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(folder)]
    subprocess.run(
        [*command, f"--rootdir={folder}", f"--hypothesis-profile={profile}"],
        cwd=folder,
        env=os.environ | {"PYTHONPATH": str(TESTS)},
        check=True,
        capture_output=True,
    )
    return [int(line) for line in written.read_text().split()]


@pytest.mark.parametrize("derandomize", [True, False])
def test_fixed_draws_the_same_examples_in_each_run(tmp_path, derandomize):
    first, second = (examples(tmp_path, profiles.FIXED, derandomize) for _ in range(2))
    assert first == second and len(first) == 20


@pytest.mark.parametrize("derandomize", [True, False])
def test_fuzz_draws_new_and_more_examples_in_each_run(tmp_path, derandomize):
    first, second = (examples(tmp_path, profiles.FUZZ, derandomize) for _ in range(2))
    assert len(first) == len(second) == 20 * profiles.TIMES
    assert len(set(first) & set(second)) < 20
