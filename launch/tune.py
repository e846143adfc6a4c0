"""Tunes the exits of a pretrained model; goes on where a killed run stopped.

    python -m launch.tune --config=configs/smollm2_135m.py:head=mlp --workdir=runs/smollm2

Prints a row per exit on held-out text; the same numbers and more are in the folder's metrics.
"""

from absl import flags

from early_exit.metrics import table
from early_exit.training.loop import tune
from launch import common


def main(argv):
    common.no_arguments(argv)
    rows = tune(common.CONFIG.value, common.workdir())
    print(table([row.values() for row in rows], header=list(rows[0])))
    print(f"tuned exits in {common.workdir()}")


if __name__ == "__main__":
    flags.mark_flag_as_required("config")
    common.run(main)
