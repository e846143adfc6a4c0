"""Which network it is: its weights, and the settings that make a function of them.

The one idea: the same weights under another norm epsilon or other rotary frequencies are another
network, on which heads, policies and hidden states are worth nothing. How a network is run or
stored, in a loop or block by block, says nothing about which it is.
"""

import dataclasses
import hashlib
import json
from collections.abc import Callable
from typing import Any

import numpy as np

from early_exit import sharding, tree
from early_exit.backbones import base

# What names begin with. Those of the first form, without one, are of the weights alone.
_FORM = "2:"
# Of numbers: as many as float32 keeps, in which some files have what others have as text.
_DIGITS = 6


@dataclasses.dataclass(frozen=True)
class Identity:
    """What a network is known by; as a string, `2:` and 64 hexadecimal digits.

    Attributes:
      weights: SHA-256 (hex) of its parameters (`tree.fingerprint`).
      config: SHA-256 (hex) of the settings that change what it computes.
    """

    weights: str
    config: str

    def __str__(self) -> str:
        return _FORM + _sha256(f"{self.weights} {self.config}")

    def is_named(self, name: Any) -> bool:
        """Whether a saved name is this network's, in this form or in the first."""
        return name in (str(self), self.weights)

    def known_as(self, name: Any) -> str:
        """The saved name if it is this network's, else the name that is saved today."""
        return name if self.is_named(name) else str(self)


def of(
    config: base.BackboneConfig,
    params: base.Params,
    read: Callable[[Any], np.ndarray] = sharding.whole,
) -> Identity:
    """The identity of a network; reads every weight once.

    Args:
      params: in the layout that is not stacked (`base.unstack_blocks`).
      read: leaf → the whole array.
    """
    described = json.dumps(_described(config), sort_keys=True)
    return Identity(tree.fingerprint(params, read), _sha256(described))


def _described(value: Any) -> Any:
    """A config as JSON, without what leaves the network as it is and what has its default: so
    settings that are added later change no name."""
    if dataclasses.is_dataclass(value):
        incidental = getattr(value, "incidental", ())
        settings = {
            field.name: (_described(getattr(value, field.name)), _described(field.default))
            for field in dataclasses.fields(value)
            if field.name not in incidental
        }
        changed = {name: own for name, (own, default) in settings.items() if own != default}
        return {"kind": type(value).__name__} | changed
    if isinstance(value, tuple):
        return [_described(item) for item in value]
    if callable(value):  # part of a network of somebody's own
        return getattr(value, "__qualname__", type(value).__qualname__)
    if isinstance(value, float):
        return float(f"{value:.{_DIGITS}g}")
    return value


def _sha256(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()
