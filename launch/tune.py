"""Tunes the exits of a pretrained model; goes on where a killed run stopped.

python -m launch.tune --config=configs/smollm2_135m.py:head=mlp --workdir=runs/smollm2
"""

from absl import flags
from ml_collections import config_flags

from early_exit.metrics import table
from early_exit.training.loop import tune
from launch import common

CONFIG = config_flags.DEFINE_config_file("config", None, "The run's settings.")


def main(argv):
    common.no_arguments(argv)
    rows = tune(CONFIG.value, common.workdir())
    print(table([row.values() for row in rows], header=list(rows[0])))
    print(f"tuned exits in {common.workdir()}")


if __name__ == "__main__":
    flags.mark_flag_as_required("config")
    common.run(main)
