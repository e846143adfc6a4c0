"""Runs a config's backbone over its training text once, so that any number of heads tune without.

    python -m launch.cache --config=configs/smollm2_135m.py --hidden_states=states/smollm2
    python -m launch.tune --config=configs/smollm2_135m.py \\
        --config.tune.hidden_states=states/smollm2 --workdir=runs/a

Stores the hidden states at the config's exit points and the full model's most probable tokens.
Interrupted, the same command goes on where it was; on a finished cache it checks every shard.
Alone, or as one process of several (see `launch.processes`): each makes shards of its own, or all
make all of them, where the model needs the devices of several (`mesh.*`).
"""

import math
import time

import jax
from absl import flags
from jax.experimental import multihost_utils

from early_exit import sharding
from early_exit.data import shards
from early_exit.data.stream import ALONE, Rank
from early_exit.distillation import hidden_states
from early_exit.runs.metrics import table
from early_exit.runs.progress import Progress
from early_exit.storage import buckets
from early_exit.training import preemption
from launch import common, processes

STATES = flags.DEFINE_string("hidden_states", None, "Folder of the cache.")
BATCHES = flags.DEFINE_integer(
    "batches",
    None,
    "At least so many batches; if absent, as many as the config tunes for.",
    lower_bound=1,
)
TOP_K = flags.DEFINE_integer(
    "top_k", 64, "Tokens of the full model's kept at each position.", lower_bound=1
)


def main(argv):
    common.no_arguments(argv)
    config, folder = common.settings(), buckets.place(STATES.value)
    processes.initialize()
    preemption.leave_at_once()
    common.own(folder)
    common.tell_devices()
    batches = config.tune.steps if BATCHES.value is None else BATCHES.value
    _, together = sharding.own_mesh(config.mesh)
    rank = ALONE if together else Rank(jax.process_index(), jax.process_count())
    numbers = range(math.ceil(batches / hidden_states.BATCHES_IN_SHARD))
    finished = sum(shards.is_finished(folder, number) for number in numbers)
    began, made = time.perf_counter(), 0
    total, before = (hidden_states.BATCHES_IN_SHARD * count for count in (len(numbers), finished))
    with Progress(total, "batches", done=before, description="caching") as bar:

        def done(tokens: int) -> None:
            nonlocal made
            made += tokens
            bar.update(rank.count)

        hidden_states.fill(config, folder, batches=batches, top_k=TOP_K.value, done=done, rank=rank)
    seconds = time.perf_counter() - began
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices("filled")
    if jax.process_index():
        return
    store = shards.Store(folder)
    store.verify()
    size = hidden_states.size(folder)
    rows = [
        ("hidden states after", ", ".join(map(str, store.about["points"]))),
        ("rows", size["rows"]),
        ("tokens", size["tokens"]),
        ("bytes per token", size["bytes_per_token"]),
        ("MiB", size["bytes"] / 2**20),
        ("tokens/s", made * rank.count / seconds if made else None),
    ]
    print(table(rows, header=("cache", "")))
    print(f"states in {folder}")


if __name__ == "__main__":
    flags.mark_flags_as_required(["config", "hidden_states"])
    common.run(main, on_run=False, configured=True)
