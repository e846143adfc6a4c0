"""What a source holds, from headers alone: its family, config, parameters' shapes and their table.

The one idea: everything that can be wrong with a checkpoint, values apart, is found before any
weight is read, collected, and reported together.
"""

import dataclasses
import math
import re
import types
import typing
from collections.abc import Collection, Sequence
from typing import Any

from early_exit import tree
from early_exit.backbones import base
from early_exit.pretrained import families, sources, table, tensors
from early_exit.pretrained.families import Family
from early_exit.storage import files

# Types of tensors, as safetensors spells them, that hold no weights or are packed; whatever else
# GGUF has (Q4_1, …) comes as float32.
_NOT_READ = re.compile(r"[IU]\d+|BOOL|C\d+|F[468](_.*)?")

# How many blocks there are, in the words of the families' configs.
_DEPTHS = {"num_hidden_layers", "n_layer", "n_layers"}


@dataclasses.dataclass(frozen=True)
class Described:
    """A pretrained network before its weights are read.

    Attributes:
      checkpoint: opened; its headers fit the config.
      config: describes and builds the backbone.
      params: the parameters' shapes.
      entries: where each is read from.
    """

    checkpoint: tensors.Checkpoint
    config: base.BackboneConfig
    params: base.Params
    entries: list[table.Entry]


def describe(source: str) -> Described:
    """Describes a pretrained network; see `sources.fetch` for what `source` may be.

    Raises:
      FileNotFoundError, RuntimeError: the source cannot be had.
      ValueError: the checkpoint is damaged, of an unsupported kind, or does not fit its own config
        (missing, unexpected, misshaped and mistyped tensors are all listed).
    """
    checkpoint = tensors.open_checkpoint(sources.fetch(source))
    family = family_of(checkpoint)
    config, params = _config(checkpoint, family)
    flat = tree.flatten(params)
    usual = family.entries(config)
    entries = table.prefixed(usual, family.PREFIXES, checkpoint.shapes)
    if differ := flat.keys() ^ {path for entry in entries for path in entry.paths}:
        raise ValueError(
            f"the config of {checkpoint.path} describes a network that its family does not have, "
            f"by {', '.join(sorted(differ))}"
        )
    try:
        _check_tensors(checkpoint, entries, flat, family.IGNORED)
    except ValueError as error:
        foreign = _foreign_prefix(checkpoint.shapes, usual, family.PREFIXES)
        if foreign is None:
            raise
        raise ValueError(
            f"{error}\nAll names begin with {foreign!r}, which a wrapper has put before them; save "
            "the tensors without it"
        ) from error
    return Described(checkpoint, config, params, entries)


def family_of(checkpoint: tensors.Checkpoint) -> Family:
    """The family of a checkpoint.

    Raises:
      ValueError: none knows its `model_type`.
    """
    # timm's configs have an `architecture` instead.
    model_type = checkpoint.config.get("model_type", checkpoint.config.get("architecture"))
    known = families.by_model_type()
    if not isinstance(model_type, str) or model_type not in known:
        raise ValueError(
            f"{checkpoint.path} holds a model of type {model_type!r}; supported are "
            f"{', '.join(known)}, and what families.register adds"
        )
    return known[model_type]


def _config(
    checkpoint: tensors.Checkpoint, family: Family
) -> tuple[base.BackboneConfig, base.Params]:
    """The backbone's config and its parameters' shapes.

    A damaged `config.json` may hold anything: numbers as text, nothing where a size is due, a
    billion blocks.
    """
    stored = checkpoint.shapes.values()
    # A network is about as large as its file; nothing is made of a size that is far from it.
    most = 4 * sum(map(math.prod, stored)) + 1000
    try:
        for name in _DEPTHS & checkpoint.config.keys():
            _check_size(checkpoint.config[name], len(stored), "blocks")
        config = families.reading(family, checkpoint.config, checkpoint.shapes)
        hints = typing.get_type_hints(type(config))
        wrong = [
            f"{field.name} = {getattr(config, field.name)!r}"
            for field in dataclasses.fields(config)
            if not _is(getattr(config, field.name), hints[field.name])
        ]
        if wrong:
            raise ValueError(f"it gives {', '.join(wrong)}")
        _check_size(config.depth, len(stored), "blocks")
        _, params = base.described(config)
        _check_size(tree.count(params), most, "parameters")
    except (TypeError, ArithmeticError, AttributeError, LookupError) as error:
        raise ValueError(
            f"the config of {checkpoint.path} has an entry of a wrong kind: {error}"
        ) from error
    except ValueError as error:
        raise ValueError(f"the config of {checkpoint.path} cannot be used: {error}") from error
    return config, params


def _check_size(asked: int, most: int, what: str) -> None:
    if not 1 <= asked <= most:
        raise ValueError(f"it asks for {asked} {what}, for which the tensors are not there")


def _is(value: Any, hint: Any) -> bool:
    """Whether a config's entry is of the type it is declared with; sizes are not negative."""
    if isinstance(hint, types.UnionType):
        return any(_is(value, option) for option in typing.get_args(hint))
    if typing.get_origin(hint) is tuple:
        return isinstance(value, tuple) and all(_is(v, typing.get_args(hint)[0]) for v in value)
    if hint is int:
        return type(value) is int and 0 <= value < 1 << 31
    if hint is float:
        return type(value) in (int, float) and math.isfinite(value)
    return not isinstance(hint, type) or isinstance(value, hint)


def _check_tensors(
    checkpoint: tensors.Checkpoint,
    entries: Sequence[table.Entry],
    wanted: dict[str, Any],
    ignored: Sequence[str],
) -> None:
    """Raises ValueError with all that is wrong, by names and headers alone."""
    problems = []
    for entry in entries:
        ours = [wanted[path].shape for path in entry.paths]
        stored = checkpoint.shapes.get(entry.name)
        if stored is None:
            if not entry.optional:
                shape = list(table.stored_shape(entry, ours))
                problems.append(f"missing: {entry.name} {shape}")
        elif not table.fits(entry, stored, ours):
            shape = list(table.stored_shape(entry, ours))
            problems.append(f"misshaped: {entry.name} {list(stored)}, wanted {shape}")
        elif _NOT_READ.fullmatch(dtype := checkpoint.dtypes[entry.name]):
            problems.append(f"mistyped: {entry.name} {dtype}, wanted {', '.join(files.FLOATS)}")
    known = {entry.name for entry in entries}
    problems += [
        f"unexpected: {name} {list(shape)}"
        for name, shape in checkpoint.shapes.items()
        if name not in known and not any(re.search(pattern, name) for pattern in ignored)
    ]
    if problems:
        raise ValueError(
            f"the tensors of {checkpoint.path} do not fit its config; it is incomplete, or of "
            "another model than its config says:\n  " + "\n  ".join(sorted(problems))
        )


def _foreign_prefix(
    names: Collection[str], entries: Sequence[table.Entry], prefixes: Sequence[str]
) -> str | None:
    """What stands before every name and hides a checkpoint that is whole without it.

    Wrappers leave it there: `module.` (data parallel), `_orig_mod.` (compiled), `language_model.`
    (a part of a larger model), `base_model.model.` (adapters).
    """
    first = next(iter(names), "")
    for prefix in (first[: dot.end()] for dot in re.finditer(r"\.", first)):
        bare = {name.removeprefix(prefix) for name in names if name.startswith(prefix)}
        found = table.prefixed(entries, prefixes, bare)
        if len(bare) == len(names) and all(e.optional or e.name in bare for e in found):
            return prefix
    return None
