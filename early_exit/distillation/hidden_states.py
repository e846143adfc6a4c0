"""Cached hidden states: what a frozen backbone made of a text, as rows to tune exits on.

    STATES/about.json           backbone, text, exit points, K
           00000.array_record   the rows of a few batches of the training stream
           00000.json           how many, and their SHA-256

The one idea: to a head, a row is its tokens, the hidden states where the head stands, and what the
full model would have said. Behind a frozen backbone all three stay the same however often heads are
tuned, so the backbone runs once, and batches of rows are drawn from what it left like examples:
shuffled anew at each pass.

A row holds, for T tokens, `tokens`, `documents` and `positions`, int32 [T]; for each exit point
`hidden_<point>`, bfloat16 [T, D]; and the full model's K most probable next tokens, `teacher_ids`,
uint16 or int32 [T, K], the most probable first, and `teacher_log_probs`, float16 [T, K].
"""

import collections
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
import ml_dtypes
import numpy as np
from safetensors import numpy as safetensors

from early_exit import sharding
from early_exit.backbones import base
from early_exit.backbones.identity import Identity
from early_exit.data import feed as feeds
from early_exit.data import shards
from early_exit.data.stream import ALONE, Rank, TrainingBatches, read_ahead, shuffled
from early_exit.data.transforms import Batch
from early_exit.exits.multi_exit import MultiExit
from early_exit.runs import assemble, lock
from early_exit.settings.sections import Settings
from early_exit.storage import buckets

# Beside the hidden states.
ALWAYS = ("tokens", "documents", "positions", "teacher_ids", "teacher_log_probs")


def hidden_name(point: int) -> str:
    return f"hidden_{point}"


def pack(row: Batch) -> bytes:
    """A row as a record: a safetensors file with the bits of bfloat16 as uint16."""
    bits = {
        name: array.view(np.uint16) if array.dtype == ml_dtypes.bfloat16 else array
        for name, array in row.items()
    }
    return safetensors.save({name: np.ascontiguousarray(array) for name, array in bits.items()})


def unpack(record: bytes, points: Sequence[int]) -> Batch:
    """The row of a record, with the hidden states at some of its exit points."""
    arrays = safetensors.load(record)
    row = {name: arrays[name] for name in ALWAYS}
    for point in points:
        row[hidden_name(point)] = arrays[hidden_name(point)].view(ml_dtypes.bfloat16)
    return row


# A shard is what is lost at most when filling is interrupted.
BATCHES_IN_SHARD = 4
# Positions whose full-vocabulary logits exist at a time.
_ROWS = 128


def fill(
    config: Settings,
    folder: Path,
    *,
    batches: int,
    top_k: int,
    done: Callable[[int], None] = lambda tokens: None,
    rank: Rank = ALONE,
) -> None:
    """Runs the config's backbone over the first batches of its training stream, and keeps the rows.

    Makes those shards that are not there yet; of several processes each makes its own, on its own
    devices, or all make all of them together (`sharding.own_mesh`).

    Args:
      config: a run's. Of its exits only the points matter.
      batches: at least how many; the last shard is filled up.
      top_k: K, how many of the teacher's tokens are kept at each position.
      done: called with the tokens of each batch when it is made.

    Raises:
      ValueError: settings that make no states, or not those of the states in the folder.
      RuntimeError: another command is at work in the folder.
      OSError: a shard cannot be written.
    """
    with lock.held(folder):
        _fill(config, folder, batches, top_k, done, rank)


def _fill(
    config: Settings,
    folder: Path,
    batches: int,
    top_k: int,
    done: Callable[[int], None],
    rank: Rank,
) -> None:
    if batches < 1:
        raise ValueError(f"batches must be at least 1, not {batches}")
    mesh, together = sharding.own_mesh(config.mesh)
    rank = ALONE if together else rank
    size = config.data.batch_size
    sharding.row_rank(mesh, size)
    feeds.check_length(config.data, assemble.abstract_model(config).config)
    where = functools.partial(sharding.shardings, mesh=mesh)
    pretrained, model = assemble.load_backbone(config, where)
    if model.config.classifies:
        raise ValueError("hidden states are cached for language models; this is a classifier")
    if model.config.encodes_prompts:
        raise ValueError(
            "an encoder reads this network's prompts, and a cache of hidden states has no room for "
            "them; tune without tune.hidden_states"
        )
    if not model.exits.observed:
        raise ValueError(
            "neither exits.points nor exits.recurrent_taps names a place whose hidden states could "
            "be cached"
        )
    if not 0 < top_k <= model.config.vocab_size:
        raise ValueError(f"top_k must lie in 1…{model.config.vocab_size}, not {top_k}")
    model = assemble.for_tuning(config, model)
    feed = feeds.make(config, model.config, pretrained.tokenizer)
    about = {
        "backbone": pretrained.identity.known_as(shards.about(folder).get("backbone")),
        "vocabulary": _vocabulary(pretrained.tokenizer),
        "text": feed.data_hash("train"),
        "seed": config.seed,
        "sequence_length": config.data.sequence_length,
        "batch_size": size,
        "batches_in_shard": BATCHES_IN_SHARD,
        "points": list(model.exits.observed),
        "top_k": top_k,
    }
    shards.begin(folder, about)

    params = {"backbone": pretrained.params}
    if model.config.scan:
        _, shapes = base.described(model.config)
        params = {"backbone": base.stack_blocks(pretrained.params, where(shapes))}
    kept = functools.partial(_kept, model=model, top_k=top_k)
    run = jax.jit(sharding.under(mesh, kept))

    place = functools.partial(sharding.place_rows, mesh=mesh)
    tokens = size * config.data.sequence_length
    stream = feed.training(config.seed)
    try:
        for number in range(math.ceil(batches / BATCHES_IN_SHARD)):
            given = list(itertools.islice(stream, BATCHES_IN_SHARD))
            finished = shards.is_finished(folder, number)
            finished = sharding.agreed(finished) if together else finished
            if number % rank.count != rank.index or finished:
                continue
            made = _ahead(lambda batch: batch | run(params, place(batch)), given)
            records = _records(made, lambda: done(tokens))
            if together and jax.process_index():  # which only does its part of the work
                collections.deque(records, maxlen=0)
                continue
            shards.write(folder, number, records, {"tokens": tokens * len(given)})
    finally:
        stream.close()


