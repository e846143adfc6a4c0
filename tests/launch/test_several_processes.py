"""Commands as several processes: they do as one does what one does, and the first one writes."""

import json
import os
import pathlib
import re
import shutil
import socket
import subprocess
import sys

import in_process
import numpy as np
import pytest
import stand_ins

from early_exit.calibration.records import Records
from early_exit.data import shards

pytestmark = pytest.mark.processes

ROOT = pathlib.Path(__file__).parents[2]
TUNE = {
    "exits.head": "norm",
    "exits.points": "(3,)",
    "exits.recurrent_taps": "(2,6)",
    "data.sequence_length": 16,
    "data.batch_size": 4,
    "tune.steps": 2,
    "tune.warmup_steps": 1,
    "tune.validation_batches": 1,
    "calibrate.batches": 2,
    "calibrate.epsilon": 0.3,
}
CONFIG = ["--config=configs/tiny.py", *(f"--config.{k}={v}" for k, v in TUNE.items())]
# Two processes of two devices each: rows, or each matrix, are split between them.
MESHES = {
    "rows": ["--mesh.data=2", "--mesh.tensor=2"],
    "matrices": ["--mesh.data=1", "--mesh.tensor=4"],
}


@pytest.fixture(scope="module")
def one(tmp_path_factory):
    """A run that was tuned, calibrated and asked on one device."""
    folder = tmp_path_factory.mktemp("processes") / "one"
    alone("tune", *CONFIG, f"--workdir={folder}")
    (folder.parent / "prompts.txt").write_text("word\nthe other one\nand\n")
    alone("calibrate", f"--workdir={folder}")
    for mode in ("lossy", "verified"):
        alone("generate", *asked(folder, mode))
    return folder


def alone(*command):
    done = in_process.run(*command)
    assert done.returncode == 0, done.stderr
    return done


def asked(folder, mode):
    prompts, answers = folder.parent / "prompts.txt", folder / f"{mode}.jsonl"
    how = [f"--mode={mode}", "--raw", "--batch=2", "--max_new_tokens=6"]
    return [f"--workdir={folder}", f"--input={prompts}", f"--output={answers}", *how]


