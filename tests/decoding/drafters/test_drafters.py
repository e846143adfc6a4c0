import dataclasses
import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from conftest import build
from early_exit import policy as policies
from early_exit.cost.traffic import traffic
from early_exit.decoding.costs import POSITION, Costs
from early_exit.decoding.decoder import Decoder
from early_exit.decoding.drafters import BY_NAME, base, lookup
from early_exit.decoding.engine import Engine
from early_exit.decoding.generate import generate
from early_exit.decoding.mode import Mode

SLOTS, COUNT = 40, 7
look_up = jax.jit(lookup.look_up, static_argnames="count")


def looked_up(texts, count=COUNT, rubbish=0):
    """What is found for texts side by side, something else lying in the slots behind them."""
    tokens = np.random.default_rng(rubbish).integers(0, 3, (len(texts), SLOTS))
    for row, text in zip(tokens, texts, strict=True):
        row[: len(text)] = text
    newest = np.array([len(text) - 1 for text in texts])
    drafts, length = look_up(jnp.asarray(tokens, jnp.int32), jnp.asarray(newest), count)
    enough = np.asarray(length) >= lookup.SHORTEST_MATCH
    return [row if ok else None for row, ok in zip(drafts.tolist(), enough, strict=True)]


def by_definition(text, count=COUNT):
    """What follows the longest earlier match of the end of the text, the latest of several."""
    for length in range(lookup.LONGEST_MATCH, lookup.SHORTEST_MATCH - 1, -1):
        for end in range(len(text) - 1, length - 1, -1):
            if text[end - length : end] == text[-length:]:
                return list(itertools.islice(itertools.cycle(text[end:]), count))
    return None


# Few different tokens, so that matches are frequent; texts of one token, and full ones.
TEXTS = st.integers(1, 3).flatmap(
    lambda most: st.lists(st.integers(0, most), min_size=1, max_size=SLOTS)
)


@settings(max_examples=150, deadline=None)
@given(st.lists(TEXTS, min_size=4, max_size=4), st.integers(0, 9))
def test_lookup_equals_a_search_by_definition(texts, rubbish):
    """In every row by its own text, whatever lies in the slots behind."""
    assert looked_up(texts, rubbish=rubbish) == [by_definition(text) for text in texts]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ([1, 2, 3, 4, 5, 6, 1, 2], [3, 4, 5, 6, 1, 2, 3]),  # goes on from its start
        ([1, 2, 8, 1, 2, 9, 1, 2], [9, 1, 2, 9, 1, 2, 9]),  # the latest of two
        ([7, 1, 2, 8, 3, 1, 2, 9, 7, 1, 2], [8, 3, 1, 2, 9, 7, 1]),  # a longer match before it
        ([5, 5, 5], [5] * 7),  # a match may overlap with what it matches
        ([1, 2, 3, 4, 2], None),  # a single token is too little
        ([1, 2, 3, 4], None),
        ([4], None),
    ],
)
def test_lookup_examples(text, expected):
    assert looked_up([text]) == [expected]


def test_no_match_counts_for_more_than_the_longest():
    longest = list(range(10, 10 + lookup.LONGEST_MATCH))
    assert looked_up([[1, *longest, 2, 0, *longest, 3, 1, *longest]]) == [[3, 1, *longest][:COUNT]]


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 2**32 - 1))
def test_accepted_drafts_are_those_before_the_first_wrong_one(seed):
    rng = np.random.default_rng(seed)
    drafts, chosen = rng.integers(0, 2, (2, 4, 5))
    count = rng.integers(0, 6, 4)
    expected = []
    for row in range(4):
        stood = 0
        while stood < count[row] and drafts[row, stood] == chosen[row, stood]:
            stood += 1
        expected.append(stood)
    assert base.accepted(drafts, chosen, jnp.asarray(count)).tolist() == expected


