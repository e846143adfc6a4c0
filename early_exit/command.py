"""`early-exit tune …`: the commands, from wherever the package is installed.

The one idea: commands are modules of `launch`, run as `python -m launch.tune` from the repository.
An installed package carries them inside itself, so that nothing but `early_exit` lies beside other
packages; this puts them on the path of its own process, and of those that it starts.
"""

import ast
import os
import runpy
import sys
from pathlib import Path

_PACKAGE = Path(__file__).parent
# Of what is in `launch`, these are no commands.
_NONE = {"__init__", "common", "decoding_flags", "jobs", "on_mesh", "processes", "usage"}


def folder() -> Path:
    """What holds `launch` and `configs`: a part of the package, or the repository around it."""
    carried = _PACKAGE / "commands"
    return carried if carried.is_dir() else _PACKAGE.parent


def commands() -> dict[str, str]:
    """Every command with what it does, in a sentence."""
    found = {}
    for path in sorted((folder() / "launch").glob("*.py")):
        if path.stem not in _NONE:
            told = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or ""
            found[path.stem] = " ".join(told.split("\n\n")[0].split())
    return found


def main(argv: list[str] | None = None) -> None:
    """Runs a command with its flags; lists all without one."""
    name, *flags = (sys.argv[1:] if argv is None else argv) or ["--help"]
    known = commands()
    if name in ("--help", "-h", "help"):
        width = max(map(len, known))
        lines = (f"  {command:<{width}}  {told}" for command, told in known.items())
        print(
            "early-exit COMMAND --flag=value …     (early-exit COMMAND --help)\n", *lines, sep="\n"
        )
        return
    if name not in known:
        sys.exit(f"there is no command {name!r}; there are {', '.join(known)}")
    place = str(folder())
    sys.path.insert(0, place)
    inherited = os.environ.get("PYTHONPATH")
    os.environ["PYTHONPATH"] = place if not inherited else f"{place}{os.pathsep}{inherited}"
    sys.argv = [f"launch.{name}", *(_found(flag) for flag in flags)]
    runpy.run_module(f"launch.{name}", run_name="__main__", alter_sys=True)


def _found(flag: str) -> str:
    """A flag whose value is one of the configs that come along, with where that is."""
    start, equals, path = flag.partition("=")
    given = path.partition(":")[0]
    is_config = start.lstrip("-") == "config" and given.startswith("configs/")
    if not is_config or Path(given).exists() or not (folder() / given).exists():
        return flag
    return f"{start}{equals}{folder() / path}"


if __name__ == "__main__":
    main()
