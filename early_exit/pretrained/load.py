"""From a source string to a backbone's config, parameters and tokenizer.

The one idea: everything that can be wrong is found in headers, collected, and reported together;
only then are weights read, one tensor at a time.
"""

import collections
import dataclasses
import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from early_exit import tree
from early_exit.backbones import base
from early_exit.pretrained import llama, sources, tensors
from early_exit.pretrained.tokenizer import load_tokenizer

# `model_type` → the module with the family's `config` and `rules`.
FAMILIES = {"llama": llama}

# Our path → the (tensor name, order of axes) it is read from; usually one.
_Plan = dict[str, list[tuple[str, tuple[int, ...] | None]]]


@dataclasses.dataclass(frozen=True)
class Pretrained:
    """A pretrained network.

    Attributes:
      config: describes and builds the backbone.
      params: the backbone's parameters, nested dicts of arrays.
      tokenizer: a `transformers` fast tokenizer; None if a folder has none.
      source: the string it was loaded from.
    """

    config: base.BackboneConfig
    params: base.Params
    tokenizer: Any
    source: str


def load(source: str, dtype: jax.typing.DTypeLike = jnp.float32) -> Pretrained:
    """Loads a pretrained network; see `sources.fetch` for what `source` may be.

    Args:
      dtype: floating-point type of the parameters.

    Raises:
      FileNotFoundError, RuntimeError: the source cannot be had.
      ValueError: the checkpoint is damaged, of an unsupported kind, or does not fit its own config
        (missing, unexpected and misshaped tensors are all listed), the tokenizer does not fit the
        embedding table, or a weight is not finite.
    """
    checkpoint = tensors.open_checkpoint(sources.fetch(source))
    model_type = checkpoint.config.get("model_type")
    if model_type not in FAMILIES:
        raise ValueError(
            f"{checkpoint.path} holds a model of type {model_type!r}; supported are "
            f"{', '.join(FAMILIES)}"
        )
    config = FAMILIES[model_type].config(checkpoint.config)
    _, abstract = base.abstract(config.build)
    plan = _plan(checkpoint, FAMILIES[model_type].rules(config), tree.flatten(abstract))
    tokenizer = load_tokenizer(checkpoint.path)
    if tokenizer is not None:
        _check_tokenizer(tokenizer, config.vocab_size, checkpoint)
    params = {path: _read(checkpoint, path, origins, dtype) for path, origins in plan.items()}
    return Pretrained(config, tree.unflatten(params), tokenizer, source)


def _plan(checkpoint: tensors.Checkpoint, rules, targets: dict[str, Any]) -> _Plan:
    """Where every parameter is read from, by names and shapes alone."""
    plan: _Plan = collections.defaultdict(list)
    problems = []
    for name, shape in sorted(checkpoint.shapes.items()):
        found = next(((m, rule) for rule in rules if (m := re.fullmatch(rule[0], name))), None)
        if found is None:
            problems.append(f"unexpected: {name} {list(shape)}")
            continue
        match, (_, template, axes) = found
        if template is None:
            continue
        path = match.expand(template)
        if path not in targets:
            problems.append(f"unexpected: {name} {list(shape)}")
            continue
        plan[path].append((name, axes))
        ours = tuple(shape[a] for a in axes) if axes and len(axes) == len(shape) else shape
        if ours != targets[path].shape:
            problems.append(
                f"misshaped: {name} {list(shape)}, wanted for {path} {list(targets[path].shape)}"
                f"{' transposed' if axes else ''}"
            )
    problems += [
        f"missing: what becomes {path} {list(leaf.shape)}"
        for path, leaf in targets.items()
        if path not in plan
    ]
    if problems:
        raise ValueError(
            f"the tensors of {checkpoint.path} do not fit its config; it is incomplete, or of "
            "another model than its config says:\n  " + "\n  ".join(sorted(problems))
        )
    return plan


def _check_tokenizer(tokenizer, vocab_size: int, checkpoint: tensors.Checkpoint) -> None:
    """Fewer tokens than rows are usual (tables are padded); more cannot be looked up."""
    tokens = max(tokenizer.get_vocab().values()) + 1
    if tokens > vocab_size:
        raise ValueError(
            f"the tokenizer of {checkpoint.path} has {tokens} tokens, but the embedding table has "
            f"{vocab_size} rows; it belongs to another model"
        )


def _read(checkpoint: tensors.Checkpoint, path: str, origins, dtype) -> jax.Array:
    (name, axes), *duplicates = origins
    array = checkpoint.read(name)
    for other, _ in duplicates:
        if not np.array_equal(array, checkpoint.read(other)):
            raise ValueError(
                f"{name} and {other} of {checkpoint.path} both stand for {path}, but differ; the "
                "config (tie_word_embeddings) is wrong"
            )
    with np.errstate(over="ignore"):  # what overflows the dtype is reported below
        array = array.astype(dtype)
    if not np.isfinite(array).all():
        raise ValueError(
            f"{name} of {checkpoint.path} holds NaN or infinite values as {array.dtype}; the file "
            "is damaged, or the dtype too narrow"
        )
    # A copy in any case: jax may otherwise keep a view of a buffer that it does not own.
    return jnp.array(array if axes is None else array.transpose(axes))
