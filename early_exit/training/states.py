"""Filling a cache of hidden states with the backbone, and tuning from it without.

    STATES/about.json           backbone, text, exit points, K
           00000.array_record   rows (see `data.states`) of a few batches of the training stream
           00000.json           how many, and their SHA-256

The one idea: tuning behind a frozen backbone, all that a step needs of it is the same at each pass
over the text. So it runs once, and runs of any heads at these points start from what it left.
"""

import functools
import hashlib
import itertools
import json
import math
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from early_exit import assemble, sharding, tree
from early_exit import feed as feeds
from early_exit.backbones import base
from early_exit.config import ConfigDict
from early_exit.data import shards, states
from early_exit.data.stream import WHOLE, Share, TrainingBatches
from early_exit.exits.multi_exit import MultiExit
from early_exit.training import schedule
from early_exit.training.observe import observe
from early_exit.training.recipe import Recipe

# A shard is what is lost at most when filling is interrupted.
BATCHES_IN_SHARD = 4
# Positions whose full-vocabulary logits exist at a time.
_ROWS = 128


def fill(
    config: ConfigDict,
    folder: Path,
    *,
    batches: int,
    top_k: int,
    done: Callable[[int], None] = lambda tokens: None,
    share: Share = WHOLE,
) -> None:
    """Runs the config's backbone over the first batches of its training stream, and keeps the rows.

    Makes those shards that are not there yet; of several processes each makes its own, on a mesh of
    its own devices.

    Args:
      config: a run's. Of its exits only the points matter.
      batches: at least how many; the last shard is filled up.
      top_k: K, how many of the teacher's tokens are kept at each position.
      done: called with the tokens of each batch when it is made.

    Raises:
      ValueError: settings that make no states, or not those of the states in the folder.
      OSError: a shard cannot be written.
    """
    if batches < 1:
        raise ValueError(f"batches must be at least 1, not {batches}")
    mesh = sharding.make_mesh(config.mesh, jax.local_devices())
    size = config.data.batch_size
    sharding.row_share(mesh, size)
    pretrained, model = assemble.load_backbone(config)
    if model.config.pools:
        raise ValueError("hidden states are cached for language models; this is a classifier")
    if not model.exits.points:
        raise ValueError("exits.points names no place whose hidden states could be cached")
    if not 0 < top_k <= model.config.vocab_size:
        raise ValueError(f"top_k must lie in 1…{model.config.vocab_size}, not {top_k}")
    model = assemble.for_tuning(config, model)
    feed = feeds.make(config, model.config, pretrained.tokenizer)
    about = {
        "backbone": tree.fingerprint(pretrained.params),
        "vocabulary": _vocabulary(pretrained.tokenizer),
        "text": feed.data_hash("train"),
        "seed": config.seed,
        "sequence_length": config.data.sequence_length,
        "batch_size": size,
        "batches_in_shard": BATCHES_IN_SHARD,
        "points": list(model.exits.points),
        "top_k": top_k,
    }
    shards.begin(folder, about)

    params = base.stack_blocks(pretrained.params) if model.config.scan else pretrained.params
    params = {"backbone": params}
    params = sharding.place(params, sharding.shardings(params, mesh))
    weights = schedule.ExitWeights((1.0,) * len(model.exits.points))
    recipe = Recipe("kl", weights, dtype=config.model.dtype)
    kept = functools.partial(_kept, model=model, recipe=recipe, top_k=top_k)
    run = jax.jit(sharding.under(mesh, kept))

    place = functools.partial(sharding.place_batch, mesh=mesh, rows=size)
    tokens = size * config.data.sequence_length
    stream = feed.training(config.seed)
    try:
        for number in range(math.ceil(batches / BATCHES_IN_SHARD)):
            given = list(itertools.islice(stream, BATCHES_IN_SHARD))
            if number % share.count != share.index or shards.is_finished(folder, number):
                continue
            made = _ahead(lambda batch: batch | run(params, place(batch)), given)
            records = _records(made, lambda: done(tokens))
            shards.write(folder, number, records, {"tokens": tokens * len(given)})
    finally:
        stream.close()


