"""Every file of `examples/` runs; and what one of them spells out is what the library does."""

import importlib.util
import pathlib

import jax
import numpy as np
import pytest

import early_exit as ee

ROOT = pathlib.Path(__file__).parents[2]
CHAT = ROOT / "tests/fixtures/tiny_chat"
FILES = sorted((ROOT / "examples").glob("*.py"))


def loaded(path):
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(autouse=True)
def alone(tmp_path, monkeypatch):
    """Nothing that an example adds, or measures, is there after it; nor are its broadcasts bugs."""
    from early_exit import confidence
    from early_exit.data import examples, sources
    from early_exit.decoding import drafters
    from early_exit.exits import heads
    from early_exit.pretrained import families

    monkeypatch.setenv("EARLY_EXIT_CACHE", str(tmp_path / "cache"))
    families.every()
    tables = (confidence._registered, heads._registered, sources._registered)
    tables += (examples.READERS, drafters.BY_NAME)
    before, known = [dict(table) for table in tables], list(families._known)
    with jax.numpy_rank_promotion("allow"):
        yield
    for table, kept in zip(tables, before, strict=True):
        table.clear()
        table.update(kept)
    families._known[:] = known
    jax.clear_caches()


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_it_runs_and_says_something(path, tmp_path, capsys):
    arguments = [] if path.stem in ("own_network", "own_module") else [CHAT]
    if path.stem == "own_data":
        arguments.append(str(tmp_path / "texts.sqlite"))
    loaded(path).main(*arguments)
    assert capsys.readouterr().out.strip()


@pytest.mark.parametrize("seed", [0, 1])
def test_the_library_does_what_is_spelt_out(seed):
    """Token for token, block for block; heads and thresholds to rounding."""
    example = loaded(ROOT / "examples/from_primitives.py")
    model, rng = ee.load(CHAT), np.random.default_rng(seed)
    rows = rng.integers(0, 300, (14, 1, 48)).astype(np.int32)
    prompt = rng.integers(0, 300, 9).tolist()
    asked = model, list(rows[:8]), rows[8:, 0], prompt, (2, 4)
    how = {"learning_rate": 3e-3, "epsilon": 0.5}
    tokens, depths, heads, thresholds = example.by_hand(*asked, **how)
    said, blocks, tuned = example.by_library(*asked, **how)
    for x, y in zip(jax.tree.leaves(heads), jax.tree.leaves(tuned.heads), strict=True):
        np.testing.assert_allclose(x, y, atol=2e-4)
    np.testing.assert_allclose(thresholds, tuned.policy.thresholds, atol=1e-4)
    assert tokens[: len(said)].tolist() == said.tolist()
    assert depths[: len(said)].tolist() == blocks.tolist()
    assert 0 < (blocks < 6).sum() < len(blocks)


def test_a_family_of_one_s_own_is_saved_and_loaded(tmp_path):
    example = loaded(ROOT / "examples/own_network.py")
    params = example.base.init(example.SMALL, jax.random.key(0))
    model = ee.attach(ee.Model.of(example.SMALL, params), (1, 2))
    loaded_again = ee.load(_with_tokenizer(ee.save(model, tmp_path / "model")))
    assert loaded_again.static == model.static
    for x, y in zip(
        jax.tree.leaves(loaded_again.params), jax.tree.leaves(model.params), strict=True
    ):
        assert np.array_equal(x, y)


def _with_tokenizer(folder):
    """Runs on text need one, and a network of random tokens has none."""
    from tokenizers import Tokenizer, models

    words = {f"w{i}": i for i in range(64)}
    Tokenizer(models.WordLevel(words, unk_token="w0")).save(str(folder / "tokenizer.json"))
    return folder


def test_the_long_one_can_be_read_in_half_an_hour():
    text = (ROOT / "examples/from_primitives.py").read_text()
    assert len(text.splitlines()) <= 300
