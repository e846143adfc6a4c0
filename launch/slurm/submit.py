"""Queues the runs of a sweep as Slurm jobs, one each, and waits for them.

The one idea: Slurm knows the state of a job and the run's folder that of the run. Kept beside
them is only the number of the job that a run was given, so that a sweep which is started again
does not queue a second job for a run that has one.
"""

import getpass
import shlex
import subprocess
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from absl import flags

from early_exit.storage import files
from launch import usage
from launch.jobs import Job

JOB_ID = "slurm_job"

PARTITION = flags.DEFINE_string("partition", None, "Slurm: where; its default if absent.")
NODES = flags.DEFINE_integer("nodes", 1, "Slurm: nodes of a job.", lower_bound=1)
TASKS = flags.DEFINE_integer(
    "tasks", 1, "Slurm: processes on a node; GPUs have one each.", lower_bound=1
)
TIME = flags.DEFINE_string("time", None, "Slurm: of a job; one that needs longer queues again.")
OPTIONS = flags.DEFINE_string("sbatch", "", 'Slurm: more, such as "--account=vision --gres=gpu:4".')
SCRIPT = flags.DEFINE_string(
    "script",
    str(Path(__file__).with_name("run.sbatch")),
    "Slurm: the job; a copy may load modules.",
)
usage.group("Slurm", PARTITION, NODES, TASKS, TIME, OPTIONS, SCRIPT)

_POLL_SECONDS = 5
# Slurm's controller may be away for a while.
_POLLS_WITHOUT_ANSWER = 24


def submission(job: Job, after: str | None = None) -> list[str]:
    """The `sbatch` command for a run; it starts when job `after` has ended, if one is given."""
    options = {
        "job-name": job.folder.name,
        "output": str(job.log.absolute()).replace("%", "%%"),
        "nodes": NODES.value,
        "ntasks-per-node": TASKS.value,
        "partition": PARTITION.value,
        "time": TIME.value,
        "dependency": after and f"afterany:{after}",
    }
    given = [f"--{name}={value}" for name, value in options.items() if value is not None]
    more = shlex.split(OPTIONS.value)
    return ["sbatch", "--parsable", *given, *more, SCRIPT.value, *job.command]


def run(jobs: Sequence[Job], parallel: int | None, wait: bool) -> None:
    """Queues what is not queued yet and returns when all has ended, or at once without `wait`.

    Args:
      parallel: jobs that may run at a time; all if None.

    Raises:
      RuntimeError: Slurm takes no job, or gives no answer.
    """
    queued, ids = queue(), []
    for job in jobs:
        kept = job.folder / JOB_ID
        number = kept.read_text().strip() if kept.exists() else ""
        if number not in queued:
            job.folder.mkdir(parents=True, exist_ok=True)
            before = ids[-parallel] if parallel and len(ids) >= parallel else None
            # Of a cluster's name behind a semicolon there is no need.
            number = _slurm(*submission(job, before)).strip().partition(";")[0]
            files.write_text(kept, number + "\n")
        print(f"job {number}: {job.folder.name}", flush=True)
        ids.append(number)
    if wait:
        _wait_for(set(ids))
    else:
        print("the same command, given later, gathers the results")


def queue() -> dict[str, str]:
    """The user's jobs that wait or run: number → state, such as PENDING.

    Raises:
      RuntimeError: Slurm gives no answer.
    """
    listed = _slurm("squeue", "--noheader", f"--user={getpass.getuser()}", "--format=%A %T")
    return dict(line.split() for line in listed.splitlines())


def _wait_for(ids: set[str]) -> None:
    shown, silent = None, 0
    while True:
        try:
            states, silent = queue(), 0
        except RuntimeError:
            silent += 1
            if silent == _POLLS_WITHOUT_ANSWER:
                raise
        else:
            found = Counter(state.lower() for number, state in states.items() if number in ids)
            if found != shown:
                ended = len(ids) - found.total()
                parts = [f"{count} {state}" for state, count in sorted(found.items())]
                print(", ".join([*parts, f"{ended} ended"]), flush=True)
                shown = found
            if not found:
                return
        time.sleep(_POLL_SECONDS)


def _slurm(*command: str) -> str:
    try:
        done = subprocess.run(command, capture_output=True, text=True)
    except FileNotFoundError as error:
        raise RuntimeError(f"there is no Slurm here: {command[0]} is not installed") from error
    if done.returncode:
        raise RuntimeError(f"{command[0]}: {done.stderr.strip()}")
    return done.stdout