def test_only_the_sources_of_drafts_are_credited():
    """Three rows: both of exit 0's stand; one of exit 1's falls; none was drafted."""
    got = base.settled(
        jnp.full((3, 3), 0.25),
        source_BW=jnp.array([[0, 0], [0, 1], [0, 0]]),
        kept_BW=jnp.array([[True, True], [True, False], [False, False]]),
        dropped_BW=jnp.array([[False, False], [False, True], [False, False]]),
        gains=jnp.array([0.5, 0.125, 1.0]),
        losses=jnp.array([0.25, 0.75, 1.0]),
    )
    change = np.array([[1.0, 0, 0], [0.5, -0.75, 0], [0, 0, 0]]) / base.MEMORY
    np.testing.assert_allclose(got, 0.25 + change, rtol=1e-6)


@functools.partial(jax.jit, static_argnames=("price", "gain", "loss"))
def live(pays_N, *, price=0.04, gain=0.6, loss=0.5):
    """Whether one source is consulted for each token, if it drafts each time, rightly or not."""

    def token(worth_B, pays):
        asked_B = worth_B >= 0
        worth_B = base.asked(worth_B, asked_B, price)
        worth_BE = base.settled(
            worth_B[:, None],
            jnp.zeros((1, 1), jnp.int32),
            (asked_B & pays)[:, None],
            (asked_B & ~pays)[:, None],
            jnp.array([gain]),
            jnp.array([loss]),
        )
        return base.passed_over(worth_BE[:, 0], ~asked_B), asked_B[0]

    return jax.lax.scan(token, jnp.full(1, BY_NAME["exits"].credit), pays_N)[1]


# What a source may lose before its running mean is below zero.
CREDIT = BY_NAME["exits"].credit * base.MEMORY


def test_a_source_that_never_pays_costs_no_more_than_the_insurance():
    asked = np.asarray(live(np.zeros(20000, bool)))
    cost = 0.04 + 0.5
    assert asked[:2].all() and asked[10000:].any()
    assert asked.sum() * cost <= CREDIT + cost + base.INSURANCE * asked.size
    # Later on, between two attempts, as many tokens as the first of them cost.
    pauses = np.diff(np.flatnonzero(asked))[10:]
    assert pauses.min() >= cost / base.INSURANCE - 1


def test_a_source_that_pays_stays_on():
    assert np.asarray(live(np.ones(500, bool))).all()
    # Two of three right: 2 · 0.6 − 0.5 > 3 · 0.04.
    assert np.asarray(live(np.arange(500) % 3 > 0)).all()


def test_a_source_that_pays_again_comes_back():
    pays = np.repeat([True, False, True], 600)
    asked = np.asarray(live(pays))
    assert asked[:600].all()
    first, between, last = asked.reshape(3, 600)
    assert between[-300:].mean() < 0.05 and first.all()
    # Back with the first attempt that pays, so after one pause at the latest.
    assert last[150:].all()


def test_drafts_that_never_stand_cost_little_in_the_loop(tiny):
    """The exits of a random model say what the full model does not; one draft at a time."""
    model, params = tiny
    mode = Mode("defer", ("exits",), pending=2)
    policy, tokens = policies.forced(2, 1), 400
    (got,) = generate(model, params, [[7, 3, 52]], policy=policy, mode=mode, max_new_tokens=tokens)
    asked, drafted = int(got.counts.evaluations_BE[1]), got.counts.drafted_BW.sum()
    accepted = int(got.counts.accepted_BW.sum())
    assert 0 < drafted <= asked and accepted < 0.2 * drafted
    depths, heads = traffic(model, params).shares()
    # The head, and the blocks before it once more for the token that the full model says instead.
    spent = asked * heads[1] + (drafted - accepted) * depths[1]
    dearest = heads[1] + depths[1] + POSITION
    assert spent <= CREDIT + dearest + base.INSURANCE * tokens + accepted


PERIODIC = [5, 9, 31, 2] * 6


