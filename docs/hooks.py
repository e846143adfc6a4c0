"""What the site has beside its own pages: the studies, and references made from the sources.

The one idea: nothing is written twice. A study's page is its README with its pictures; a reference
is the docstrings, the settings and the commands as they are.
"""

import ast
import dataclasses
import importlib
import inspect
import re
import sys
import textwrap
import typing
from collections.abc import Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
STUDIES = ROOT / "experiments"
_SECTIONS = {"Args": "Arguments", "Attributes": "Attributes", "Raises": "Raises"}
_PICTURE = re.compile(r"!\[([^\]]*)\]\(([\w./]+\.svg)\)")

sys.path.insert(0, str(ROOT))


def studies() -> dict[str, str]:
    """Folder's name → its page."""
    pages = {}
    for path in sorted(STUDIES.glob("*/README.md")):
        pages[path.parent.name] = _PICTURE.sub(
            lambda found, path=path: _inline(path.parent / found[2], found[1]),
            path.read_text(encoding="utf-8"),
        )
    return pages


def _inline(svg: Path, caption: str) -> str:
    """A picture inside the page, whose colours it then has."""
    drawn = svg.read_text(encoding="utf-8")
    drawn = re.sub(r"^\s*<\?xml[^>]*\?>|<!DOCTYPE[^>]*>", "", drawn, flags=re.DOTALL)
    drawn = "\n".join(line for line in drawn.splitlines() if line.strip())
    return (
        f'<figure class="picture">\n{drawn.strip()}\n<figcaption>{caption}</figcaption>\n</figure>'
    )


def title(page: str) -> str:
    return next(line for line in page.splitlines() if line.startswith("# "))[2:]


def study_list() -> str:
    lines = [f"- [{title(page)}]({name}.md)" for name, page in studies().items()]
    return (
        "# Studies\n\nOne folder of `experiments/` each, with the commands that its figures come "
        "from, and bars that `--check` holds them to.\n\n" + "\n".join(lines) + "\n"
    )


def settings_page() -> str:
    """Every setting, by section."""
    from early_exit.settings import fields, sections
    from early_exit.settings.read import SECTIONS

    out = ["# All settings", "", "As flags: `--config.SECTION.NAME=VALUE`."]
    for section, kind in SECTIONS.items():
        told = inspect.getdoc(kind).split("\n")[0]
        rows = []
        for name, rule in fields.rules(kind).items():
            default = _default(kind.__dataclass_fields__[name])
            allowed = rule.allowed.replace("|", r"\|") or "–"
            rows.append(f"| `{kind.prefix}{name}` | `{default}` | {allowed} | {rule.says} |")
        if kind is not sections.Settings:
            out += ["", f"## {section}", "", told]
        out += ["", "| setting | default | may be | |", "|---|---|---|---|", *rows]
    return "\n".join(out) + "\n"


def _default(field: Any) -> str:
    made = field.default_factory
    return repr(field.default if made is dataclasses.MISSING else made())


def commands_page() -> str:
    """What each command says of itself."""
    from early_exit import command

    out = ["# All commands", ""]
    out += ["`python -m launch.NAME` in the repository, `early-exit NAME` where it is installed."]
    out += ["`--help` lists the flags."]
    for name in command.commands():
        source = (command.folder() / "launch" / f"{name}.py").read_text(encoding="utf-8")
        out += ["", f"## {name}", "", _indented_as_code(ast.get_docstring(ast.parse(source)))]
    return "\n".join(out) + "\n"


def _indented_as_code(told: str) -> str:
    """Indented lines of a docstring, such as commands, fenced."""
    return re.sub(
        r"(?:^ {4}[^\n]*\n?)+",
        lambda found: "```\n" + textwrap.dedent(found[0]).strip() + "\n```\n",
        told,
        flags=re.MULTILINE,
    )


def library_page() -> str:
    """All that `import early_exit as ee` has."""
    import early_exit as ee
    from early_exit.library import register

    out = ["# The library", "", "All of `import early_exit as ee`; everything else is private."]
    functions = [name for name in ee.__all__ if inspect.isfunction(getattr(ee, name))]
    values = [name for name in ee.__all__ if inspect.isclass(getattr(ee, name))]
    out += ["", "## What is done"]
    for name in functions:
        out += _entry(f"ee.{name}", getattr(ee, name))
    out += ["", "## Values"]
    for name in values:
        out += _entry(f"ee.{name}", getattr(ee, name))
    out += ["", "## To add", "", inspect.getdoc(register).replace("\n\n", "\n\n")]
    for name, found in vars(register).items():
        if inspect.isfunction(found) and found.__module__ == register.__name__:
            out += _entry(f"ee.register.{name}", found)
    return "\n".join(out) + "\n"


