"""A run may be killed at any moment, fail, or be finished already: nothing is lost or redone."""

import os
import pathlib
import shutil
import signal
import subprocess
import sys
import threading
import time

import jax
import numpy as np
import pytest
import safetensors.numpy

from configs import tiny
from early_exit.runs import assemble, checkpoint, layout, lock
from early_exit.runs.layout import CHECKPOINTS, load_config
from early_exit.runs.metrics import FILE, read_metrics
from early_exit.settings.overrides import override
from early_exit.settings.read import changed, read
from early_exit.training import loop, preemption

ROOT = pathlib.Path(__file__).parents[2]
SETTINGS = {
    "exits.recurrent_taps": (2, 6),
    "tune.steps": 60,
    "tune.checkpoint_every": 10,
    "tune.validate_every": 10,
    "tune.validation_batches": 1,
}


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A copy of the tiny model, so that a test may change it."""
    return shutil.copytree(
        ROOT / "tests/fixtures/tiny_chat", tmp_path_factory.mktemp("source") / "model"
    )


@pytest.fixture(scope="module")
def config(model):
    return read(override(tiny.get_config(), SETTINGS | {"model.source": str(model)}))


@pytest.fixture(scope="module")
def uninterrupted(config, tmp_path_factory):
    """(folder, rows) of a run from its first step to its last."""
    folder = tmp_path_factory.mktemp("uninterrupted")
    return folder, loop.tune(config, folder)


def state_of(config, folder):
    """Path → bytes of everything in the newest checkpoint, and the data iterator's state."""
    like = loop.Run(config, folder).state()
    state, iterator_state = checkpoint.restore(folder / CHECKPOINTS, like)
    leaves = jax.tree_util.tree_leaves_with_path(state)
    return {
        jax.tree_util.keystr(path): np.asarray(x).tobytes() for path, x in leaves
    }, iterator_state


def files_of(folder):
    return {path: path.stat().st_mtime_ns for path in folder.rglob("*") if path.is_file()}


@pytest.mark.long
def test_a_killed_run_goes_on_bit_equal(config, model, uninterrupted, tmp_path):
    flags = [f"--config.{key}={value}" for key, value in SETTINGS.items()]
    process = subprocess.Popen(
        [sys.executable, "-m", "launch.tune", "--config=configs/tiny.py", f"--workdir={tmp_path}"]
        + [*flags, f"--config.model.source={model}"],
        cwd=ROOT,
        stderr=subprocess.DEVNULL,
    )
    give_up = time.monotonic() + 100
    while checkpoint.latest_step(tmp_path / CHECKPOINTS) is None:
        assert process.poll() is None and time.monotonic() < give_up
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    killed_after = checkpoint.latest_step(tmp_path / CHECKPOINTS)
    assert 10 <= killed_after < 60

    folder, rows = uninterrupted
    assert loop.tune(config, tmp_path) == rows
    found, wanted = (state_of(config, path) for path in (tmp_path, folder))
    assert found == wanted and any("opt_state" in path for path in wanted[0])
    assert (tmp_path / FILE).read_text() == (folder / FILE).read_text()


@pytest.mark.long
def test_a_run_asked_to_leave_saves_and_goes_on_bit_equal(
    config, uninterrupted, tmp_path, monkeypatch
):
    batches = []

    def place_batch(run, batch, place=loop.Run.place_batch):
        batches.append(batch)
        if len(batches) == 7:
            os.kill(os.getpid(), signal.SIGTERM)
        return place(run, batch)

    monkeypatch.setattr(loop.Run, "place_batch", place_batch)
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(preemption.Preempted, match="saved after step 7 of 60"):
        loop.tune(config, tmp_path)
    assert signal.getsignal(signal.SIGTERM) == before
    assert checkpoint.latest_step(tmp_path / CHECKPOINTS) == 7

    folder, rows = uninterrupted
    assert loop.tune(config, tmp_path) == rows
    assert state_of(config, tmp_path) == state_of(config, folder)
    assert (tmp_path / FILE).read_text() == (folder / FILE).read_text()


def test_when_to_save_and_to_look_may_change_on_the_way(
    config, uninterrupted, tmp_path, monkeypatch
):
    seldom = {"checkpoint_every": 30, "keep_checkpoints": 1, "validate_every": 25}
    others = changed(config, {f"tune.{name}": value for name, value in seldom.items()})
    asked_when(monkeypatch, loop.Run, "clock")
    with pytest.raises(preemption.Preempted, match="saved after step 1 of 60"):
        loop.tune(config, tmp_path)
    monkeypatch.undo()
    loop.tune(others, tmp_path)
    assert state_of(others, tmp_path) == state_of(config, uninterrupted[0])
    assert load_config(tmp_path) == others
    looked = {row["step"] for row in read_metrics(tmp_path) if "validation/draft/draft_1" in row}
    assert looked == {25, 50, 60}
    with pytest.raises(ValueError, match=r"other settings \(tune.b2: 0.95 → 0.9\)"):
        loop.tune(changed(others, {"tune.b2": 0.9, "tune.validate_every": 10}), tmp_path)


def asked_when(monkeypatch, owner, name):
    """The process is asked to leave as soon as this is called."""
    real = getattr(owner, name)

    def called(*args, **kwargs):
        os.kill(os.getpid(), signal.SIGTERM)
        return real(*args, **kwargs)

    monkeypatch.setattr(owner, name, called)