def _kept(params: base.Params, batch: dict, *, model: MultiExit, recipe, top_k: int) -> dict:
    """What a row holds beside the batch's own, for each row of a batch."""
    observed = observe(params, batch, model=model, recipe=recipe)
    backbone = model.bind(params).backbone
    final = backbone.features(observed["last"], observed["context"])
    table = backbone.output_table()

    def teacher(feature):
        values = base.logits(feature, table)
        best, ids = jax.lax.top_k(values, top_k)
        return ids, best - jax.nn.logsumexp(values)

    flat = sharding.by_row(final.reshape(-1, final.shape[-1]))
    found = jax.lax.map(teacher, flat, batch_size=_ROWS)
    ids, log_probs = (x.reshape(*final.shape[:2], top_k) for x in found)
    narrow = jnp.uint16 if model.config.vocab_size <= 2**16 else jnp.int32
    kept = {"teacher_ids": ids.astype(narrow), "teacher_log_probs": log_probs.astype(jnp.float16)}
    for point, hidden in zip(model.exits.points, observed["hidden"], strict=True):
        kept[states.hidden_name(point)] = hidden.astype(jnp.bfloat16)
    return kept


def _ahead(function: Callable, items: Sequence) -> Iterator[Any]:
    """`map`, one item further than asked for: the device works while the host writes."""
    waiting = None
    for item in items:
        coming = function(item)
        if waiting is not None:
            yield waiting
        waiting = coming
    yield waiting


def _records(made: Iterator[dict], done: Callable[[], None]) -> Iterator[bytes]:
    for batch in made:
        batch = {name: np.asarray(array) for name, array in batch.items()}
        for row in range(len(batch["tokens"])):
            yield states.pack({name: array[row] for name, array in batch.items()})
        done()


def size(folder: Path) -> dict[str, float]:
    """How much a cache holds: `rows`, `tokens`, `bytes` on the disk, `bytes_per_token`.

    Raises:
      FileNotFoundError, ValueError: as `shards.Store`.
    """
    store = shards.Store(folder)
    tokens = sum(shard["tokens"] for shard in store.shards.values())
    on_disk = sum(path.stat().st_size for path in folder.glob("*.array_record"))
    return {
        "rows": len(store),
        "tokens": tokens,
        "bytes": on_disk,
        "bytes_per_token": on_disk / tokens,
    }


def _vocabulary(tokenizer: Any) -> str:
    return hashlib.sha256(json.dumps(sorted(tokenizer.get_vocab().items())).encode()).hexdigest()


def opened(config: ConfigDict) -> shards.Store | None:
    """The cache that a run tunes from (`tune.states`), if it suits the settings; None without one.

    Raises:
      FileNotFoundError: nothing there.
      ValueError: settings that it was not made for.
    """
    if not config.tune.get("states"):
        return None
    folder = config.tune.states
    if config.tune.train != "exits":
        raise ValueError(
            f"tune.train={config.tune.train} changes the backbone, and tune.states holds what it "
            "was; use tune.train=exits, or leave tune.states empty"
        )
    store = shards.Store(Path(folder))
    cached = store.about["points"]
    if lacking := [point for point in config.exits.points if point not in cached]:
        raise ValueError(
            f"{folder} has no hidden states after blocks {lacking}, only after {cached}; choose "
            "exits.points among these, or cache others with launch.cache"
        )
    if config.data.sequence_length != store.about["sequence_length"]:
        raise ValueError(
            f"the rows of {folder} have {store.about['sequence_length']} tokens, but "
            f"data.sequence_length={config.data.sequence_length}; set it to theirs"
        )
    if len(store) < config.data.batch_size:
        raise ValueError(
            f"{folder} has {len(store)} rows, fewer than data.batch_size="
            f"{config.data.batch_size}; cache more with launch.cache --batches"
        )
    return store


def check(config: ConfigDict, store: shards.Store, backbone: str, text: str) -> None:
    """Raises ValueError where the cache is not of this backbone (its fingerprint) and this text."""
    folder, about = config.tune.states, store.about
    if about["backbone"] != backbone:
        raise ValueError(
            f"the states in {folder} are of a backbone with fingerprint {about['backbone'][:12]}…, "
            f"but model.source gives {backbone[:12]}… in {config.model.dtype}; name the backbone "
            "they are of, or cache again with launch.cache"
        )
    if about["text"] != text:
        raise ValueError(
            f"the states in {folder} are of another text than the train split of data.source="
            f"{config.data.source}; name that text, or cache again with launch.cache"
        )


def batches(config: ConfigDict, store: shards.Store, share: Share) -> TrainingBatches:
    """The endless training data of one of several processes, as `Feed.training`."""
    return states.training_batches(
        store,
        tuple(config.exits.points),
        batch_size=config.data.batch_size,
        seed=config.seed,
        share=share,
    )


def without_blocks(params: base.Params) -> base.Params:
    """The frozen parameters that heads may read: the backbone's but for its blocks."""
    around = {name: part for name, part in params["backbone"].items() if name != "blocks"}
    return params | {"backbone": around}
