"""`--help` of every command: what it is for, its examples, its flags in groups, on one screen.

The one idea: a flag's line has its name, the sentence that it was defined with, and its default;
how the command goes about its work stands in the whole text (`--helpfull`).
"""

import inspect
import shutil
import sys
import textwrap

from absl import flags

# What shows this; `--helpfull` is absl's own.
ASKED = {"--help", "-help", "-h", "-?", "--helpshort"}
OWN = "flags"
_COLUMN = 26  # where sentences begin
_headings: dict[flags.Flag, str] = {}
_brief: set[str] = set()
_LISTS = "; repeat this option to specify a list of values"  # absl's own words


def group(heading: str, *defined: flags.FlagHolder) -> None:
    """Puts flags under a heading of their own."""
    _headings.update({flags.FLAGS[holder.name]: heading for holder in defined})


def brief(heading: str, *defined: flags.FlagHolder) -> None:
    """The same of flags that are told by their names alone: those that few need."""
    group(heading, *defined)
    _brief.add(heading)


def text(doc: str, width: int | None = None) -> str:
    """What a command is for, and its flags.

    Args:
      doc: the command's own; shown are its first paragraph and its indented examples.
      width: of the screen; the terminal's if None.
    """
    width = width or shutil.get_terminal_size((100, 50)).columns
    paragraphs = inspect.cleandoc(doc).split("\n\n")
    shown = [paragraphs[0], *(p for p in paragraphs[1:] if p.startswith("    "))]
    for heading, members in _grouped().items():
        lines = "\n".join(_line(flag, width) for flag in members)
        if heading in _brief:
            names = "  ".join(_name(flag) for flag in members)
            lines = textwrap.fill(names, width, initial_indent="  ", subsequent_indent="  ")
        shown.append(f"{heading}:\n{lines}")
    return "\n\n".join([*shown, "--helpfull says more, and lists the flags of absl, too."])


def _grouped() -> dict[str, list[flags.Flag]]:
    """Heading → the command's flags, in the order in which they were defined; its own first."""
    groups: dict[str, list[flags.Flag]] = {OWN: []}
    for flag in flags.FLAGS.get_key_flags_for_module(sys.argv[0]):
        groups.setdefault(_headings.get(flag, OWN), []).append(flag)
    return {heading: members for heading, members in groups.items() if members}


def _line(flag: flags.Flag, width: int) -> str:
    says = " ".join(flag.help.split()).removesuffix(_LISTS)
    if flag.default not in (None, False, "", []):
        says += f" ({_default(flag)})"
    name = f"  {_name(flag)}"
    first = f"{name:<{_COLUMN}}" if len(name) < _COLUMN else f"{name} "
    return textwrap.fill(says, width, initial_indent=first, subsequent_indent=" " * _COLUMN)


def _name(flag: flags.Flag) -> str:
    return f"--{flag.name}{'' if flag.boolean else '='}"


def _default(flag: flags.Flag) -> str:
    value = flag.default
    return ", ".join(map(str, value)) if isinstance(value, list) else str(value)
