"""Configurations from one string, strict overrides, and sweeps as lists of overrides.

The one idea: a run is a base `ConfigDict` plus a dict of dotted overrides such as
`{"tune.learning_rate": 1e-3}`. Whatever names a value that the base does not have, or gives it
another type, is an error, so a misspelt option can never be silently ignored.
"""

import copy
import difflib
import itertools
from collections.abc import Iterable, Mapping
from typing import Any

import ml_collections

ConfigDict = ml_collections.ConfigDict
Overrides = dict[str, Any]

_FLAGS = {"true": True, "1": True, "false": False, "0": False}


def parse_arg(arg: str | None, /, **defaults: Any) -> ConfigDict:
    """The text after the colon of `--config=configs/….py:head=mlp,points=6:12:24,runlocal`.

    Each value takes the type of its default: `bool` (a name alone means true), `int`, `float`,
    `str`, or a tuple of ints written with colons (empty for none).

    Raises:
      ValueError: an unknown name or a value that does not parse; lists the known names.
    """
    values = dict(defaults)
    known = ", ".join(f"{name}={_written(default)}" for name, default in defaults.items())
    for part in filter(None, (arg or "").split(",")):
        name, has_value, text = part.partition("=")
        if name not in defaults:
            raise ValueError(f"unknown config argument {name!r}; known, with defaults: {known}")
        default = defaults[name]
        try:
            if not has_value and not isinstance(default, bool):
                raise ValueError(f"{name} needs a value")
            values[name] = _parsed(text if has_value else "true", default)
        except ValueError as error:
            raise ValueError(
                f"config argument {part!r} is not {_kind(default)}; known, with defaults: {known}"
            ) from error
    return ConfigDict(values)


def _parsed(text: str, default: Any) -> Any:
    if isinstance(default, bool):
        if text.lower() not in _FLAGS:
            raise ValueError(text)
        return _FLAGS[text.lower()]
    if isinstance(default, tuple):
        return tuple(int(item) for item in text.split(":")) if text else ()
    return type(default)(text)


def _written(default: Any) -> str:
    return ":".join(map(str, default)) if isinstance(default, tuple) else str(default)


def _kind(default: Any) -> str:
    if isinstance(default, tuple):
        return "ints written as 6:12:24"
    return {bool: "true or false", int: "an int", float: "a number", str: "text"}[type(default)]


def override(config: ConfigDict, overrides: Mapping[str, Any]) -> ConfigDict:
    """A copy of `config` with the values at dotted keys such as `exits.points` replaced.

    Types stay: an int may stand for a float, a list for a tuple (JSON has no tuples), and
    anything for a None.

    Raises:
      ValueError: a key that `config` does not have; names the nearest one it has.
      TypeError: a value of another type; names the key and both types.
    """
    config = copy.deepcopy(config)  # with its placeholders, which know the type of a None
    known = list(_leaves(config))
    for key, value in overrides.items():
        if key not in known:
            nearest = difflib.get_close_matches(key, known, 1, cutoff=0)
            hint = f"; did you mean {nearest[0]!r}?" if nearest else ""
            raise ValueError(f"config has no {key!r}{hint}")
        *parents, name = key.split(".")
        node = config
        for parent in parents:
            node = node[parent]
        node[name] = _typed(key, value, node[name])
    return config


def _leaves(config: ConfigDict, prefix: str = "") -> Iterable[str]:
    for name, value in config.items():
        if isinstance(value, ConfigDict):
            yield from _leaves(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}"


def _typed(key: str, value: Any, current: Any) -> Any:
    if isinstance(current, float) and type(value) is int:
        return float(value)
    if isinstance(current, tuple) and isinstance(value, list | tuple):
        # A tuple keeps the type of its items; an empty one has none to keep.
        return tuple(_typed(key, item, current[0]) if current else item for item in value)
    if current is not None and type(value) is not type(current):
        raise TypeError(
            f"config.{key} is {type(current).__name__} ({current!r}), "
            f"not {type(value).__name__} ({value!r})"
        )
    return value


def over(key: str, values: Iterable[Any]) -> list[Overrides]:
    """One run for each value: `over("tune.learning_rate", (1e-4, 1e-3))`."""
    return [{key: value} for value in values]


def prod(*sweeps: Iterable[Overrides]) -> list[Overrides]:
    """Every combination of one run from each sweep, the last sweep varying fastest."""
    return [_joined(runs) for runs in itertools.product(*sweeps)]


def chain(*sweeps: Iterable[Overrides]) -> list[Overrides]:
    """The runs of all sweeps, one sweep after the other."""
    return list(itertools.chain(*sweeps))


def zipit(*sweeps: Iterable[Overrides]) -> list[Overrides]:
    """The first runs of all sweeps together, then the second ones, …

    Raises:
      ValueError: sweeps of different lengths.
    """
    return [_joined(runs) for runs in zip(*sweeps, strict=True)]


def _joined(runs: Iterable[Overrides]) -> Overrides:
    joined: Overrides = {}
    for run in runs:
        twice = joined.keys() & run.keys()
        if twice:
            raise ValueError(f"two sweeps set {', '.join(sorted(twice))}; keep one of them")
        joined |= run
    return joined
