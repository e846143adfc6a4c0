"""The families of networks that are known, each a module, and the one place where they are named.

The one idea: nothing about a family is known but by its own module, and nothing asks which it is.
So a new one is a module, and either a line in `_OWN`, a call of `register`, or, for a package that
is installed beside this one, an entry point in the group `early_exit.families` that names it.
"""

import dataclasses
import functools
import importlib
import importlib.metadata
import json
from collections.abc import Callable, Collection, Iterable, Mapping
from typing import Any, Protocol

from early_exit.backbones import base
from early_exit.pretrained.table import Entry

_OWN = (
    *("llama", "olmo2", "smollm3", "granite", "phi3", "gemma"),
    *("mixtral", "experts", "gpt2", "neox", "t5"),
    *("bert", "roberta", "distilbert", "electra", "modernbert", "deberta"),
    *("resnet", "torchvision", "mobilenet_v2", "efficientnet", "convnext", "vit", "deit"),
)
_ENTRY_POINTS = "early_exit.families"
# Where a `config.json` has what no family of transformers can say. Other readers pass it over.
_UNSAID = "early_exit"


class Family(Protocol):
    """What a family's module has.

    Attributes:
      MODEL_TYPES: the values of `model_type` that it serves.
      PREFIXES: of tensors' names, under which transformers may store the network; the first is the
        one it is exported with.
      IGNORED: regexes found in the names of tensors that are not needed.
      NEW: `model.new.family` → what makes a config of the other entries of `model.new`. Optional.
    """

    MODEL_TYPES: Collection[str]
    PREFIXES: Collection[str]
    IGNORED: Collection[str]

    def config(self, hf: dict[str, Any]) -> base.BackboneConfig:
        """A `config.json` as a backbone's config; ValueError names all that is not supported."""

    def to_hf(self, config: base.BackboneConfig) -> dict[str, Any]:
        """Its inverse; ValueError or AttributeError for what the family cannot be."""

    def entries(self, config: base.BackboneConfig) -> list[Entry]:
        """Every tensor of a checkpoint."""

    # Optional: adapted(config, names) → the config, where a `config.json` leaves something open
    # that the tensors' names tell; nearest(config) → the config of a network that transformers has
    # and whose tensors are among this one's.


_REQUIRED = ("MODEL_TYPES", "PREFIXES", "IGNORED", "config", "to_hf", "entries")
_known: list[Family] = []


def register(family: Family) -> Family:
    """Makes a family known; the same one twice is known once.

    Raises:
      ValueError: it lacks a name, or serves what another one serves.
    """
    _load_all()
    return _add(family)


def _add(family: Family) -> Family:
    name = getattr(family, "__name__", repr(family))
    if lacking := [required for required in _REQUIRED if not hasattr(family, required)]:
        raise ValueError(f"the family {name} lacks {', '.join(lacking)} (see families.Family)")
    if family in _known:
        return family
    for other in _known:
        twice = {*family.MODEL_TYPES, *_new(family)} & {*other.MODEL_TYPES, *_new(other)}
        if twice:
            raise ValueError(
                f"the family {name} serves {', '.join(sorted(twice))}, as {other.__name__} does"
            )
    _known.append(family)
    return family


@functools.cache
def _load_all() -> None:
    """The project's own families, and those of packages that are installed beside it.

    Raises:
      RuntimeError: such a package cannot be imported.
    """
    for name in _OWN:
        _add(importlib.import_module(f"early_exit.pretrained.{name}"))
    for point in importlib.metadata.entry_points(group=_ENTRY_POINTS):
        try:
            _add(point.load())
        except (ImportError, AttributeError) as error:
            raise RuntimeError(
                f"the family {point.name} ({point.value}) cannot be loaded: {error}; mend or "
                "uninstall the package that has it"
            ) from error


def every() -> tuple[Family, ...]:
    """All families, the project's own first."""
    _load_all()
    return tuple(_known)


def _new(family: Family) -> Mapping[str, Callable[..., base.BackboneConfig]]:
    return getattr(family, "NEW", {})


def by_model_type() -> dict[str, Family]:
    """`model_type` → the family that serves it."""
    return {name: family for family in every() for name in family.MODEL_TYPES}


def new_networks() -> dict[str, Callable[..., base.BackboneConfig]]:
    """`model.new.family` → what makes its config."""
    return {name: make for family in every() for name, make in _new(family).items()}


def reading(family: Family, hf: Mapping[str, Any], names: Iterable[str]) -> base.BackboneConfig:
    """The config that a `config.json` describes, beside tensors of these names.

    Raises:
      ValueError: entries are missing, or ask for what the backbone does not do.
    """
    config = _adapted(family, family.config(dict(hf)), names)
    if unsaid := hf.get(_UNSAID):
        try:
            return dataclasses.replace(config, **unsaid)
        except TypeError as error:
            raise ValueError(f"its entry {_UNSAID!r} = {unsaid!r} does not fit: {error}") from error
    return config


def writing(config: base.BackboneConfig) -> tuple[Family, dict[str, Any]]:
    """The family that can be a network, and the `config.json` whose `reading` is its config.

    What transformers cannot say stands in an entry of its own, beside the nearest network that it
    can: there, what it computes up to the last block is the same.

    Raises:
      ValueError: there is no such family.
    """
    reasons = []
    for nearest in (False, True):
        for family in every():
            try:
                hf = _written(family, config, nearest)
            except (AttributeError, TypeError):  # a config of another class: no reason to tell
                continue
            except (ValueError, KeyError) as error:
                reasons.append(str(error))
                continue
            if hf is not None:
                return family, hf
    raise ValueError(
        "; ".join([f"no family of transformers has a config that says {config}", *reasons])
    )


def _written(family: Family, config: base.BackboneConfig, nearest: bool) -> dict[str, Any] | None:
    """The family's `config.json` for a network; None if it says another one."""
    if nearest and not hasattr(family, "nearest"):
        return None
    sayable = family.nearest(config) if nearest else config
    hf = json.loads(json.dumps(family.to_hf(sayable)))
    if reading(family, hf, _names(family, sayable)) != sayable:
        return None
    said = reading(family, hf, _names(family, config))
    if said != config:
        hf[_UNSAID] = {
            field.name: getattr(config, field.name)
            for field in dataclasses.fields(config)
            if getattr(config, field.name) != getattr(said, field.name)
        }
    return hf


def _names(family: Family, config: base.BackboneConfig) -> list[str]:
    return [entry.name for entry in family.entries(config)]


def _adapted(
    family: Family, config: base.BackboneConfig, names: Iterable[str]
) -> base.BackboneConfig:
    return family.adapted(config, names) if hasattr(family, "adapted") else config
