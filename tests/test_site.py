"""The site: built without a warning, asks no other host, and leaves nothing out."""

import html
import html.parser
import importlib.util
import os
import pathlib
import re
import subprocess
import sys
import xml.etree.ElementTree

import pytest

import early_exit as ee
from early_exit import command
from early_exit.settings import fields
from early_exit.settings.read import SECTIONS

ROOT = pathlib.Path(__file__).parents[1]


def loaded(name):
    spec = importlib.util.spec_from_file_location(f"docs_{name}", ROOT / f"docs/{name}.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look themselves up
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def hooks():
    before = list(sys.path)
    yield loaded("hooks")
    sys.path[:] = before


def test_the_references_have_every_name_setting_and_command(hooks):
    page = hooks.library_page()
    for name in ee.__all__:
        if name != "register":
            assert f"### ee.{name}\n" in page
    for name in re.findall(
        r"^def (\w+)", (ROOT / "early_exit/library/register.py").read_text(), re.M
    ):
        assert f"### ee.register.{name}\n" in page
    settings = hooks.settings_page()
    for kind in SECTIONS.values():
        for name, rule in fields.rules(kind).items():
            (row,) = re.findall(rf"^\| `{re.escape(kind.prefix + name)}` .*$", settings, re.M)
            assert rule.says in row
    listed = hooks.commands_page()
    assert all(f"\n## {name}\n" in listed for name in command.commands())


def test_a_signature_is_the_source_s(hooks):
    page = hooks.library_page()
    entry = page[page.index("### ee.save\n") :]
    assert entry.split("```python\n")[1].startswith(
        "ee.save(model: Model, folder: str | Path, *, exits_only: bool = False) -> Path\n```"
    )
    assert "#### ee.Model.of\n\n```python\nee.Model.of(\n    config: base.BackboneConfig,\n" in page
    assert "ee.ExitConfig(\n    points: tuple[int, ...],\n    head: str = 'mlp',\n" in page


def test_docstrings_become_pages(hooks):
    told = """First line.

    More of it.

    Args:
      model, reads: a thing
        of two lines.
      other: one.

    Raises:
      ValueError, OSError: when.

    Example:
      >>> 1 + 1
      2
    """
    found = "\n".join(hooks._told(hooks.inspect.cleandoc(told)))
    assert found.startswith(
        "First line.\n\nMore of it.\n\n\n**Arguments**\n\n- `model`, `reads`: a"
    )
    assert "\n    of two lines.\n- `other`: one.\n" in found
    assert "- `ValueError`, `OSError`: when." in found
    assert found.endswith("**Example**\n\n```pycon\n>>> 1 + 1\n2\n```")
    indented = hooks._indented_as_code("Says.\n\n    python -m a \\\n        --b\n\nMore.")
    assert indented == "Says.\n\n```\npython -m a \\\n    --b\n```\n\nMore."


def test_every_study_is_a_page_with_its_pictures_inside(hooks):
    pages = hooks.studies()
    folders = {path.parent.name for path in (ROOT / "experiments").glob("*/README.md")}
    assert pages.keys() == folders
    for name, page in pages.items():
        drawn = list((ROOT / "experiments" / name).glob("*.svg"))
        assert page.count("<svg") == len(drawn) and "<?xml" not in page
        assert f"]({name}.md)" in hooks.study_list()


@pytest.mark.studies
def test_pictures_are_drawn_from_decodes_and_take_the_page_s_colours(tmp_path):
    draw = loaded("draw")
    draw.main(tmp_path)
    kept = {path.name for path in (ROOT / "docs/pictures").iterdir()}
    assert {path.name for path in tmp_path.iterdir()} == kept
    for path in [*tmp_path.iterdir(), *(ROOT / "docs/pictures").iterdir()]:
        tree = xml.etree.ElementTree.parse(path)
        for node in tree.iter():
            for name in ("fill", "stroke"):
                assert re.fullmatch(r"none|var\(--\w+, #\w{6}\)", node.get(name, "none"))
    shown = (ROOT / "docs/pictures/deferral.svg").read_text()
    assert shown.count("stroke-dasharray") > 2  # some positions wait


class Asked(html.parser.HTMLParser):
    """What a page asks for by itself when it is read."""

    def __init__(self):
        super().__init__()
        self.found = []

    def handle_starttag(self, tag, attrs):
        attrs = dict(attrs)
        if tag in ("script", "img", "iframe", "source"):
            self.found.append(attrs.get("src"))
        if tag == "link" and attrs.get("rel") in ("stylesheet", "icon", "preconnect", "preload"):
            self.found.append(attrs.get("href"))


@pytest.mark.studies
def test_it_builds_without_a_warning_and_asks_no_other_host(tmp_path):
    pytest.importorskip("mkdocs", reason="of the extra `docs`")
    pytest.importorskip("material", reason="of the extra `docs`")
    done = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path)],
        cwd=ROOT,
        env={**os.environ, "JAX_PLATFORMS": "cpu", "NO_MKDOCS_2_WARNING": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert "WARNING" not in done.stderr, done.stderr
    pages = list(tmp_path.rglob("*.html"))
    assert {"idea.html", "limits.html", "library.html"} <= {page.name for page in pages}
    assert {f"{path.parent.name}.html" for path in (ROOT / "experiments").glob("*/README.md")} <= {
        page.name for page in (tmp_path / "studies").iterdir()
    }
    for page in pages:
        asked = Asked()
        text = page.read_text(encoding="utf-8")
        asked.feed(text)
        outside = [x for x in asked.found if x and re.match(r"(https?:)?//", x)]
        assert not outside, f"{page.name} asks {outside}"
        assert "--8" not in re.sub("<[^>]*>", "", text), f"{page.name} misses what it includes"
    shown = re.sub("<[^>]*>", "", (tmp_path / "tutorials/own_network.html").read_text())
    assert (ROOT / "examples/own_network.py").read_text().strip() in html.unescape(shown)


@pytest.mark.studies
@pytest.mark.parametrize(
    "path", sorted((ROOT / "docs/notebooks").glob("*.ipynb")), ids=lambda p: p.stem
)
def test_a_notebook_runs(path):
    pytest.importorskip("nbmake", reason="of the extra `docs`")
    pytest.importorskip("matplotlib", reason="of the extra `report`")
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "--nbmake", "--nbmake-timeout=120", "-q", "-p", "no:xdist"]
        + ["-c", os.devnull, "--rootdir", str(ROOT), str(path)],
        cwd=ROOT / "docs/notebooks",
        env={**os.environ, "JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT), "XLA_FLAGS": ""},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]


@pytest.mark.parametrize(
    "path", sorted((ROOT / "docs/notebooks").glob("*.ipynb")), ids=lambda p: p.stem
)
def test_a_notebook_is_kept_without_outputs(path):
    import json

    cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
    assert not any(cell.get("outputs") or cell.get("execution_count") for cell in cells)


def test_links_between_readme_and_the_site_hold():
    pages = [ROOT / "README.md", *(ROOT / "docs").rglob("*.md")]
    made = {"studies", "reference"}  # when the site is built, which checks them
    for page in pages:
        for target in re.findall(r"\]\((?!https?:)([^)#]+)", page.read_text(encoding="utf-8")):
            if not made & set(pathlib.PurePath(target).parts):
                assert (page.parent / target).exists(), f"{page.name}: {target}"
