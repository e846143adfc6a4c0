"""Runs the batch that broke a tuning run once more, from the last good checkpoint, and says why.

    python -m launch.replay --workdir=runs/smollm2
    python -m launch.replay --workdir=runs/smollm2 --batch=runs/smollm2/bad_batch_120.npz

A run that meets a loss or a gradient that is not finite leaves the batch in its folder. Prints the
loss of every exit, the norm of each part's gradient, and what is not finite; changes nothing. On
other devices than the run's, name its --config, with another mesh.
"""

from absl import flags

from early_exit.runs import layout
from early_exit.runs.metrics import table
from early_exit.storage import buckets
from early_exit.training import bad_batch, replay
from launch import common

BATCH = flags.DEFINE_string(
    "batch", None, "The batch's file; by default the newest bad_batch_<step>.npz of the run."
)


def main(argv):
    common.no_arguments(argv)
    workdir = common.workdir()
    config = common.settings() or layout.load_config(workdir)
    path = buckets.place(BATCH.value) if BATCH.value else bad_batch.newest(workdir)
    found = replay.replay(config, workdir, path)
    print(f"the batch of step {found.step}, on the parameters of step {found.checkpoint}\n")
    print(table(found.losses.items(), header=("loss", "")))
    print(f"\n{table(found.gradient_norms.items(), header=('gradient norm', ''))}")
    print(f"\nfirst parameter that is not finite: {found.parameter or 'none'}")
    print(f"first gradient that is not finite: {found.gradient or 'none'}")
    print(f"\n{found.verdict()}")


if __name__ == "__main__":
    common.run(main)
