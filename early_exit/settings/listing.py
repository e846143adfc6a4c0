"""Every setting for reading: its name, default, type, range and sentence, section by section."""

import dataclasses
import textwrap
from collections.abc import Iterator
from typing import Any

from early_exit.settings.fields import Section, hints, kind_of, rules
from early_exit.settings.read import SECTIONS

_INDENT = 6


def listing(width: int = 100) -> str:
    """All settings, as text of at most `width` columns where a word allows it."""
    names = [f"{kind.prefix}{name}" for kind in SECTIONS.values() for name in rules(kind)]
    defaults = [default(kind, name) for kind in SECTIONS.values() for name in rules(kind)]
    columns = max(map(len, names)) + 2, max(map(len, defaults)) + 2
    return "\n\n".join(
        "\n".join(_section(section, kind, columns, width)) for section, kind in SECTIONS.items()
    )


def default(kind: type[Section], name: str) -> str:
    """A setting's default as a flag would give it; `''` for no text."""
    field = kind.__dataclass_fields__[name]
    missing = field.default is dataclasses.MISSING
    value = field.default_factory() if missing else field.default
    if isinstance(value, bool):
        return str(value).lower()
    return value if isinstance(value, str) and value else repr(value)


def _section(
    section: str, kind: type[Section], columns: tuple[int, int], width: int
) -> Iterator[str]:
    yield f"{section or 'at the top'}: {kind.__doc__}"
    for name, rule in rules(kind).items():
        full, given = f"{kind.prefix}{name}", default(kind, name)
        told = rule.allowed if rule.choices else _numbers(hints(kind)[name], rule.allowed)
        head = f"  {full:<{columns[0]}}{given:<{columns[1]}}"
        yield from textwrap.wrap(
            told, width, initial_indent=head, subsequent_indent=" " * len(head)
        )
        indent = " " * _INDENT
        yield from textwrap.wrap(rule.says, width, initial_indent=indent, subsequent_indent=indent)


def _numbers(hint: Any, allowed: str) -> str:
    """Such as `a number above 0, or None`."""
    kind, *none = kind_of(hint).split(" or None")
    return f"{kind} {allowed}{', or None' if none else ''}".strip()
