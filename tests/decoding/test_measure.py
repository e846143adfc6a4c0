"""What steps cost is measured once, with the program that decodes, and kept."""

import dataclasses

import jax
import numpy as np
import pytest

from conftest import build
from early_exit import policy as policies
from early_exit.cost.traffic import traffic
from early_exit.decoding import measure
from early_exit.decoding.decode import decode
from early_exit.decoding.decoder import Decoder
from early_exit.decoding.mode import LOSSY, VERIFIED, served, verified

BATCH, SLOTS = 2, 256


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("EARLY_EXIT_CACHE", str(tmp_path))
    return tmp_path


@pytest.fixture(scope="module")
def model_and_params():
    return build(recurrent_taps=(2, 6))


def decoder_of(model, params, mode=VERIFIED, pending=5):
    mode = dataclasses.replace(served(mode, model), pending=pending)
    return Decoder(model, params, policies.make([0.5, 0.5]), (), mode)


def test_each_step_takes_its_time(model_and_params, cache):
    decoder = decoder_of(*model_and_params)
    found = measure.seconds(decoder, BATCH, SLOTS)
    assert found["widths"] == [1, 4, 5] and found["batch"] == BATCH
    assert min(found["passes"]) > 0 and found["draft"] >= 0
    costs = measure.costs(decoder, BATCH, SLOTS)
    assert costs.passes_N[0] == 1 and costs.passes_N.shape == (3,)


@pytest.mark.parametrize("stops", [False, True])
def test_what_is_timed_has_run(model_and_params, cache, monkeypatch, stops):
    """Each pass as wide as it is called, each chain as long as it may be; whatever ends answers."""
    decoder = decoder_of(*model_and_params)
    if stops:  # every token is one
        decoder = dataclasses.replace(decoder, stop_ids=range(decoder.model.config.vocab_size))
    timed, done = measure._timed, []

    def watched(decoder, state, steps):
        before = jax.device_get(state.counts)  # the state is given away
        taken, after = timed(decoder, state, steps)
        change = jax.tree.map(lambda x, y: (np.asarray(x) - y).sum(axis=0), after.counts, before)
        asked = change.evaluations_BE[:-1]
        done.append((change.passes_BEN[-1], change.draft_steps_B, asked))
        return taken, after

    monkeypatch.setattr(measure, "_timed", watched)
    found = measure.seconds(decoder, BATCH, SLOTS)
    assert found["draft"] > 0 and found["heads"] >= 1
    rounds = measure.ROUNDS + 1
    passes, drafts, asked = map(np.array, zip(*done, strict=True))
    # Each width; nothing; one with a chain of which nothing is handed on; one that asks the exits.
    one, two, three, none = [1, 0, 0], [0, 1, 0], [0, 0, 1], [0, 0, 0]
    widths = [one, two, three, none, one, one]
    every = [[0, 0]] * 5 + [[BATCH, BATCH]]
    for exit_ in np.eye(2, dtype=int) * BATCH:
        # All rows leave there, and are taken along by the next; or go on, for what ends an answer.
        widths += [one] if stops else [none, two]
        every += [exit_] if stops else [exit_, [0, 0]]
    np.testing.assert_allclose(passes, np.tile(widths, (rounds, 1)), rtol=1e-6)
    longest = 1 if stops else decoder.mode.capacity - 1  # what ends an answer is not drafted
    expected = np.zeros(len(widths))
    expected[4] = longest
    np.testing.assert_allclose(drafts, np.tile(expected, rounds), rtol=1e-6)
    np.testing.assert_array_equal(asked, np.tile(every, (rounds, 1)))
    if stops:  # nobody has left: by weights
        depths = traffic(*model_and_params).shares()[0][:2]
        saved = np.subtract(1, depths) * (2 * found["passes"][0] - found["passes"][1])
        np.testing.assert_allclose(found["saved"], saved, rtol=1e-5)


def test_what_a_call_takes_is_no_part_of_its_steps(model_and_params, cache, monkeypatch):
    """By a clock of which a call takes 3, a pass its width, a draft a half."""
    decoder = decoder_of(*model_and_params)
    timed = measure._timed

    def clocked(decoder, state, steps):
        before = jax.device_get(state.counts)
        _, after = timed(decoder, state, steps)
        change = jax.tree.map(lambda x, y: (np.asarray(x) - y).sum(axis=0), after.counts, before)
        passes = change.passes_BEN[-1] @ np.array(decoder.mode.widths)
        return 3 + passes + 0.5 * change.draft_steps_B, after

    monkeypatch.setattr(measure, "_timed", clocked)
    found = measure.seconds(decoder, BATCH, SLOTS)
    np.testing.assert_allclose(found["passes"], decoder.mode.widths, rtol=1e-5)
    np.testing.assert_allclose(found["draft"], 0.5, rtol=1e-4)
    # A step that all rows leave runs no last block, and the next is 4 wide; but for asking.
    heads = traffic(*model_and_params).shares()[1][:2]
    np.testing.assert_allclose(found["saved"], 2 - (0 + 4) + heads, rtol=1e-4)


def test_the_program_is_the_one_that_decodes(model_and_params, cache):
    decoder = decoder_of(*model_and_params, pending=6)
    costs = measure.costs(decoder, BATCH, SLOTS)
    programs = decode._cache_size()
    decoder = dataclasses.replace(decoder, costs=costs)
    state = decoder.start([[1, 2, 3]] * BATCH, [8] * BATCH, jax.random.key(0), SLOTS)
    decoder.run(state)
    assert decode._cache_size() == programs


def test_it_is_measured_once(model_and_params, cache, monkeypatch):
    decoder = decoder_of(*model_and_params)
    told = {"passes": [2.0, 3.0, 4.0], "draft": 0.5, "heads": 1.5, "saved": [1.0, -0.5]}
    calls = []
    monkeypatch.setattr(measure, "seconds", lambda *args: calls.append(args) or told)
    for _ in range(2):
        costs = measure.costs(decoder, BATCH, SLOTS)
        np.testing.assert_array_equal(costs.passes_N, [1, 1.5, 2])
        assert costs.draft == 0.25 and costs.heads == 1.5
        np.testing.assert_array_equal(costs.saved_E, [0.5, -0.25])
    assert len(calls) == 1
    # Another batch, other drafters and other widths cost something else.
    measure.costs(decoder, BATCH + 1, SLOTS)
    measure.costs(decoder_of(*model_and_params, verified("lookup")), BATCH, SLOTS)
    measure.costs(decoder_of(*model_and_params, pending=4), BATCH, SLOTS)
    assert len(calls) == 4


def test_a_mode_is_served_as_far_as_the_model_goes(tiny, model_and_params):
    plain, recurrent = tiny[0], model_and_params[0]
    assert served(VERIFIED, plain).name == "verified: exits + lookup"
    assert served(VERIFIED, recurrent) == VERIFIED
    assert served(LOSSY, plain) == LOSSY
    with pytest.raises(ValueError, match="nothing to draft with by recurrent"):
        served(verified("recurrent"), plain)
