"""Tuning by several processes, as `launch.tune` does it: the same run, however many there are.

To rounding: what four devices sum, they sum in another order within a process than between several.
"""

import os
import pathlib
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time

import jax
import numpy as np
import pytest

from early_exit.runs import checkpoint
from early_exit.runs.layout import CHECKPOINTS, load_config
from early_exit.runs.metrics import read_metrics
from early_exit.settings.read import changed
from early_exit.training import loop
from early_exit.training.preemption import EXIT_STATUS
from launch.processes import HEARTBEAT_SECONDS

pytestmark = pytest.mark.processes

ROOT = pathlib.Path(__file__).parents[2]
STEPS, INTERVAL = 50, 10
SETTINGS = {
    "data.sequence_length": 16,
    "tune.steps": STEPS,
    "tune.checkpoint_every": INTERVAL,
    "tune.keep_checkpoints": 9,
    "tune.validate_every": 25,
    "tune.validation_batches": 1,
}


def start(folder, processes, tensor=1, slices=1):
    """That many processes with four devices together."""
    mesh = {"mesh.data": 2, "mesh.fsdp": 2 // tensor, "mesh.tensor": tensor, "mesh.slices": slices}
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "launch.tune", "--config=configs/tiny.py"]
    command += [f"--workdir={folder}", *(f"--config.{k}={v}" for k, v in (SETTINGS | mesh).items())]
    flag = f"--xla_force_host_platform_device_count={4 // processes}"
    environment = {
        "JAX_PLATFORMS": "cpu",
        "JAX_COMPILATION_CACHE_DIR": str(folder.parent / "cache"),
        "XLA_FLAGS": f"{os.environ['XLA_FLAGS']} {flag}",
    }
    started = []
    for i in range(processes):
        which = [f"--coordinator=127.0.0.1:{port}", f"--num_processes={processes}"]
        which = [*which, f"--process_id={i}"] if processes > 1 else []
        with (folder.parent / f"{folder.name}.{i}.log").open("w") as log:
            started.append(
                subprocess.Popen(
                    [*command, *which],
                    cwd=ROOT,
                    env=os.environ | environment,
                    stdout=log,
                    stderr=log,
                )
            )
    return started


def ended(started, seconds):
    """Exit statuses, of all within so many seconds."""
    give_up = time.monotonic() + seconds
    try:
        return [process.wait(give_up - time.monotonic()) for process in started]
    finally:
        for process in started:
            process.kill()


def logs(folder):
    return [path.read_text() for path in sorted(folder.parent.glob(f"{folder.name}.*.log"))]


def tune(folder, processes, tensor=1, slices=1):
    started = start(folder, processes, tensor, slices)
    assert ended(started, 600) == [0] * processes, logs(folder)[0]
    return folder


def wait_for(started, condition):
    """Looks often: the runs last seconds."""
    while not condition():
        assert all(process.poll() is None for process in started)
        time.sleep(0.02)


def parameters(folder):
    """Path → array, as they are after the last step."""
    axes = dict.fromkeys(("mesh.data", "mesh.fsdp", "mesh.tensor", "mesh.slices"), 1)
    config = changed(load_config(folder), axes)
    with tempfile.TemporaryDirectory() as scratch:
        like = {"params": loop.Run(config, pathlib.Path(scratch)).state()["params"]}
    state, _ = checkpoint.restore(folder / CHECKPOINTS, like, STEPS)
    return {
        jax.tree_util.keystr(path): np.asarray(x)
        for path, x in jax.tree_util.tree_leaves_with_path(state)
    }


def assert_same_run(found, wanted):
    """Every loss, and what is learned in the end."""
    assert_same_losses(found, wanted)
    found, wanted = parameters(found), parameters(wanted)
    assert found.keys() == wanted.keys() and len(wanted) > 8
    # Each step rounds each parameter once, in either run; a unit roundoff of float32 is 2^-24.
    # Other rows, or other noise, would move them by the learning rate: a thousand times as much.
    most = 2 * STEPS * 2.0**-24
    for path, array in wanted.items():
        apart = np.linalg.norm(found[path] - array) / np.linalg.norm(array)
        assert apart <= most, (path, apart)


def assert_same_losses(found, wanted):
    """Of every step, and of every validation."""
    found, wanted = read_metrics(found), read_metrics(wanted)
    assert [line.keys() for line in found] == [line.keys() for line in wanted]
    assert [line["step"] for line in wanted if "loss" in line] == list(range(1, STEPS + 1))
    for a, b in zip(found, wanted, strict=True):
        for name, value in b.items():
            if "loss" in name:
                np.testing.assert_allclose(a[name], value, rtol=1e-5, err_msg=f"{name} {b['step']}")


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """What one process with four devices makes."""
    return tune(tmp_path_factory.mktemp("processes") / "alone", 1)


# Of the four, pairs have the same rows.
@pytest.mark.parametrize(("processes", "tensor", "slices"), [(2, 1, 2), (4, 2, 1)])
def test_several_processes_are_as_one(alone, processes, tensor, slices):
    folder = tune(alone.parent / f"{processes}_{tensor}", processes, tensor, slices)
    assert_same_run(folder, alone)
    first, *others = logs(folder)
    assert f"tuned exits in {folder}" in first
    assert not any("tuned exits" in log for log in others)


def test_more_processes_go_on_where_one_was(alone):
    folder = shutil.copytree(alone, alone.parent / "more")
    for step in (30, 40, 50):
        shutil.rmtree(folder / CHECKPOINTS / str(step))
    assert_same_run(tune(folder, 2), alone)


def test_when_a_process_is_killed_the_others_end_and_one_goes_on(alone):
    folder = alone.parent / "killed"
    started = start(folder, 2)
    wait_for(started, lambda: checkpoint.latest_step(folder / CHECKPOINTS) is not None)
    started[1].send_signal(signal.SIGKILL)
    statuses = ended(started, 2 * HEARTBEAT_SECONDS)
    assert statuses[0] not in (0, EXIT_STATUS) and statuses[1] == -signal.SIGKILL
    log = logs(folder)[0]
    by_itself = "(one of several processes; the first to end says why)" in log
    assert by_itself or "Terminating process because the JAX distributed service" in log
    reached = max(line["step"] for line in read_metrics(folder))
    # Beside the interval, the checkpoint that was being written.
    assert checkpoint.latest_step(folder / CHECKPOINTS) > reached - 2 * INTERVAL
    assert_same_run(tune(folder, 1), alone)


def test_when_one_is_asked_to_leave_all_do_after_the_same_step(alone):
    folder = alone.parent / "preempted"
    started = start(folder, 2)
    # From when they know of each other, and before the first step.
    wait_for(started, (folder / "config.json").exists)
    started[1].terminate()
    assert ended(started, 600) == [EXIT_STATUS] * 2
    step = checkpoint.latest_step(folder / CHECKPOINTS)
    assert step < STEPS
    assert f"saved after step {step} of {STEPS}; the same command goes on" in logs(folder)[0]
    assert_same_run(tune(folder, 2), alone)
