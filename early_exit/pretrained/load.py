"""From a source string to a backbone's config, parameters and tokenizer.

The one idea: everything that can be wrong with names, shapes and types is found in headers (see
`describe`); only then are weights read, one tensor at a time, each straight to its devices.
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from early_exit import tree
from early_exit.backbones import base, identity
from early_exit.pretrained import generation, preprocessor, table, tensors
from early_exit.pretrained.describe import Described, describe
from early_exit.pretrained.generation import Generation
from early_exit.pretrained.tokenizer import load_tokenizer


@dataclasses.dataclass(frozen=True)
class Pretrained:
    """A pretrained network.

    Attributes:
      config: describes and builds the backbone.
      params: the backbone's parameters, nested dicts of arrays.
      tokenizer: a `transformers` fast tokenizer; None if a folder has none.
      source: the string it was loaded from.
      generation: how it is to write; which tokens end an answer.
      known: its identity, where somebody has worked it out already.
      preprocessor: what its `preprocessor_config.json` holds, if it reads images and has one.
    """

    config: base.BackboneConfig
    params: base.Params
    tokenizer: Any
    source: str
    generation: Generation = generation.SILENT
    known: identity.Identity | None = None
    preprocessor: Mapping[str, Any] | None = None

    @functools.cached_property
    def identity(self) -> identity.Identity:
        """Which network it is. Reads every weight, but only the first time."""
        return self.known or identity.of(self.config, self.params)


def load(
    source: str,
    dtype: jax.typing.DTypeLike = jnp.float32,
    shardings: Callable[[base.Params], Any] | None = None,
) -> Pretrained:
    """Loads a pretrained network; see `sources.fetch` for what `source` may be.

    Args:
      dtype: floating-point type of the parameters.
      shardings: the parameters' shapes → a tree of shardings like them, such as
        `functools.partial(sharding.shardings, mesh=mesh)`; without it, one device has them all.

    Raises:
      FileNotFoundError, RuntimeError: the source cannot be had.
      ValueError: the checkpoint is damaged, of an unsupported kind, or does not fit its own config
        (missing, unexpected and misshaped tensors are all listed), the tokenizer or a token that
        ends an answer does not fit the embedding table, or a weight is not finite.
    """
    found = describe(source)
    checkpoint, bare = found.checkpoint, _announced(found, source)
    places = {} if shardings is None else tree.flatten(shardings(found.params))
    params, slices = {}, {}
    for entry in found.entries:
        for path, array in () if entry.optional else _read(checkpoint, entry, dtype):
            if entry.slice is not None:
                array = _stacked(slices, found.params, path, entry.slice, array)
            if array is not None:
                params[path] = _place(array, places.get(path))
    for entry in found.entries:
        if entry.optional and entry.name in checkpoint.shapes:
            _check_equal(checkpoint, entry, params, dtype)
    return dataclasses.replace(bare, params=tree.unflatten(params))


def announced(source: str) -> Pretrained:
    """What `load` gives, without parameters: no weight is read.

    Raises:
      as `load`, of what headers, config and tokenizer say.
    """
    return _announced(describe(source), source)


def _announced(found: Described, source: str) -> Pretrained:
    checkpoint, vocab_size = found.checkpoint, getattr(found.config, "vocab_size", 0)
    tokenizer = load_tokenizer(checkpoint.path, checkpoint.config)
    if tokenizer is not None and vocab_size:
        _check_tokenizer(tokenizer, vocab_size, checkpoint)
    writes = generation.SILENT
    if not found.config.classifies:
        writes = generation.read(checkpoint.path, checkpoint.config, tokenizer, vocab_size)
    said = preprocessor.read(checkpoint.path) if found.config.reads == "images" else None
    return Pretrained(found.config, {}, tokenizer, source, writes, preprocessor=said)


def _check_tokenizer(tokenizer, vocab_size: int, checkpoint: tensors.Checkpoint) -> None:
    """Fewer tokens than rows are usual (tables are padded); more cannot be looked up."""
    tokens = max(tokenizer.get_vocab().values()) + 1
    if tokens > vocab_size:
        raise ValueError(
            f"the tokenizer of {checkpoint.path} has {tokens} tokens, but the embedding table has "
            f"{vocab_size} rows; it belongs to another model"
        )


def _read(checkpoint: tensors.Checkpoint, entry: table.Entry, dtype):
    """(our path, array) of every parameter that a tensor holds."""
    array = checkpoint.read(entry.name)
    with np.errstate(over="ignore"):  # what overflows the dtype is reported below
        array = array.astype(dtype, copy=False)
    if not np.isfinite(array).all():
        raise ValueError(
            f"{entry.name} of {checkpoint.path} holds NaN or infinite values as {array.dtype}; the "
            "file is damaged, or the dtype too narrow"
        )
    return zip(entry.paths, entry.layout.split(array), strict=True)


def _stacked(
    slices: dict[str, list], shapes: base.Params, path: str, index: int, array: np.ndarray
) -> np.ndarray | None:
    """A parameter once all its slices are there; until then they are kept in `slices`."""
    count = tree.flatten(shapes)[path].shape[0]
    kept = slices.setdefault(path, [None] * count)
    kept[index] = array
    return None if any(part is None for part in kept) else np.stack(slices.pop(path))


def _place(array: np.ndarray, sharding: jax.sharding.Sharding | None) -> jax.Array:
    # A copy in any case: jax may otherwise keep a view of a buffer that it does not own.
    if sharding is None:
        return jax.device_put(array, may_alias=False)  # without a program for each shape
    return jax.make_array_from_callback(
        array.shape, sharding, lambda index: np.array(array[index], order="C")
    )


def _check_equal(checkpoint: tensors.Checkpoint, entry: table.Entry, params, dtype) -> None:
    for path, array in _read(checkpoint, entry, dtype):
        # This process's parts of it; other processes compare theirs.
        parts = params[path].addressable_shards
        if not all(np.array_equal(array[part.index], part.data) for part in parts):
            raise ValueError(
                f"{entry.name} of {checkpoint.path} is tied to {path} by the config, but differs; "
                "the config (tie_word_embeddings) is wrong"
            )
