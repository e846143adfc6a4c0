"""Runs every setting of a config's `sweep(add)`, and gathers what they found in one table.

    python -m launch.sweep --config=configs/smollm2_135m.py:runlocal --workdir=runs/sweep
    python -m launch.sweep --config=configs/tiny.py --config.tune.steps=24 --workdir=runs/tiny_sweep

Every run is a `launch.tune` with a folder of its own in --workdir. Finished runs are skipped, so
a sweep that was stopped goes on when started again. Writes results.jsonl.
"""

import json
import runpy
import sys
from collections.abc import Callable

from absl import flags
from ml_collections import config_flags

from early_exit.config import Overrides
from early_exit.metrics import table
from early_exit.training import sweep
from launch import common

ENGINE = flags.DEFINE_enum("engine", "local", list(sweep.ENGINES), "What runs the runs.")


def main(argv):
    common.no_arguments(argv)
    flag = flags.FLAGS["config"]
    config_file = config_flags.get_config_filename(flag)
    fixed = config_flags.get_override_values(flag)
    runs = sweep.expand(_sweep_of(config_file), common.CONFIG.value, common.workdir())
    if twice := sorted(fixed.keys() & {key for run in runs for key in run.overrides}):
        raise ValueError(f"the sweep itself sets {', '.join(twice)}; leave it out of the flags")

    left = [run for run in runs if not run.is_finished]
    print(f"{len(runs)} runs, {len(runs) - len(left)} of them finished before")
    tune = [sys.executable, "-m", "launch.tune", f"--config={config_file}"]
    sweep.ENGINES[ENGINE.value](
        [
            ([*tune, *_flags(fixed | run.overrides), f"--workdir={run.folder}"], run.log)
            for run in left
        ]
    )

    rows = [row for run in runs if run.is_finished for row in run.results()]
    results = common.workdir() / "results.jsonl"
    results.write_text("".join(json.dumps(row) + "\n" for row in rows))
    columns = list(dict.fromkeys(key for row in rows for key in row))
    if rows:
        print(table([[row.get(key) for key in columns] for row in rows], header=columns))
    print(f"results in {results}")
    if failed := [run for run in runs if not run.is_finished]:
        logs = "".join(f"\n  {run.log}" for run in failed)
        sys.exit(f"{len(failed)} of {len(runs)} runs did not finish; their logs:{logs}")


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
