"""One setting: its type, its range or choices, and the sentence that says what it is.

The one idea: a section of settings is a frozen dataclass that checks itself whenever one is made,
`dataclasses.replace` included. So none exists that makes no run, and no other room checks again.
"""

import dataclasses
import functools
import math
import numbers
import types
import typing
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, ClassVar


class SettingsError(ValueError):
    """Settings that make no run; `problems` has a sentence for each."""

    def __init__(self, problems: Iterable[str]):
        self.problems = tuple(problems)
        lines = self.problems
        if len(lines) > 1:
            lines = (f"{len(lines)} settings make no run:", *lines)
        super().__init__("\n  ".join(lines))


@dataclasses.dataclass(frozen=True)
class Rule:
    """What a setting, or each item of one that is a tuple, may be.

    Attributes:
      says: a sentence for users: what the setting does, and what a 0 or nothing means.
      least, above, most, below: limits of a number.
      choices: all the values that there are, but for those that were added.
      more: choices that were added (`settings.read.offer`).
    """

    says: str
    least: float | None = None
    above: float | None = None
    most: float | None = None
    below: float | None = None
    choices: tuple[str, ...] | None = None
    more: list[str] = dataclasses.field(default_factory=list, compare=False)

    def allows(self, value: Any) -> bool:
        if self.choices is not None:
            return value in (*self.choices, *self.more)
        return (
            (self.least is None or value >= self.least)
            and (self.above is None or value > self.above)
            and (self.most is None or value <= self.most)
            and (self.below is None or value < self.below)
        )

    @property
    def allowed(self) -> str:
        """Such as `in [0, 1)`, `at least 1` or `one of linear, cosine`; empty without a rule."""
        if self.choices is not None:
            choices = (*self.choices, *self.more)
            return f"one of {', '.join(choice or repr(choice) for choice in choices)}"
        low = self.least if self.above is None else self.above
        high = self.most if self.below is None else self.below
        if low is not None and high is not None:
            opening, closing = "(["[self.above is None], ")]"[self.below is None]
            return f"in {opening}{low}, {high}{closing}"
        if low is not None:
            return f"{'at least' if self.above is None else 'above'} {low}"
        if high is not None:
            return f"{'at most' if self.below is None else 'below'} {high}"
        return ""


def setting(default: Any, says: str, **limits: Any) -> Any:
    """A dataclass field for a setting; see `Rule`."""
    metadata = {"rule": Rule(says, **limits)}
    if isinstance(default, dict):
        return dataclasses.field(default_factory=lambda: dict(default), metadata=metadata)
    return dataclasses.field(default=default, metadata=metadata)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Section:
    """Settings that belong together. Numbers and tuples become the types that are declared.

    Raises:
      SettingsError: values of another type or out of range, or settings that contradict each
        other; all of them at once.
    """

    # Before the name of each setting.
    prefix: ClassVar[str] = ""

    def __post_init__(self):
        given = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        values, problems = checked(type(self), given)
        for name, value in values.items():
            object.__setattr__(self, name, value)
        if problems := problems or list(self.conflicts()):
            raise SettingsError(problems)

    def conflicts(self) -> Iterator[str]:
        """A sentence for each contradiction between settings that are in range."""
        yield from ()


def rules(kind: type[Section]) -> dict[str, Rule]:
    """The rule of each setting of a section."""
    fields = dataclasses.fields(kind)
    return {field.name: field.metadata["rule"] for field in fields if field.metadata}


hints = functools.cache(typing.get_type_hints)


def checked(kind: type[Section], given: Mapping[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """(values of the declared types, a sentence for each that has none or is out of range)."""
    values, problems = {}, []
    for name, rule in rules(kind).items():
        if name not in given:
            continue
        full, value, hint = f"{kind.prefix}{name}", given[name], hints(kind)[name]
        try:
            value = typed(value, hint)
        except TypeError:
            problems.append(f"{full}={given[name]!r} is not {kind_of(hint)}: {rule.says}")
            continue
        except ValueError:
            problems.append(f"{full}={given[name]!r} is not finite: {rule.says}")
            continue
        items = value if isinstance(value, tuple) else (value,)
        if all(item is None or isinstance(item, dict) or rule.allows(item) for item in items):
            values[name] = value
        else:
            each = "each of " if isinstance(value, tuple) else ""
            problems.append(f"{each}{full}={value!r} must be {rule.allowed}: {rule.says}")
    return values, problems


def typed(value: Any, hint: Any) -> Any:
    """The value as the declared type has it: an int may stand for a float, a list for a tuple.

    Raises:
      TypeError: a value of another type; a bool is no number.
      ValueError: NaN or an infinity.
    """
    if isinstance(hint, types.UnionType):  # `… | None`
        return None if value is None else typed(value, typing.get_args(hint)[0])
    of = typing.get_origin(hint) or hint
    if of is dict:
        return _plain(value) if isinstance(value, Mapping) else _refuse(value)
    if of is tuple:
        if not isinstance(value, list | tuple):
            _refuse(value)
        return tuple(typed(item, typing.get_args(hint)[0]) for item in value)
    if of in (bool, str):
        return value if isinstance(value, of) else _refuse(value)
    if isinstance(value, bool) or not isinstance(value, _NUMBERS[of]):
        _refuse(value)
    try:
        number = of(value)
    except OverflowError:  # an int beyond all floats
        number = math.inf
    if of is float and not math.isfinite(number):
        raise ValueError(value)
    return number


_NUMBERS = {int: numbers.Integral, float: numbers.Real}


def _plain(value: Any) -> Any:
    """What JSON can say, whatever the names, with tuples for lists so that it can be hashed."""
    if isinstance(value, Mapping):
        return {typed(name, str): _plain(item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return tuple(map(_plain, value))
    if value is None or isinstance(value, bool | str):
        return value
    return typed(value, int if isinstance(value, numbers.Integral) else float)


def _refuse(value: Any) -> typing.NoReturn:
    raise TypeError(value)


_KINDS = {bool: "true or false", int: "an int", float: "a number", str: "text"}


def kind_of(hint: Any) -> str:
    """A declared type in words, such as `a tuple of ints`."""
    if isinstance(hint, types.UnionType):
        return f"{kind_of(typing.get_args(hint)[0])} or None"
    of = typing.get_origin(hint) or hint
    if of is dict:
        return "a dict"
    if of is tuple:
        item = typing.get_args(hint)[0]
        return "a tuple of texts" if item is str else f"a tuple of {kind_of(item).split()[-1]}s"
    return _KINDS[of]
