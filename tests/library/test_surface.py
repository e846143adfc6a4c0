"""The surface: small, lazy, documented, and the same for Python and for type checkers."""

import ast
import dataclasses
import doctest
import functools
import inspect
import subprocess
import sys
import textwrap
from pathlib import Path

import jax
import numpy as np
import optax
import pytest

import early_exit as ee
from early_exit.library import register

SOURCE = Path(ee.__file__).read_text(encoding="utf-8")
KINDS = [name for name, value in vars(register).items() if inspect.isfunction(value)]
KINDS = [name for name in KINDS if getattr(register, name).__module__ == register.__name__]


def test_it_is_small_and_whole():
    assert len(ee.__all__) <= 30
    assert sorted(ee.__all__) == sorted(ee._HOMES) == ee.__all__
    wanted = "load attach tune record calibrate generate stream score classify save"
    assert set(wanted.split()) <= set(ee.__all__) <= set(dir(ee))


def test_type_checkers_read_the_same_names():
    (block,) = (node for node in ast.parse(SOURCE).body if isinstance(node, ast.If))
    read = {
        alias.asname or alias.name: (node.module, alias.name)
        for node in block.body
        for alias in node.names
    }
    assert read.keys() == set(ee.__all__)
    for name, (module, own) in read.items():
        home, called = ee._HOMES[name]
        whole = f"early_exit.{home}" + (f".{called}" if called else "")
        assert f"{module}.{own}" == whole


def test_a_name_that_there_is_not():
    with pytest.raises(AttributeError, match="no attribute 'tuen'"):
        _ = ee.tuen


def test_importing_it_imports_nothing_else():
    code = (
        "import sys; before = set(sys.modules); import early_exit\n"
        "from early_exit import *; sys.exit(0)"
    )
    lean = code.splitlines()[0] + (
        "\nnew = {m.partition('.')[0] for m in set(sys.modules) - before}"
        "\nassert not new & {'jax', 'numpy', 'flax', 'absl', 'transformers'}, new"
    )
    for program in (lean, code):
        done = subprocess.run(
            [sys.executable, "-c", program],
            capture_output=True,
            text=True,
            cwd=Path(ee.__file__).parents[1],
        )
        assert not done.returncode, done.stderr


def public():
    """(name, object) of all that is public, what can be registered and built included."""
    for name in ee.__all__:
        if name != "register":
            yield name, getattr(ee, name)
    for kind in KINDS:
        yield f"register.{kind}", getattr(register, kind)
    yield "Model.of", ee.Model.of


@pytest.mark.parametrize(
    ("name", "value"), list(public()), ids=lambda x: x if type(x) is str else ""
)
def test_every_name_is_explained(name, value):
    text = inspect.getdoc(value)
    assert ">>> " in text, "an example"
    if dataclasses.is_dataclass(value):
        assert "Attributes:" in text
        return
    parameters = inspect.signature(value).parameters
    untyped = [p for p in parameters.values() if p.annotation is inspect.Parameter.empty]
    assert not untyped, "every argument has a type"
    for parameter in set(parameters) - {"model", "name", "drafter", "family", "cls", "seed"}:
        assert parameter in text, f"nothing is said of {parameter}"


@pytest.fixture(scope="module")
def words(bare, tuned, leaving, classifier, tmp_path_factory):
    """What the examples begin with."""
    folder = tmp_path_factory.mktemp("saved") / "model"
    ee.save(bare, folder)
    tokens = np.arange(32, dtype=np.int32).reshape(2, 16)
    ones, places = np.ones_like(tokens), np.tile(np.arange(16, dtype=np.int32), (2, 1))
    texts = [f"Text {n}: {' '.join(map(str, range(n, n + 30)))}" for n in range(16)]
    return {
        "ee": ee,
        "np": np,
        "jax": jax,
        "optax": optax,
        "functools": functools,
        "dataclasses": dataclasses,
        "model": bare,
        "tuned": tuned,
        "leaving": leaving,
        "records": ee.record(tuned, texts, batch_size=2, sequence_length=32),
        "classifier": classifier,
        "texts": texts,
        "batch": {"tokens": tokens, "documents": ones, "positions": places},
        "folder": folder,
        "folder_to_be": folder.parent / "another",
    }


def test_the_examples_are_true(words, forgotten):
    """All in one go, in the order of the names: some go on from earlier ones."""
    order = ["Recipe", "init_state", "tuning_loss", "tune_step"]
    named = dict(public())
    found = doctest.DocTestRunner(optionflags=doctest.ELLIPSIS)
    for name in [*order, *(name for name in named if name not in order)]:
        text = textwrap.dedent(inspect.getdoc(named[name]))
        test = doctest.DocTestParser().get_doctest(text, words, name, None, 0)
        with jax.numpy_rank_promotion("allow"):
            found.run(test, clear_globs=False)
        words.update(test.globs)
    assert not found.summarize(verbose=False).failed
