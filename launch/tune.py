"""Tunes the exits of a pretrained model; goes on where a killed run stopped.

    python -m launch.tune --config=configs/smollm2_135m.py:head=mlp --workdir=runs/smollm2

Alone, or as one process of several (see `launch.processes`). Asked to leave by SIGTERM, it saves
and leaves with status 75. At the end, prints a row per exit on held-out data; the same numbers and
more are in the folder's metrics.
"""

import jax
from absl import flags

from early_exit.metrics import table
from early_exit.training.loop import tune
from launch import common, processes


def main(argv):
    common.no_arguments(argv)
    processes.initialize()
    rows = tune(common.CONFIG.value, common.workdir())
    if jax.process_index():
        return
    print(table([row.values() for row in rows], header=list(rows[0])))
    print(f"tuned exits in {common.workdir()}")


if __name__ == "__main__":
    flags.mark_flag_as_required("config")
    common.run(main)