@pytest.mark.parametrize(
    ("owner", "name"),
    [
        (checkpoint, "latest_step"),
        (layout, "save_config"),
        (assemble, "load_backbone"),
        (loop.Run, "state"),
        (checkpoint.Saver, "__init__"),
    ],
)
def test_before_the_first_step_a_run_asked_to_leave_does_so_at_once(
    config, tmp_path, monkeypatch, owner, name
):
    asked_when(monkeypatch, owner, name)
    before, threads = signal.getsignal(signal.SIGTERM), threading.active_count()
    with pytest.raises(preemption.Preempted, match="asked to leave before the first step"):
        loop.tune(config, tmp_path / "run")
    assert signal.getsignal(signal.SIGTERM) == before
    assert threading.active_count() <= threads
    assert not list((tmp_path / "run").glob(lock.FILE))
    monkeypatch.undo()
    assert checkpoint.latest_step(tmp_path / "run" / CHECKPOINTS) is None


def test_asked_while_the_step_compiles_it_takes_the_step_and_saves(config, tmp_path, monkeypatch):
    asked_when(monkeypatch, loop.Run, "clock")
    with pytest.raises(preemption.Preempted, match="saved after step 1 of 60"):
        loop.tune(config, tmp_path)
    assert checkpoint.latest_step(tmp_path / CHECKPOINTS) == 1


def test_nobody_mends_being_asked_as_an_error(config, tmp_path, monkeypatch):
    """Loading has places that turn whatever goes wrong into advice."""

    def mended(*args, real=assemble.load_backbone, **kwargs):
        try:
            os.kill(os.getpid(), signal.SIGTERM)
            return real(*args, **kwargs)
        except Exception as error:
            raise FileNotFoundError("check the connection") from error

    monkeypatch.setattr(assemble, "load_backbone", mended)
    with pytest.raises(preemption.Preempted):
        loop.tune(config, tmp_path)


def test_a_command_asked_while_it_loads_is_to_be_started_again(model, tmp_path):
    command = [sys.executable, "-m", "launch.tune", "--config=configs/tiny.py"]
    command += [f"--workdir={tmp_path / 'run'}", f"--config.model.source={model}"]
    process = subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, text=True)
    give_up = time.monotonic() + 100
    while not (tmp_path / "run" / lock.FILE).exists():
        assert process.poll() is None and time.monotonic() < give_up
        time.sleep(0.005)
    process.terminate()
    _, said = process.communicate()
    assert process.returncode == preemption.EXIT_STATUS, said
    assert "the same command goes on with what is saved" in said and "Traceback" not in said
    assert not (tmp_path / "run" / lock.FILE).exists()


def test_a_run_whose_folder_was_taken_saves_nothing_more(config, tmp_path, monkeypatch):
    def place_batch(run, batch, place=loop.Run.place_batch):
        batches.append(batch)
        if len(batches) == 15:
            (tmp_path / lock.FILE).write_text('{"token": "another"}')
        return place(run, batch)

    batches = []
    monkeypatch.setattr(loop.Run, "place_batch", place_batch)
    with pytest.raises(RuntimeError, match="is no longer this command's"):
        loop.tune(config, tmp_path)
    assert checkpoint.steps(tmp_path / CHECKPOINTS) == [10]


def test_a_finished_run_says_what_it_found_and_does_nothing(config, uninterrupted):
    folder, rows = uninterrupted
    checkpoints, metrics = files_of(folder / CHECKPOINTS), (folder / FILE).read_text()
    assert loop.tune(config, folder) == rows
    assert files_of(folder / CHECKPOINTS) == checkpoints
    assert (folder / FILE).read_text() == metrics


def test_a_run_does_not_go_on_with_another_backbone(config, model, uninterrupted):
    folder, _ = uninterrupted
    weights = model / "model.safetensors"
    original = weights.read_bytes()
    tensors = safetensors.numpy.load(original)
    tensors["model.layers.5.mlp.down_proj.weight"][0, 0] += 1
    try:
        safetensors.numpy.save_file(tensors, weights)
        with pytest.raises(ValueError, match="were tuned on a backbone with fingerprint"):
            loop.tune(config, folder)
    finally:
        weights.write_bytes(original)


def test_a_diverged_run_stops_and_keeps_its_checkpoints(config, tmp_path):
    """The rate rises from 0, so the first step is harmless and the second ruins the heads."""
    ruinous = changed(
        config, {"tune.learning_rate": 1e30, "tune.steps": 6, "tune.checkpoint_every": 1}
    )
    threads = set(threading.enumerate())
    message = "step 3: the loss is .* lower tune.learning_rate"
    with pytest.raises(FloatingPointError, match=message) as caught:
        loop.tune(ruinous, tmp_path)
    # Also while a notebook still has the error. (Pools that wait for work go later.)
    left = {thread.name for thread in set(threading.enumerate()) - threads}
    assert caught and not any("ThreadPrefetch" in name or "_beat" in name for name in left)
    assert checkpoint.latest_step(tmp_path / CHECKPOINTS) == 2
    like = loop.Run(ruinous, tmp_path).state()
    for step in (1, 2):
        state, _ = checkpoint.restore(tmp_path / CHECKPOINTS, like, step)
        assert int(state["step"]) == step
        assert all(np.isfinite(x).all() for x in jax.tree.leaves(state))


def test_settings_that_failed_before_the_first_checkpoint_can_be_mended(config, tmp_path):
    with pytest.raises(ValueError, match=r"exit points \[9\] lie outside 1…5"):
        loop.tune(changed(config, {"exits.points": (2, 9)}), tmp_path)
    layout.save_config(changed(config, {"exits.points": (2,)}), tmp_path)
    assert load_config(tmp_path).exits.points == (2,)
