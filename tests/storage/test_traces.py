"""Programs that were traced once are not traced again, and do what they did."""

import functools
import importlib.util
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import early_exit as ee
from conftest import build
from early_exit import confidence
from early_exit.backbones.decoder import DecoderConfig
from early_exit.decoding import engine
from early_exit.decoding.decoder import Decoder
from early_exit.decoding.generate import generate
from early_exit.decoding.mode import DEFERRED, verified
from early_exit.storage import traces

pytest.importorskip("flatbuffers", reason="of the package itself")
PROMPTS = [[5, 3, 9, 3, 9], [1, 2, 3]]


@pytest.fixture
def kept(tmp_path, monkeypatch):
    """The folder of what is kept from now on."""
    monkeypatch.setenv("EARLY_EXIT_CACHE", str(tmp_path))
    monkeypatch.setattr(traces, "_on", True)
    monkeypatch.setattr(traces, "_loaded", {})
    return tmp_path


def files(folder):
    return {path: path.read_bytes() for path in folder.rglob("traces/*")}


def answers(model, params, mode=DEFERRED, policy=(0.3, 0.6)):
    policy = ee.make_policy(policy)
    found = generate(model, params, PROMPTS, policy=policy, max_new_tokens=12, mode=mode, seed=3)
    return [(x.tokens.tolist(), x.exits.tolist(), x.layer_tokens) for x in found]


def another_process(monkeypatch):
    """Which remembers nothing, and may trace nothing."""
    monkeypatch.setattr(traces, "_loaded", {})
    monkeypatch.setattr(engine.Engine, "of", None)
    jax.clear_caches()


@pytest.mark.long
def test_a_second_start_traces_nothing_and_answers_alike(tiny, kept, monkeypatch):
    mode = verified("exits", "lookup")
    monkeypatch.setattr(traces, "_on", False)
    wanted = answers(*tiny, mode)
    assert not files(kept)
    monkeypatch.setattr(traces, "_on", True)
    assert answers(*tiny, mode) == wanted
    assert len(before := files(kept)) == 3  # of prompts, of two rows, and of the last one alone
    another_process(monkeypatch)
    assert answers(*tiny, mode) == wanted
    assert answers(*tiny, mode, policy=(0, 0)) != wanted  # numbers are no part of a program
    assert files(kept) == before


@functools.partial(jax.jit, static_argnames="times", donate_argnames="state")
def plain(x, state, steps, *, times=1):
    return {name: value + x * steps * times for name, value in state.items()}


def called(size=4, times=1):
    state = {"a": jnp.arange(float(size)), "b": jnp.zeros((2, 3))}
    found = traces.call(plain, jnp.float32(2), state, jnp.int32(3), like=1, times=times)
    assert np.array_equal(found["a"], np.arange(size) + 6 * times)
    return state


def test_what_a_program_follows_from_is_in_its_name(kept, monkeypatch):
    called()
    called()
    assert len(files(kept)) == 1
    called(size=5)
    called(times=2)
    assert len(files(kept)) == 3
    monkeypatch.setattr(traces, "sources", lambda: "changed")
    monkeypatch.setattr(traces, "_loaded", {})
    called()
    assert len(files(kept)) == 4


def test_what_arguments_have_beside_arrays_is_in_the_name_too():
    """A policy's confidence decides about the program, and is no array."""
    trees = [jax.tree.structure(ee.make_policy((0.1, 0.2), name)) for name in ("margin", "entropy")]
    assert len({traces._name(plain, tree, (), {}) for tree in trees}) == 2


def test_without_the_library_that_writes_them_programs_are_traced(monkeypatch):
    monkeypatch.setattr(traces, "_on", True)
    monkeypatch.setitem(sys.modules, "flatbuffers", None)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    traces.keep()
    assert not traces._on
    called()


@pytest.mark.parametrize("left", [0, 1, 100])
def test_a_damaged_file_is_made_anew(kept, monkeypatch, left):
    called()
    ((path, whole),) = files(kept).items()
    path.write_bytes(whole[:left])
    monkeypatch.setattr(traces, "_loaded", {})
    called()
    assert len(files(kept)[path]) == len(whole)


class Elsewhere(DecoderConfig):
    """Of this module, which may change."""


def test_code_from_elsewhere_is_traced_anew(monkeypatch):

    def ours(model, params, policy=None):
        decoder = Decoder(model, params, policy, (), DEFERRED)
        return decoder._is_ours(decoder.rules(1))

    own, other = build(), build(Elsewhere(61, 24, 6, 4, 2, 6, 40, 512))
    assert ours(*own) and not ours(*other)
    scored = ee.make_policy((0.1, 0.2), "max_prob")
    assert ours(*own, scored)
    monkeypatch.setitem(confidence._registered, "max_prob", lambda said: said.top)
    assert not ours(*own, scored)


def test_what_is_given_is_donated(kept):
    assert all(x.is_deleted() for x in jax.tree.leaves(called()))
