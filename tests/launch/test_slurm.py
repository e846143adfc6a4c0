"""Runs as jobs of a real Slurm: one machine that is the whole cluster, started for these tests."""

import pathlib
import re
import secrets
import shutil
import socket
import subprocess
import sys
import time

import jax
import numpy as np
import pytest

from early_exit.runs import checkpoint
from early_exit.runs.layout import CHECKPOINTS, load_config
from early_exit.runs.metrics import FILE
from early_exit.settings.read import changed
from early_exit.training import loop
from launch.slurm import submit

ROOT = pathlib.Path(__file__).parents[2]
PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch")

pytestmark = [
    pytest.mark.slurm,
    pytest.mark.skipif(
        not all(map(shutil.which, PROGRAMS)), reason="needs Slurm and MUNGE (slurm-wlm, munge)"
    ),
]

CONFIG = """
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmUser={user}
SlurmdUser={user}
AuthType=auth/munge
# A job that queues again waits for its credential to expire.
AuthInfo=socket={folder}/munge/socket,cred_expire=5
SlurmctldPort={ports[0]}
SlurmdPort={ports[1]}
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd.log
ProctrackType=proctrack/pgid
TaskPlugin=task/none
MpiDefault=none
SchedulerParameters=batch_sched_delay=1,sched_interval=1
# Two tasks, however few cores there are.
SlurmdParameters=config_overrides
NodeName={host} NodeAddr=127.0.0.1 CPUs=2 State=UNKNOWN
PartitionName=main Nodes={host} Default=YES State=UP
"""


def ask(*command):
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def wait_for(condition, seconds):
    give_up = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < give_up
        time.sleep(0.2)


def free_ports(count):
    sockets = [socket.socket() for _ in range(count)]
    for each in sockets:
        each.bind(("127.0.0.1", 0))
    ports = [each.getsockname()[1] for each in sockets]
    for each in sockets:
        each.close()
    return ports


@pytest.fixture(scope="module")
def cluster(tmp_path_factory):
    """A Slurm of one node, which the programs of this process find; stopped at the end."""
    folder = tmp_path_factory.mktemp("slurm")
    for name in ("munge", "state", "spool"):
        (folder / name).mkdir()
    key = folder / "munge" / "key"
    key.write_bytes(secrets.token_bytes(64))
    key.chmod(0o400)
    config = folder / "slurm.conf"
    user = ask("id", "-un").strip()
    host = socket.gethostname().partition(".")[0]
    config.write_text(CONFIG.format(host=host, user=user, folder=folder, ports=free_ports(2)))
    munge = {name: folder / "munge" / name for name in ("socket", "pid-file", "log-file")}
    munge |= {"seed-file": folder / "munge" / "seed", "key-file": key}
    started = []

    def start(*command):
        with (folder / f"{command[0]}.output").open("w") as output:
            started.append(subprocess.Popen(command, stdout=output, stderr=output))

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SLURM_CONF", str(config))
        try:
            start("munged", "--foreground", "--force", *(f"--{k}={v}" for k, v in munge.items()))
            wait_for(munge["socket"].exists, 20)
            start("slurmctld", "-D")
            start("slurmd", "-D")
            state = ("sinfo", "--noheader", "--format=%T")
            wait_for(lambda: subprocess.run(state, capture_output=True).stdout == b"idle\n", 60)
            yield
            for number in submit.queue():
                subprocess.run(["scancel", "--full", "--signal=KILL", number])
                ask("scancel", number)
            wait_for(lambda: not submit.queue(), 60)
        finally:
            for process in reversed(started):
                process.terminate()
                process.wait(30)


SETTINGS = {
    "data.sequence_length": 16,
    "mesh.data": 2,
    "tune.steps": 300,
    "tune.checkpoint_every": 50,
    "tune.validate_every": 300,
    "tune.validation_batches": 1,
}
# Three runs that differ in nothing that tuning depends on, and one that cannot start.
SWEEP = """
from configs.tiny import get_config

def sweep(add):
    for rounds in (1, 2, 3):
        add(**{"evaluate.rounds": rounds})
    add(**{"exits.points": (9,)})
"""


def state_of(run):
    """Path → bytes of everything in the run's newest checkpoint, and the data iterator's state."""
    like = loop.Run(changed(load_config(run), {"mesh.data": 1}), run).state()
    state, iterator_state = checkpoint.restore(run / CHECKPOINTS, like)
    leaves = jax.tree_util.tree_leaves_with_path(state)
    return {
        jax.tree_util.keystr(path): np.asarray(x).tobytes() for path, x in leaves
    }, iterator_state


def test_runs_that_are_preempted_or_cancelled_end_as_one_left_alone(cluster, tmp_path):
    config, workdir = tmp_path / "config.py", tmp_path / "sweep"
    config.write_text(SWEEP)
    command = [sys.executable, "-m", "launch.sweep", f"--config={config}", f"--workdir={workdir}"]
    command += [f"--config.{key}={value}" for key, value in SETTINGS.items()]
    command += ["--engine=slurm", "--tasks=2", "--parallel=1"]

    def launch(*flags):
        return subprocess.run([*command, *flags], cwd=ROOT, capture_output=True, text=True)

    done = launch("--nowait")
    assert done.returncode == 0, done.stderr
    jobs = re.findall(r"^job (\d+): (.*)$", done.stdout, re.MULTILINE)
    ids = {name: number for number, name in jobs}
    alone, preempted, cancelled, impossible = (workdir / name for name in ids)

    def has_begun(run):
        return checkpoint.latest_step(run / CHECKPOINTS) is not None

    wait_for(lambda: has_begun(preempted), 300)
    ask("scancel", "--signal=TERM", ids[preempted.name])
    wait_for(lambda: "queues again" in (preempted / "log.txt").read_text(), 60)
    wait_for(lambda: has_begun(cancelled), 300)
    ask("scancel", ids[cancelled.name])
    wait_for(lambda: ids[cancelled.name] not in submit.queue(), 60)
    assert "JobState=CANCELLED" in ask("scontrol", "show", "job", ids[cancelled.name])
    ask("scontrol", "requeue", ids[cancelled.name])

    done = launch()
    # No run got a second job.
    assert set(re.findall(r"^job (\d+)", done.stdout, re.MULTILINE)) <= set(ids.values())
    assert done.returncode == 1
    assert f"1 of 4 runs did not finish; their logs:\n  {impossible / 'log.txt'}" in done.stderr
    assert "exit points [9] lie outside 1…5" in (impossible / "log.txt").read_text()
    results = (workdir / "results.jsonl").read_text().splitlines()
    assert len(results) == 3 * 3  # exits

    for run in (preempted, cancelled):
        # They did stop midway.
        (step,) = re.findall(
            r"saved after step (\d+) of 300; the same", (run / "log.txt").read_text()
        )
        assert 50 <= int(step) < 300
        assert (run / FILE).read_text() == (alone / FILE).read_text()
        assert state_of(run) == state_of(alone)
