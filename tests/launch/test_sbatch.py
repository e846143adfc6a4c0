"""`run.sbatch` by itself, with programs in Slurm's place: what it makes of the tasks' statuses."""

import os
import pathlib
import shutil
import signal
import subprocess
import sys
import time

import pytest

SCRIPT = pathlib.Path(__file__).parents[2] / "launch/slurm/run.sbatch"

# Runs the command in three tasks, which end as FAKE_TASKS says, and tells the highest status.
SRUN = r"""#!/usr/bin/env bash
while [[ $1 == --* ]]; do shift; done
most=0
for task in 0 1 2; do
    SLURM_PROCID=$task "$@" &
done
for job in $(jobs -p); do
    wait "$job" || { status=$?; [ "$status" -gt "$most" ] && most=$status; }
done
exit "${FAKE_SRUN:-$most}"
"""
# One task: `STATUS` as such, or `killed` together with the shell that would have told.
TASK = r"""
import os, signal, sys
how = os.environ["FAKE_TASKS"].split()[int(os.environ["SLURM_PROCID"])]
if how.startswith("signal"):
    os.kill(os.getpid(), int(how.removeprefix("signal")))
if how == "killed":
    os.kill(os.getppid(), signal.SIGKILL)
    os._exit(0)
assert sys.argv[1:] == ["--a=b c", ""], sys.argv
sys.exit(int(how))
"""


@pytest.fixture
def job(tmp_path):
    """Runs the script with tasks that end so: (its status, whether it queued again, its errors)."""
    bin = tmp_path / "bin"
    bin.mkdir()
    for name, text in ("srun", SRUN), ("scontrol", '#!/bin/sh\necho "$@" >> "$FAKE_CALLS"\n'):
        (bin / name).write_text(text)
        (bin / name).chmod(0o755)
    environment = {
        "PATH": f"{bin}{os.pathsep}{os.environ['PATH']}",
        "SLURM_JOB_ID": "17",
        "SLURM_SUBMIT_DIR": str(tmp_path),
        "FAKE_CALLS": str(tmp_path / "calls"),
    }
    command = [shutil.which("bash"), str(SCRIPT), sys.executable, "-SEc", TASK, "--a=b c", ""]

    def run(*tasks, **more):
        given = environment | more | {"FAKE_TASKS": " ".join(map(str, tasks))}
        done = subprocess.run(command, env=given, capture_output=True, text=True)
        calls = tmp_path / "calls"
        asked = calls.read_text() if calls.exists() else ""
        assert asked in ("", "requeue 17\n")
        assert not list(tmp_path.glob(".statuses*"))
        return done.returncode, bool(asked), done.stderr

    run.command, run.environment = command, environment
    return run


@pytest.mark.parametrize(
    ("tasks", "status", "again"),
    [
        ((0, 0, 0), 0, False),
        ((75, 75, 75), 75, True),
        ((0, 75, 0), 75, True),
        ((1, 1, 1), 1, False),
        # srun tells 75, which hides the failure.
        ((75, 1, 75), 1, False),
        ((75, 2, 1), 1, False),
        # Asked before it had an ear for it: nothing to save, and started again.
        ((75, "signal15", 75), 75, True),
        (("signal15",) * 3, 75, True),
        # srun tells 143 or 137, which hide the failure.
        (("signal15", 1, 75), 1, False),
        (("signal9", 1, 75), 1, False),
        # Killed is not asked.
        ((75, "signal9", 75), 137, False),
        (("signal9", "signal15", 0), 137, False),
        ((75, "killed", 75), 137, False),
        # Who misses the others aborts; why the first left is the job's status.
        (("signal6", 1, "signal6"), 1, False),
        (("signal6", "signal6", 75), 134, False),
    ],
)
def test_the_status_of_a_job_is_the_worst_of_its_tasks(job, tasks, status, again):
    found, queued, said = job(*tasks)
    assert (found, queued) == (status, again), said
    mixed = status not in (0, 75) and any(task in (75, "signal15") for task in tasks)
    assert ("some tasks were asked to leave, but one" in said) == mixed


def test_when_srun_itself_fails_no_job_queues_again(job):
    assert job(75, 75, 75, FAKE_SRUN="1")[:2] == (1, False)


def test_without_a_folder_for_the_statuses_srun_decides(job, tmp_path):
    nowhere = {"SLURM_SUBMIT_DIR": str(tmp_path / "nowhere")}
    assert job(0, 75, 0, **nowhere)[:2] == (75, True)
    (tmp_path / "calls").unlink()
    assert job(0, 3, 0, **nowhere)[:2] == (3, False)


def test_a_cancelled_job_waits_for_its_tasks_and_stays_cancelled(job, tmp_path):
    """Everything in the job gets the signal, the shells around the commands included."""
    saves = (
        "import os, pathlib, signal, sys, time\n"
        "signal.signal(signal.SIGTERM, lambda *_: (time.sleep(0.5), sys.exit(75)))\n"
        f"pathlib.Path({str(tmp_path)!r}, 'ready' + os.environ['SLURM_PROCID']).touch()\n"
        "time.sleep(60)"
    )
    (tmp_path / "bin" / "srun").write_text(SRUN.replace("most=0", "most=0; trap : TERM", 1))
    process = subprocess.Popen(
        [*job.command[:2], sys.executable, "-SEc", saves],
        env=job.environment,
        start_new_session=True,
        stdout=subprocess.PIPE,
    )
    give_up = time.monotonic() + 30
    while len(list(tmp_path.glob("ready*"))) < 3:
        assert process.poll() is None and time.monotonic() < give_up
        time.sleep(0.02)
    os.killpg(process.pid, signal.SIGTERM)
    out, _ = process.communicate(timeout=30)
    assert process.returncode == 75 and b"queues again" not in out
    assert not (tmp_path / "calls").exists()
