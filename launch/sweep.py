"""Runs every setting of a config's `sweep(add)`, and gathers what they found in one table.

    python -m launch.sweep --config=configs/smollm2_135m.py:runlocal --workdir=runs/sweep
    python -m launch.sweep --config=configs/tiny.py --config.tune.steps=24 --workdir=runs/tiny_sweep
    python -m launch.sweep --config=… --workdir=… --parallel=4
    python -m launch.sweep --config=… --workdir=… --engine=slurm --nodes=2 --time=8:00:00
    python -m launch.sweep --config=… --workdir=/mnt/runs/a --engine=gke --image=… --claim=…

Every run is a `launch.tune` with a folder of its own in --workdir: here, as a Slurm job, or on TPU
slices of GKE. Finished runs are skipped, so a sweep that was stopped goes on when started again.
Writes results.jsonl.
"""

import runpy
import sys
from collections.abc import Callable, Sequence

from absl import flags
from ml_collections import config_flags

from early_exit.runs.metrics import table
from early_exit.settings.overrides import Overrides
from early_exit.storage import buckets, files
from launch import common, jobs
from launch.slurm import submit
from launch.tpu import jobset

ENGINE = flags.DEFINE_enum("engine", "local", ["local", "slurm", "gke"], "What runs the runs.")
PARALLEL = flags.DEFINE_integer(
    "parallel", None, "Runs at a time; if absent, one here and all under Slurm.", lower_bound=1
)
WAIT = flags.DEFINE_bool("wait", True, "Slurm: wait for the jobs, and gather their results.")

for module in (submit, jobset):  # what --help lists
    flags.adopt_module_key_flags(module)


def main(argv):
    common.no_arguments(argv)
    flag = flags.FLAGS["config"]
    config_file = config_flags.get_config_filename(flag)
    fixed = config_flags.get_override_values(flag)
    folder = buckets.here(common.WORKDIR.value, "the folder of a sweep")
    runs = jobs.expand(_sweep_of(config_file), common.CONFIG.value, folder)
    if twice := sorted(fixed.keys() & {key for run in runs for key in run.overrides}):
        raise ValueError(f"the sweep itself sets {', '.join(twice)}; leave it out of the flags")

    common.own(common.workdir())
    left = [run for run in runs if not run.is_finished]
    print(f"{len(runs)} runs, {len(runs) - len(left)} of them finished before")
    # Images have a Python of their own.
    python = "python" if ENGINE.value == "gke" else sys.executable
    tune = [python, "-m", "launch.tune", f"--config={config_file}"]
    started = []
    for run in left:
        flagged = [*_flags(fixed | run.overrides), f"--workdir={run.folder.absolute()}"]
        started.append(jobs.Job([*tune, *flagged], run.folder))
    if not _run(started):
        return

    rows = [row for run in runs if run.is_finished for row in run.results()]
    results = common.workdir() / "results.jsonl"
    files.write_json_lines(results, rows)
    columns = list(dict.fromkeys(key for row in rows for key in row))
    if rows:
        print(table([[row.get(key) for key in columns] for row in rows], header=columns))
    print(f"results in {results}")
    if failed := [job.log for run, job in zip(left, started, strict=True) if not run.is_finished]:
        logs = "".join(f"\n  {log}" for log in failed)
        sys.exit(f"{len(failed)} of {len(runs)} runs did not finish; their logs:{logs}")


def _run(started: Sequence[jobs.Job]) -> bool:
    """Has the engine run the jobs; returns whether they have ended, well or not."""
    if not started:
        return True
    if ENGINE.value == "local":
        jobs.run_local(started, PARALLEL.value or 1)
        return True
    if ENGINE.value == "slurm":
        submit.run(started, PARALLEL.value, WAIT.value)
        return WAIT.value
    jobset.run(started, common.workdir())
    print("the same command, given when they have ended, gathers the results")
    return False


def _sweep_of(config_file: str) -> Callable:
    path = config_file.partition(":")[0]
    found = runpy.run_path(path).get("sweep")
    if found is None:
        raise ValueError(f"{path} has no sweep(add) beside its get_config(arg)")
    return found


def _flags(overrides: Overrides) -> list[str]:
    def written(value):
        return value if isinstance(value, str) else repr(value)

    return [f"--config.{key}={written(value)}" for key, value in overrides.items()]


if __name__ == "__main__":
    flags.mark_flag_as_required("config")
    common.run(main)
