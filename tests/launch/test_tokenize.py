"""`launch.tokenize` on the tiny model's tokenizer: packed, killed, packed on, and tuned on."""

import json
import os
import pathlib
import re
import signal
import subprocess
import sys
import time

import pytest

from early_exit.data import packed
from early_exit.runs.metrics import read_metrics

ROOT = pathlib.Path(__file__).parents[2]
TINY = [
    "--config=configs/tiny.py",
    f"--config.model.source={ROOT / 'tests/fixtures/tiny_chat'}",
    "--config.data.sequence_length=32",
]


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    """Some parts of one MiB each, for parts are no smaller."""
    folder = tmp_path_factory.mktemp("text")
    for number in range(3):
        rows = (f"row {number} {i} {'and so on ' * (i % 30)}" for i in range(3000))
        written = "".join(json.dumps({"text": row}) + "\n" for row in rows)
        (folder / f"{number}.jsonl").write_text(written)
    return folder


def contents(folder):
    paths = (path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): path.read_bytes() for path in paths}


@pytest.fixture(scope="module")
def whole(launch, text, tmp_path_factory):
    folder = tmp_path_factory.mktemp("packed") / "whole"
    flags = [f"--source={text}", f"--packed={folder}", "--part_mib=1", "--processes=1"]
    done = launch("tokenize", *TINY, *flags)
    assert done.returncode == 0, done.stderr
    assert re.search(r"^train +\d+ +\d+ +\d+ +\d+$", done.stdout, re.MULTILINE)
    assert f"--config.data.source=packed:{folder}" in done.stdout
    return folder


@pytest.mark.studies
def test_exits_are_tuned_calibrated_and_measured_on_it(launch, whole, tmp_path):
    settings = {
        "data.source": f"packed:{whole}",
        "data.batch_size": 2,
        "data.frequency_batches": 1,
        "tune.steps": 3,
        "tune.warmup_steps": 1,
        "evaluate.prompts": 1,
        "evaluate.prompt_tokens": 8,
        "evaluate.new_tokens": 4,
        "evaluate.sample_tokens": 4,
        "exits.classes": 64,
    }
    changed = [f"--config.{name}={value}" for name, value in settings.items()]
    done = launch("tune", *TINY, *changed, f"--workdir={tmp_path}")
    assert done.returncode == 0, done.stderr
    assert any("validation/loss/exit_2" in line for line in read_metrics(tmp_path))
    for command in ("calibrate", "evaluate"):
        done = launch(command, f"--workdir={tmp_path}")
        assert done.returncode == 0, done.stderr


@pytest.mark.processes
def test_killed_it_goes_on_and_processes_change_nothing(text, whole, tmp_path):
    """Its workers end with it, and two of them make the shards that one does."""
    folder = tmp_path / "killed"
    flags = [f"--source={text}", f"--packed={folder}", "--part_mib=1", "--processes=2"]
    command = [sys.executable, "-m", "launch.tokenize", *TINY, *flags]
    environment = os.environ | {"JAX_PLATFORMS": "cpu"}
    first = subprocess.Popen(command, cwd=ROOT, env=environment, stderr=subprocess.DEVNULL)
    give_up = time.monotonic() + 100
    while not any((folder / "train").glob("*.partial-*")):
        assert first.poll() is None and time.monotonic() < give_up
        time.sleep(0.01)
    workers = _children(first.pid)
    first.send_signal(signal.SIGKILL)
    first.wait()
    while any(pathlib.Path(f"/proc/{worker}").exists() for worker in workers):
        assert time.monotonic() < give_up
        time.sleep(0.05)
    assert not (folder / packed.MANIFEST).exists()
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert contents(folder) == contents(whole)


def _children(pid):
    found = subprocess.run(["ps", "-o", "pid=", "--ppid", str(pid)], capture_output=True, text=True)
    return found.stdout.split()


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (
            ["--source={text}", "--packed={whole}", "--part_mib=2"],
            "records with another parts",
        ),
        (
            ["--source={text}", "--packed={whole}", "--config.data.sequence_length=16"],
            "holds records with another .*sequence_length",
        ),
        (["--source={text}", "--packed={new}", "--text=body"], 'has no "body" string'),
        (["--source={text}/none", "--packed={new}"], "no text: there is no"),
        (["--source=packed:{whole}", "--packed={new}"], "holds tokens, no text"),
        (["--source={text}", "--packed={new}", "word"], "unexpected argument 'word'"),
        (["--source={text}", "--packed={new}", "--config.model.source=x/y.gguf"], "does not exist"),
        (["--source={text}"], "--packed must have a value"),
    ],
)
def test_refusals(launch, text, whole, tmp_path, given, message):
    places = {"text": text, "whole": whole, "new": tmp_path / "new"}
    done = launch("tokenize", *TINY, *(flag.format(**places) for flag in given))
    said = done.stderr + done.stdout
    assert done.returncode == 1 and "Traceback" not in said
    assert re.search(message, said), said
    assert not (tmp_path / "new").exists()


@pytest.mark.corpus
def test_beam_makes_the_same_shards(text, whole, tmp_path):
    pytest.importorskip("apache_beam")
    folder = tmp_path / "beam"
    flags = [f"--source={text}", f"--packed={folder}", "--part_mib=1", "--beam", "--"]
    command = [sys.executable, "-m", "launch.tokenize", *TINY, *flags, "--runner=FnApiRunner"]
    environment = os.environ | {"JAX_PLATFORMS": "cpu"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert contents(folder) == contents(whole)


@pytest.mark.corpus
def test_tables_of_hubs(tmp_path):
    """Local copies of both kinds; what a hub has under a name comes by the same call."""
    datasets = pytest.importorskip("datasets")
    from early_exit.data import corpus

    texts = [f"text {i}" for i in range(700)]
    table = datasets.Dataset.from_dict({"text": [*texts, None], "id": range(701)})
    table.save_to_disk(str(tmp_path / "saved"))
    datasets.DatasetDict({"train": table}).save_to_disk(str(tmp_path / "dict"))
    (tmp_path / "files").mkdir()
    table.to_parquet(str(tmp_path / "files/a.parquet"))
    for name in ("saved", "dict", "files"):
        found = corpus.parts(f"hf:{tmp_path / name}", part_bytes=2000)
        assert len(found) > 2
        assert [document.text for part in found for document in part.documents()] == texts
    with pytest.raises(ValueError, match=r"has no texts in a column 'id'; it has text \(.*\), id"):
        corpus.parts(f"hf:{tmp_path / 'saved'}", field="id")
    with pytest.raises(ValueError, match="cannot be had: .*Check its name"):
        corpus.parts(f"hf:{tmp_path / 'none'}")
