"""Tunes the exits of a pretrained model; goes on where a killed run stopped.

    python -m launch.tune --config=configs/smollm2_135m.py:head=mlp --workdir=runs/smollm2
    python -m launch.tune … --profile=10:12     # a trace of these steps, for TensorBoard

Alone, or as one process of several (see `launch.processes`). Asked to leave by SIGTERM, it saves
and leaves with status 75. At the end, prints a row per exit on held-out data, and one per draft of
a recurrent exit; the same numbers and more are in the folder's metrics.
"""

import itertools
import re
import sys

import jax
from absl import flags

from early_exit.runs.metrics import table
from early_exit.storage import buckets
from early_exit.training.loop import tune
from launch import common, processes

PROFILE = flags.DEFINE_string(
    "profile", None, "START:STOP, the first and the last step to trace with jax.profiler."
)


def main(argv):
    common.no_arguments(argv)
    config, profile = common.settings(), steps_of(PROFILE.value)
    if profile:
        buckets.here(common.WORKDIR.value, "the folder of a run that is traced")
    processes.initialize()
    common.tell_devices()
    rows = tune(config, common.workdir(), profile, tell=_tell)
    if jax.process_index():
        return
    for names, same in itertools.groupby(rows, tuple):  # exits, then a recurrent exit's drafts
        print(table([row.values() for row in same], header=names))
    print(f"tuned exits in {common.workdir()}")


def _tell(text: str) -> None:
    if not jax.process_index():
        print(text, file=sys.stderr, flush=True)


def steps_of(text: str | None) -> tuple[int, int] | None:
    """`10:12` → (10, 12).

    Raises:
      ValueError: no such pair.
    """
    if text is None:
        return None
    if not re.fullmatch(r"\d+:\d+", text):
        raise ValueError(f"--profile={text} is not START:STOP, two steps such as 10:12")
    start, stop = map(int, text.split(":"))
    return start, stop


if __name__ == "__main__":
    flags.mark_flag_as_required("config")
    common.run(main)