def after_prompt(names=("lookup", "recurrent"), prompts=(PERIODIC, PERIODIC)):
    """(engine, state) behind prompts of a model with a recurrent exit."""
    model, params = build(recurrent_taps=(2, 6))
    mode = Mode("defer", names, pending=5)
    costs = Costs.assumed(mode, len(prompts))
    decoder = Decoder(model, params, None, (), mode, costs)
    state = decoder.start(list(prompts), [24] * len(prompts), jax.random.key(0), None)
    # The first token that the random model said, replaced by what the period asks for.
    rows = jnp.arange(len(prompts))
    tokens = state.tokens_BS.at[rows, state.newest_B].set(PERIODIC[0])
    engine = Engine.of(params, decoder.rules(len(prompts)), costs, model=model, mode=mode)
    return engine, state.change(tokens_BS=tokens)


def proposed(engine, state):
    """(the state after lookup has proposed, how many tokens in each row)."""
    nothing = base.Proposed.nothing(len(state.newest_B), engine.mode.capacity - 1)
    after, _ = BY_NAME["lookup"].propose(engine, state, nothing)
    return after, (after.newest_B - state.newest_B).tolist()


def test_lookup_learns_how_often_drafts_stand_after_matches_of_each_length():
    engine, state = after_prompt()
    assert proposed(engine, state)[1] == [4, 4]
    before = np.asarray(state.kept["lookup"]["stands_BL"])
    # Of the first row half stand and then one does not; of the second all, but none is checked.
    rows, drafted, accepted = jnp.array([True, False]), jnp.array([2, 4]), jnp.array([1, 4])
    for _ in range(40):
        state, _ = proposed(engine, state)
        state = BY_NAME["lookup"].settle(engine, state, rows, drafted, accepted)
        state = state.change(newest_B=state.prompt_B)
    stands = np.asarray(state.kept["lookup"]["stands_BL"])
    np.testing.assert_allclose(stands[1], before[1], rtol=1e-5)
    np.testing.assert_allclose(stands[0, :-1], before[0, :-1], rtol=1e-5)
    assert 0.5 < stands[0, -1] < 0.55
    for _ in range(40):  # and then nothing
        state, _ = proposed(engine, state)
        state = BY_NAME["lookup"].settle(engine, state, rows, drafted, 0 * accepted)
        state = state.change(newest_B=state.prompt_B)
    assert proposed(engine, state)[1] == [0, 4]
    for _ in range(300):  # what it was known for before comes back
        state, _ = proposed(engine, state)
        state = state.change(newest_B=state.prompt_B)
    assert proposed(engine, state)[1] == [4, 4]


def test_drafts_that_were_not_checked_teach_nothing():
    """Two of four were handed on, and both stood: no draft has failed."""
    engine, state = after_prompt()
    before = state.kept["lookup"]["stands_BL"]
    state, _ = proposed(engine, state)
    two = jnp.array([2, 0])
    state = BY_NAME["lookup"].settle(engine, state, jnp.array([True, True]), two, two)
    change = np.asarray(state.kept["lookup"]["stands_BL"] - before)
    assert change[0, -1] > 0 and not change[1].any() and not change[0, :-1].any()


def test_lookup_leaves_the_turn_to_drafters_that_are_worth_more():
    engine, state = after_prompt()
    rival = engine.final + BY_NAME["recurrent"].place
    worth = state.worth_BN.at[0, rival].set(0.5).at[1, rival].set(9.0)
    assert proposed(engine, state.change(worth_BN=worth))[1] == [4, 0]
    alone, state = after_prompt(("lookup",))
    assert proposed(alone, state.change(worth_BN=worth))[1] == [4, 4]