def together(folder, command, *flags):
    """What each of two processes printed."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    environment = {
        "JAX_PLATFORMS": "cpu",
        "JAX_COMPILATION_CACHE_DIR": str(folder.parent / "programs"),
        "EARLY_EXIT_CACHE": str(folder.parent / "cache"),
        "XLA_FLAGS": f"{os.environ['XLA_FLAGS']} --xla_force_host_platform_device_count=2",
    }
    which = [f"--coordinator=127.0.0.1:{port}", "--num_processes=2"]
    started = [
        subprocess.Popen(
            [sys.executable, "-m", f"launch.{command}", *flags, *which, f"--process_id={i}"],
            cwd=ROOT,
            env=os.environ | environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for i in range(2)
    ]
    try:
        printed = [process.communicate(timeout=300) for process in started]
    finally:
        for process in started:
            process.kill()
    assert [process.returncode for process in started] == [0, 0], printed
    return [commands_own(out) for out, _ in printed]


# The library that connects processes tells of itself, piece by piece and on several threads at
# once: a line may hold pieces of two sentences, or the end of one.
GLOO = [
    r"\[Gloo\] Rank ",
    r"\d+",
    " is connected to ",
    r" peer ranks\. ",
    "Expected number of connected peer ranks is : ",
]


def commands_own(printed):
    """What a process printed, without the lines of the library that connects it to others."""
    return re.sub(rf"^(?:{'|'.join(GLOO)})*\n", "", printed, flags=re.M)


def test_lines_of_the_connecting_library_are_no_lines_of_a_command():
    pieces = ["[Gloo] Rank ", "1", " is connected to ", "3", " peer ranks. "]
    pieces += ["Expected number of connected peer ranks is : ", "3"]
    whole = "".join(pieces)
    for cut in range(len(pieces)):
        before, after = "".join(pieces[:cut]), "".join(pieces[cut:])
        printed = f"{before}{whole}\n{after}\npolicy in one\n\n3 texts\n"
        assert commands_own(printed) == "policy in one\n3 texts\n"


def answers(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def beside(one, name):
    """The same run in a folder of its own."""
    folder = one.parent / name
    folder.mkdir()
    for part in ("config.json", "checkpoints"):
        os.symlink(one / part, folder / part)
    return folder


def test_two_processes_calibrate_as_one(one):
    folder = beside(one, "rows")
    first, second = together(folder, "calibrate", f"--workdir={folder}", *MESHES["rows"])
    assert f"policy in {folder}" in first and not second
    ours, theirs = (Records.load(of / "records.npz") for of in (folder, one))
    np.testing.assert_array_equal(ours.groups, theirs.groups)
    for name, scores in theirs.scores.items():
        np.testing.assert_allclose(ours.scores[name], scores, atol=1e-5)


@pytest.mark.parametrize(("mesh", "mode"), [("rows", "lossy"), ("matrices", "verified")])
def test_two_processes_answer_as_one(one, mesh, mode):
    folder = beside(one, f"{mesh}_{mode}")
    os.symlink(one / "policy.json", folder / "policy.json")
    first, second = together(folder, "generate", *asked(folder, mode), *MESHES[mesh])
    assert str(folder / f"{mode}.jsonl") in first and not second
    ours, theirs = (answers(of / f"{mode}.jsonl") for of in (folder, one))
    for answer, other in zip(ours, theirs, strict=True):
        assert answer["tokens"] == other["tokens"]
        np.testing.assert_allclose(answer["log_probs"], other["log_probs"], atol=1e-5)


def test_states_and_conversations_are_made_together_where_a_process_has_too_few_devices(one):
    folder, model = one.parent / "made", one.parent / "talkative"
    shutil.copytree(ROOT / "tests/fixtures/tiny_chat", model)
    stand_ins.make_talkative(model)
    config = [*CONFIG, f"--config.model.source={model}"]
    mesh = ["--config.mesh.data=1", "--config.mesh.tensor=4"]
    made = {}
    for name, run in {"alone": alone, "together": lambda *c: together(folder, *c)}.items():
        where = one.parent / name
        axes = mesh if name == "together" else []
        run("cache", *config, *axes, f"--hidden_states={where / 'states'}", "--batches=2")
        spoken = [f"--made={where / 'made'}", f"--input={one.parent / 'prompts.txt'}", "--raw"]
        rules = ["--max_new_tokens=6", "--unfinished", "--shortest=1", "--temperature=0"]
        run("distill", *config, *axes, *spoken, *rules, "--repeated=1", "--batch=2")
        made[name] = [shards.Store(where / what) for what in ("states", "made")]
    for ours, theirs in zip(made["together"], made["alone"], strict=True):
        assert len(ours) == len(theirs) > 0 and ours.about == theirs.about
    conversations = [[store[i] for i in range(len(store))] for _, store in made.values()]
    assert conversations[0] == conversations[1]


@pytest.mark.parametrize("mesh", MESHES)
def test_two_processes_export_as_one(one, mesh):
    """Rows split: each process has all of every matrix. Matrices split: each has half of them."""
    alone("export", f"--workdir={one}", f"--to={one.parent / mesh}_by_one")
    folder, new = beside(one, f"{mesh}_export"), one.parent / f"{mesh}_new"
    os.symlink(one / "policy.json", folder / "policy.json")
    flags = [f"--workdir={folder}", f"--to={new}", *MESHES[mesh]]
    first, second = together(folder, "export", *flags)
    assert f"exported to {new}" in first and not second
    ours, theirs = (
        {path.name: path.read_bytes() for path in folder.iterdir()}
        for folder in (new, one.parent / f"{mesh}_by_one")
    )
    assert "model.safetensors" in ours
    described = [json.loads(files.pop("exits.json")) for files in (ours, theirs)]
    assert described[0]["config"].pop("mesh") != described[1]["config"].pop("mesh")
    assert described[0] == described[1] and ours == theirs
    # Nothing half written beside it, by either.
    assert not [path.name for path in new.parent.iterdir() if path.name.startswith(f".{new.name}")]