def _entry(name: str, found: Any) -> Iterator[str]:
    yield from ("", f"### {name}", "", "```python", _signature(name, found), "```", "")
    yield from _told(inspect.getdoc(found) or "")
    if inspect.isclass(found):
        for own, method in vars(found).items():
            public = not own.startswith("_") and own in found.__dict__
            if public and isinstance(method, classmethod):
                yield from _entry_of_method(name, own, method.__func__)


def _entry_of_method(of: str, name: str, found: Any) -> Iterator[str]:
    yield from ("", f"#### {of}.{name}", "", "```python")
    yield from (_signature(f"{of}.{name}", found, leave_out=1), "```", "")
    yield from _told(inspect.getdoc(found) or "")


def _signature(name: str, found: Any, leave_out: int = 0) -> str:
    """As in the source: names of types, and not where they are."""
    if inspect.isclass(found):
        fields = getattr(found, "__dataclass_fields__", {})
        parts = [_field(field) for field in fields.values() if field.init]
        return _spread(name, parts, "")
    (node,) = ast.parse(inspect.cleandoc("\n" + inspect.getsource(found))).body
    args = node.args
    plain = [*args.posonlyargs, *args.args]
    defaults = [None] * (len(plain) - len(args.defaults)) + args.defaults
    parts = [_arg(a, d) for a, d in zip(plain, defaults, strict=True)][leave_out:]
    if args.vararg:
        parts.append(f"*{ast.unparse(args.vararg)}")
    elif args.kwonlyargs:
        parts.append("*")
    parts += [_arg(a, d) for a, d in zip(args.kwonlyargs, args.kw_defaults, strict=True)]
    if args.kwarg:
        parts.append(f"**{ast.unparse(args.kwarg)}")
    return _spread(name, parts, f" -> {ast.unparse(node.returns)}" if node.returns else "")


def _arg(arg: ast.arg, default: ast.expr | None) -> str:
    equals = " = " if arg.annotation else "="
    return ast.unparse(arg) + (f"{equals}{ast.unparse(default)}" if default is not None else "")


def _field(field: Any) -> str:
    kind = field.type
    if not isinstance(kind, str):
        kind = str(kind) if typing.get_args(kind) else getattr(kind, "__name__", str(kind))
    if field.default is not dataclasses.MISSING:
        return f"{field.name}: {kind} = {field.default!r}"
    return f"{field.name}: {kind}"


def _spread(name: str, parts: list[str], returns: str) -> str:
    line = f"{name}({', '.join(parts)}){returns}"
    if len(line) <= 88:
        return line
    return "\n".join([f"{name}(", *(f"    {part}," for part in parts), f"){returns}"])


def _told(doc: str) -> Iterator[str]:
    """A docstring as Markdown: its sections under bold words, its examples as code."""
    section = None
    lines = doc.splitlines()
    for i, line in enumerate(lines):
        if found := re.fullmatch(r"(Args|Attributes|Raises|Returns|Example):", line):
            if section == "Example":
                yield "```"
            section = found[1]
            yield from ("", f"**{_SECTIONS.get(section, section)}**", "")
            if section == "Example":
                yield "```pycon"
            continue
        if section in _SECTIONS and (entry := re.match(r"  ([\w*][\w*, ]*?): (.*)", line)):
            names = ", ".join(f"`{name}`" for name in entry[1].split(", "))
            yield f"- {names}: {entry[2]}"
        elif section is None:
            yield line
        else:
            yield line[2:] if section in ("Example", "Returns") else line
        if i == len(lines) - 1 and section == "Example":
            yield "```"


def generated() -> dict[str, str]:
    """Path in the site → page, of all that is made."""
    pages = {"studies/index.md": study_list()}
    pages |= {f"studies/{name}.md": page for name, page in studies().items()}
    importlib.import_module("early_exit")
    return pages | {
        "reference/library.md": library_page(),
        "reference/settings.md": settings_page(),
        "reference/commands.md": commands_page(),
    }


def on_config(config: Any) -> Any:
    """The studies stand in the navigation, too."""
    pages = ["studies/index.md", *(f"studies/{name}.md" for name in studies())]
    config.nav.insert(-1, {"Studies": pages})
    return config


def on_files(files: Any, config: Any) -> Any:
    from mkdocs.structure.files import File

    for path, page in generated().items():
        files.append(File.generated(config, path, content=page))
    return files