def _kept(params: base.Params, batch: dict, *, model: MultiExit, top_k: int) -> dict:
    """What a row holds beside the batch's own, for each row of a batch."""
    bound = model.bind(params)
    backbone, points = bound.backbone, model.exits.observed
    hidden, context = backbone.stem(batch)
    stops = sorted({*points, model.config.depth})
    states = dict(zip(stops, bound.hidden_at_exits(hidden, context, stops), strict=True))
    final = backbone.features(states[model.config.depth], context)
    table = backbone.output_table()

    def teacher(feature, table):
        values = base.logits(feature, table, rule=model.config.logit_rule)
        best, ids = jax.lax.top_k(values, top_k)
        return ids, best - jax.nn.logsumexp(values)

    flat = sharding.by_row(final.reshape(-1, final.shape[-1]))
    found = sharding.map_rows(teacher, flat, table, _ROWS)
    ids, log_probs = (x.reshape(*final.shape[:2], top_k) for x in found)
    narrow = jnp.uint16 if model.config.vocab_size <= 2**16 else jnp.int32
    kept = {"teacher_ids": ids.astype(narrow), "teacher_log_probs": log_probs.astype(jnp.float16)}
    for point in points:
        kept[hidden_name(point)] = states[point].astype(jnp.bfloat16)
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
        batch = sharding.fetch(batch)
        for row in range(len(batch["tokens"])):
            yield pack({name: array[row] for name, array in batch.items()})
        done()


def size(folder: Path) -> dict[str, float]:
    """How much a cache holds: `rows`, `tokens`, `bytes` on the disk, `bytes_per_token`.

    Raises:
      FileNotFoundError, ValueError: as `shards.Store`.
    """
    store = shards.Store(folder)
    tokens = sum(shard["tokens"] for shard in store.shards.values())
    return {
        "rows": len(store),
        "tokens": tokens,
        "bytes": store.bytes,
        "bytes_per_token": store.bytes / tokens,
    }


def _vocabulary(tokenizer: Any) -> str:
    return hashlib.sha256(json.dumps(sorted(tokenizer.get_vocab().items())).encode()).hexdigest()


def opened(config: Settings) -> shards.Store | None:
    """The cache that a run tunes from, if it suits the settings; None without `tune.hidden_states`.

    Raises:
      FileNotFoundError: nothing there.
      ValueError: settings that it was not made for.
    """
    folder = config.tune.hidden_states
    if not folder:
        return None
    store = shards.Store(buckets.place(folder))
    cached = store.about["points"]
    read = assemble.exit_config(config).observed
    if lacking := [point for point in read if point not in cached]:
        raise ValueError(
            f"{folder} has no hidden states after blocks {lacking}, only after {cached}; choose "
            "exits.points and exits.recurrent_taps among these, or cache others with launch.cache"
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


def check(config: Settings, store: shards.Store, backbone: Identity, text: str) -> None:
    """Raises ValueError where the cache is not of this backbone and this text."""
    folder, about = config.tune.hidden_states, store.about
    if not backbone.is_named(about["backbone"]):
        raise ValueError(
            f"the states in {folder} are of a backbone with fingerprint {about['backbone'][:12]}…, "
            f"but model.source gives {str(backbone)[:12]}… in {config.model.dtype}; name the "
            "backbone they are of, or cache again with launch.cache"
        )
    if about["text"] != text:
        raise ValueError(
            f"the states in {folder} are of another text than the train split of data.source="
            f"{config.data.source}; name that text, or cache again with launch.cache"
        )


def training_batches(
    store: shards.Store,
    points: Sequence[int],
    *,
    batch_size: int,
    seed: int,
    num_threads: int = 2,
    rank: Rank = ALONE,
) -> TrainingBatches:
    """Batches without end; each pass over the rows has an order of its own.

    Args:
      points: whose hidden states a batch holds.
      batch_size: B, rows over all processes together.
      rank: whose rows to return.

    Raises:
      ValueError: sizes that make no batches; later, a damaged record.
    """

    def read(chosen: Batch) -> Batch:
        rows = [unpack(store[index], points) for index in chosen["rows"]]
        return {name: np.stack([row[name] for row in rows]) for name in rows[0]}

    chosen = shuffled(len(store), batch_size, seed, rank)
    return TrainingBatches(chosen.map(read).to_iter_dataset(read_ahead(num_threads)))


def without_blocks(params: base.Params) -> base.Params:
    """The frozen parameters that heads may read: the backbone's but for its blocks."""
    around = {name: part for name, part in params["backbone"].items() if name != "blocks"}
    return params | {"backbone": around}
