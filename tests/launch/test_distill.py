"""`launch.distill` on the tiny model, made to speak in a few letters so that its turns end."""

import json
import os
import pathlib
import re
import shutil
import socket
import subprocess
import sys

import pytest
import stand_ins

from early_exit.data import conversations, shards, sources
from early_exit.runs.metrics import read_metrics

ROOT = pathlib.Path(__file__).parents[2]
TINY_CHAT = ROOT / "tests/fixtures/tiny_chat"


@pytest.fixture(scope="module")
def flags(tmp_path_factory):
    """What names the model, and keeps what it makes small."""
    model = tmp_path_factory.mktemp("source") / "model"
    shutil.copytree(TINY_CHAT, model)
    stand_ins.make_talkative(model)
    sizes = {"per_shard": 12, "batch": 4, "max_question_tokens": 40, "max_new_tokens": 40}
    return [
        "--config=configs/tiny.py",
        f"--config.model.source={model}",
        "--shortest=2",
        "--temperature=0.8",  # as that of questions: the same programs
        *(f"--{name}={size}" for name, size in sizes.items()),
    ]


@pytest.fixture(scope="module")
def made(launch, flags, tmp_path_factory):
    folder = tmp_path_factory.mktemp("made")
    done = launch("distill", *flags, f"--made={folder}", "--tokens=1500")
    assert done.returncode == 0, done.stderr
    return folder, done.stdout


def test_it_tells_what_became_of_all_questions(made):
    folder, printed = made
    *_, last = printed.splitlines()
    counts = dict(re.findall(r"^(\w[\w ]*?) {2,}(\d+) {2,}[\d.]+$", printed, re.MULTILINE))
    about = json.loads((folder / "about.json").read_text())
    assert sum(map(int, counts.values())) == about["per_shard"] * len(shards.finished(folder))
    tokens = sum(c.tokens for _, c in conversations.conversations(shards.Store(folder)))
    assert last == f"{tokens} tokens in {folder}; to use them, --config.data.source=made:{folder}"


def test_a_shard_is_made_again_alike(made, launch, flags, tmp_path):
    folder, printed = made
    again = tmp_path / "again"
    shutil.copytree(folder, again)
    (again / "00000.json").unlink()
    done = launch("distill", *flags, f"--made={again}", "--tokens=1500")
    assert done.stdout.replace(str(again), str(folder)) == printed
    for path in folder.iterdir():
        assert (again / path.name).read_bytes() == path.read_bytes()


def test_exits_are_tuned_on_it(made, launch, flags, tmp_path):
    folder, _ = made
    settings = {
        "data.source": f"made:{folder}",
        "data.batch_size": 2,
        "data.frequency_batches": 1,
        "tune.steps": 3,
        "tune.warmup_steps": 1,
        "exits.classes": 0,
    }
    changed = [f"--config.{name}={value}" for name, value in settings.items()]
    done = launch("tune", *flags[:2], *changed, f"--workdir={tmp_path}")
    assert done.returncode == 0, done.stderr
    assert any("validation/loss/exit_2" in line for line in read_metrics(tmp_path))
    tuned = launch("distill", f"--workdir={tmp_path}", *flags[2:], f"--made={folder}", "--tokens=9")
    assert tuned.returncode == 0, tuned.stderr  # the same backbone: nothing is left to do


def test_questions_of_a_file(launch, flags, tmp_path):
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("Why?\nwhy?\n\nHow?\nWho?\nWhat?\nWhere?\n")
    folder = tmp_path / "made"
    done = launch("distill", *flags, f"--made={folder}", f"--input={prompts}", "--repeated=1")
    assert done.returncode == 0, done.stderr
    assert re.search(r"^question asked before +1 ", done.stdout, re.MULTILINE)
    kept = [c.prompt for _, c in conversations.conversations(shards.Store(folder))]
    assert kept and set(kept) <= {"Why?", "How?", "Who?", "What?", "Where?"}
    assert sources.MADE in done.stdout


@pytest.mark.processes
def test_two_processes_share_the_shards(flags, tmp_path):
    """Neither waits for the other but at the end, and the first tells what both have made."""
    prompts, folder = tmp_path / "prompts.txt", tmp_path / "made"
    prompts.write_text("".join(f"Why {number}?\n" for number in range(27)))  # three shards
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    together = [f"--coordinator=127.0.0.1:{port}", "--num_processes=2"]
    command = [sys.executable, "-m", "launch.distill", *flags, "--repeated=1"]
    command += [f"--made={folder}", f"--input={prompts}", *together]
    environment = os.environ | {"JAX_PLATFORMS": "cpu"}
    first, second = (
        subprocess.Popen(
            [*command, f"--process_id={i}"], cwd=ROOT, env=environment, stdout=subprocess.PIPE
        )
        for i in range(2)
    )
    told, silence = (process.communicate(timeout=240)[0].decode() for process in (first, second))
    assert (first.returncode, second.returncode, silence) == (0, 0, "")
    finished = shards.finished(folder)
    assert finished.keys() == {0, 1, 2}
    kept = sum(shard["records"] for shard in finished.values())
    assert re.search(rf"^kept +{kept} ", told, re.MULTILINE)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["--made={made}", "--tokens=9", "--seed=1"], "holds records with another seed; name"),
        (["--made={new}"], "say how many tokens to make, or give prompts to answer"),
        (["--made={new}", "--tokens=9", "--top_p=0"], r"top_p must be in \(0, 1\], not 0"),
        (["--tokens=9"], "--made must have a value"),
        (["--made={new}", "--tokens=9", "--workdir=x"], "(?s)Exactly one of.*config.*workdir"),
    ],
)
def test_refusals(made, launch, flags, tmp_path, given, message):
    places = {"made": made[0], "new": tmp_path / "new"}
    done = launch("distill", *flags, *(flag.format(**places) for flag in given))
    said = done.stderr + done.stdout
    assert done.returncode == 1 and "Traceback" not in said
    assert re.search(message, said), said
    assert not (tmp_path / "new").exists()
