"""A folder has one command at a time, by whatever way a second one comes."""

import json
import os
import pathlib
import re
import socket
import subprocess
import sys
import time

import pytest

from early_exit.runs import checkpoint, lock
from early_exit.runs.layout import CHECKPOINTS
from early_exit.runs.metrics import FILE

ROOT = pathlib.Path(__file__).parents[2]
TINY = ["--config=configs/tiny.py", f"--config.model.source={ROOT / 'tests/fixtures/tiny_chat'}"]
IN_USE = r"is in use by `.*` \(process \d+ on .*, since .*\); wait until that has ended, or name"


def refused(done):
    assert done.returncode == 1 and "Traceback" not in done.stderr, done.stderr
    assert re.search(IN_USE, done.stderr), done.stderr


def files_of(folder):
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_two_tunes_at_once(launch, tmp_path):
    """The second says who is there and changes nothing; when the first is killed, it goes on."""
    folder, settings = tmp_path / "run", ["--config.tune.steps=400", "--config.tune.warmup_steps=1"]
    flags = [*TINY, *settings, f"--workdir={folder}"]
    environment = os.environ | {"JAX_PLATFORMS": "cpu"}
    first = subprocess.Popen(
        [sys.executable, "-m", "launch.tune", *flags],
        cwd=ROOT,
        env=environment,
        stderr=subprocess.DEVNULL,
    )
    try:
        give_up = time.monotonic() + 100
        while checkpoint.latest_step(folder / CHECKPOINTS) is None:
            assert first.poll() is None and time.monotonic() < give_up
            time.sleep(0.02)
        config, lines = (folder / "config.json").read_bytes(), (folder / FILE).read_text()
        for changed in ([], ["--config.tune.learning_rate=0.1"]):
            done = launch("tune", *flags, *changed)
            refused(done)
            assert f"(process {first.pid} on" in done.stderr
        assert first.poll() is None
        assert (folder / "config.json").read_bytes() == config
        assert (folder / FILE).read_text().startswith(lines)
    finally:
        first.kill()
    os.waitid(os.P_PID, first.pid, os.WEXITED | os.WNOWAIT)  # and is a zombie until asked again
    reached = checkpoint.latest_step(folder / CHECKPOINTS)
    assert (folder / lock.FILE).exists()
    done = launch("tune", *flags, f"--profile={reached}:{reached}")
    assert f"that are to be run: {reached + 1} to 400" in done.stderr  # and not: in use
    first.wait()


@pytest.fixture
def taken(tmp_path):
    """A folder that this very process is at work in."""
    with lock.held(tmp_path / "taken"):
        yield tmp_path / "taken"


def test_commands_that_write_where_another_does(launch, taken):
    before = files_of(taken)
    refused(launch("tune", *TINY, f"--workdir={taken}"))
    refused(launch("cache", *TINY, f"--hidden_states={taken}"))
    refused(launch("distill", *TINY, f"--made={taken}", "--tokens=9"))
    refused(launch("calibrate", f"--workdir={taken}"))
    refused(launch("evaluate", f"--workdir={taken}"))
    refused(launch("sweep", *TINY[:1], f"--workdir={taken}"))
    assert files_of(taken) == before


def test_a_run_of_a_sweep_that_is_tuned_by_hand(launch, tmp_path):
    """It fails with the reason in its log, the others go on, and later it is made up for."""
    config = tmp_path / "varied.py"
    config.write_text(
        "from configs.tiny import get_config\n"
        "def sweep(add):\n"
        "    for points in (2, 4), (1, 3):\n"
        "        add(**{'exits.points': points})\n"
    )
    settings = {"tune.steps": 2, "tune.warmup_steps": 1, "data.batch_size": 2, "exits.classes": 0}
    flags = [f"--config={config}", TINY[1], f"--workdir={tmp_path / 'sweep'}"]
    flags += [f"--config.{name}={value}" for name, value in settings.items()]
    by_hand = tmp_path / "sweep" / "points=2-4"
    with lock.held(by_hand):
        done = launch("sweep", *flags)
    assert done.returncode == 1 and f"1 of 2 runs did not finish; their logs:\n  {by_hand}" in (
        done.stderr
    )
    assert re.search(IN_USE, (by_hand / "log.txt").read_text())
    done = launch("sweep", *flags)
    assert done.returncode == 0 and "2 runs, 1 of them finished before" in done.stdout
    lines = (tmp_path / "sweep" / "results.jsonl").read_text().splitlines()
    assert len([json.loads(line, parse_constant=pytest.fail) for line in lines]) == 2 * 3


def test_what_is_said_of_the_devices(launch, tmp_path):
    """Where warnings go, once, and not among what a command prints."""
    done = launch("tune", *TINY, "--config.exits.points=9", f"--workdir={tmp_path}")
    assert re.search(r"^on cpu\n", done.stderr, re.MULTILINE) and "on cpu" not in done.stdout


def test_jax_says_what_it_falls_back_to():
    """An accelerator that is not used is a warning of JAX's, and stays one."""
    script = (
        "import logging, sys\n"
        "from launch import common\n"
        "def main(argv):\n"
        "    logging.getLogger('jax._src.xla_bridge').warning('Falling back to %s.', 'cpu')\n"
        "sys.argv = ['x']\n"
        "common.run(main, on_run=False)\n"
    )
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0 and "Falling back to cpu." in done.stderr


@pytest.mark.parametrize("when", ["flags", "main"])
def test_any_command_asked_to_leave_does_so_with_a_sentence(when):
    """From when it has been imported on; also while it reads its flags."""
    script = (
        "import os, signal, sys\n"
        "from launch import common\n"
        "def leave(*_):\n"
        "    os.kill(os.getpid(), signal.SIGTERM)\n"
        "    return []\n"
        f"if {when == 'flags'}: common._parse_flags = leave\n"
        "sys.argv = ['x']\n"
        "common.run(leave, on_run=False)\n"
    )
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 75, done.stderr
    assert done.stderr == "asked to leave; the same command goes on with what is saved\n"


@pytest.mark.processes
def test_processes_of_one_run_share_its_folder(tmp_path):
    """And the folder is theirs until the last of them has ended."""
    flags = ["--config=configs/tiny.py", f"--hidden_states={tmp_path / 'states'}", "--batches=12"]
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "launch.cache", *flags, f"--coordinator=127.0.0.1:{port}"]
    started = [
        subprocess.Popen(
            [*command, "--num_processes=2", f"--process_id={i}"],
            cwd=ROOT,
            env=os.environ | {"JAX_PLATFORMS": "cpu"},
            stderr=subprocess.PIPE,
            text=True,
        )
        for i in range(2)
    ]
    told = [process.communicate(timeout=300)[1] for process in started]
    assert [process.returncode for process in started] == [0, 0], told
    assert [("on 2 × cpu" in text) for text in told] == [True, False]
    assert not (tmp_path / "states" / lock.FILE).exists()