@pytest.mark.parametrize(
    ("passes", "reach", "rate", "kept"),
    [
        # A pass of four costs half a pass more, so a token for these two rows. One row's drafts
        # are worth 0.9 + 0.8 + 0.7 tokens; or 0.3 + 0.2 + 0.1, which do not pay for it.
        ([1, 1.5, 9], [[0.9, 0.8, 0.7, 0.6], [0, 0, 0, 0]], 1.0, [3, 0]),
        ([1, 1.5, 9], [[0.3, 0.2, 0.1, 0.1], [0, 0, 0, 0]], 1.0, [0, 0]),
        # With the other row's they do.
        ([1, 1.5, 9], [[0.3, 0.2, 0.1, 0.1], [0.5, 0, 0, 0]], 1.0, [3, 1]),
        # Where a pass has given three tokens a row, half a pass is worth three times as much.
        ([1, 1.5, 9], [[0.9, 0.8, 0.7, 0.6], [0, 0, 0, 0]], 3.0, [0, 0]),
        ([1, 1.5, 1.6], [[0.9, 0.8, 0.7, 0.6], [0, 0, 0, 0]], 1.0, [4, 0]),
    ],
)
def test_as_much_is_handed_on_as_is_worth_the_pass(passes, reach, rate, kept):
    engine, state = after_prompt()
    mode = dataclasses.replace(engine.mode, pending=5)
    assert mode.widths == (1, 4, 5)
    costs = Costs(jnp.array(passes, jnp.float32), jnp.float32(0))
    engine = dataclasses.replace(engine, costs=costs)
    reach, before = jnp.array(reach, jnp.float32), state.newest_B
    state = state.change(rate_B=jnp.full(2, rate))
    drafts = jnp.full((2, 4), 7)
    nothing = base.Proposed.nothing(2, 4)
    state, found = base.drafted(engine, state, nothing, BY_NAME["lookup"], drafts, reach)
    state = base.handed_on(engine, state, found)
    assert (state.newest_B - before).tolist() == kept


def test_exits_are_not_asked_where_wider_passes_cost_as_much_as_further_ones(tiny):
    """At best a draft saves its row a pass; where the wider one costs that, no head is run."""
    model, params = tiny
    mode, policy = Mode("defer", ("exits",), pending=4), policies.make([0.0, 0.0])
    for second, asked in ((1.2, True), (2.0, False), (2.5, False)):
        costs = Costs(jnp.array([1, second], jnp.float32), jnp.float32(0))
        decoder = Decoder(model, params, policy, (), mode, costs)
        state = decoder.run(decoder.start([[7, 3, 52]] * 2, [12] * 2, jax.random.key(0), None))
        assert bool(state.counts.evaluations_BE[:, :-1].sum()) == asked


@pytest.mark.parametrize(
    ("saved", "rate", "asked"),
    [
        ([0.5, 0.4], 1.0, [True, True]),
        ([0.5, -0.1], 1.0, [True, False]),  # as measured, whatever the weights say
        ([-0.1, 0.4], 1.0, [False, True]),
        ([0.5, 0.4], 1.2, [True, True]),
        ([0.9, 0.4], 2.0, [True, False]),  # what is drafted ahead gives as much
        ([0.9, 0.4], 20.0, [False, False]),
    ],
)
def test_exits_are_asked_where_that_can_pay(tiny, saved, rate, asked):
    model, params = tiny
    mode, policy = Mode("defer", ("exits",), pending=4), policies.make([2.0, 2.0])  # nobody leaves
    costs = Costs(jnp.array([1, 1.2]), jnp.float32(0), saved_E=jnp.array(saved))
    decoder = Decoder(model, params, policy, (), mode, costs)
    state = decoder.start([[7, 3, 52]], [12], jax.random.key(0), None)
    state = decoder.run(state.change(rate_B=jnp.full(1, rate)), steps=1)
    assert (state.counts.evaluations_BE[0, :-1] > 0).tolist() == asked


def test_rows_learn_from_each_other_what_a_source_is_worth(tiny):
    """One that has lost more than the other has gained: neither row asks."""
    model, params = tiny
    decoder = Decoder(model, params, None, (), Mode("defer", ("exits",), pending=4))
    state = decoder.start([[7, 3, 52]] * 2, [12] * 2, jax.random.key(0), None)
    for worths, ended, expected in (
        ([0.1, -0.2], [False, False], False),
        ([0.1, -0.05], [False, False], True),
        ([0.1, -0.2], [False, True], True),
    ):
        worth = state.worth_BN.at[:, 0].set(jnp.array(worths))
        now = state.change(worth_BN=worth, finished_B=jnp.array(ended))
        assert bool(base.worthwhile(now, 0)) == expected
