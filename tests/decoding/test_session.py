"""Requests that come and go: each gets what it gets alone, whoever shares its batch."""

import dataclasses
import functools

import jax
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from conftest import build
from early_exit import policy as policies
from early_exit.decoding import decode as programs
from early_exit.decoding.decoder import Decoder
from early_exit.decoding.generate import generate
from early_exit.decoding.mode import LOSSY, VERIFIED
from early_exit.decoding.prefixes import Prefixes
from early_exit.decoding.sampling import GREEDY, Sampling
from early_exit.decoding.session import CANCELLED, LENGTH, STOP, Request, Session

PROMPTS = [[7, 3, 52, 11, 29], [1], list(range(30)), [5, 9, 31, 2] * 6, [60, 0, 60]]
LONG = [(7 * i + i // 9) % 61 for i in range(150)]
OWN, HOT = [0.0, 0.5], Sampling(0.9, top_k=20)
MODES = {"lossy": LOSSY, "verified": dataclasses.replace(VERIFIED, pending=4)}
# By itself: what a request for a prompt may ask for beside it.
ASKED = [
    {"max_new_tokens": 9},
    {"max_new_tokens": 14, "sampling": HOT, "seed": 3},
    {"max_new_tokens": 1},
    {"max_new_tokens": 12, "thresholds": OWN},
    {"max_new_tokens": 20, "stop_ids": [5, 9, 11, 30, 31, 2]},
    {"max_new_tokens": 8, "sampling": Sampling(1.3, top_p=0.8), "thresholds": [np.inf, np.inf]},
]


@functools.cache
def decoder(mode):
    model, params = build(recurrent_taps=(2, 6))
    return Decoder(model, params, policies.make([0.1, 0.08]), (), MODES[mode])


@functools.cache
def alone(mode, prompt, asked):
    """What a request gets that nobody shares a batch with, by plain `generate`."""
    one = decoder(mode)
    asked = dict(ASKED[asked])
    policy = policies.make(asked.pop("thresholds", one.policy.thresholds))
    asked = {"sampling": GREEDY, "stop_ids": (), "seed": 0} | asked
    how = {"policy": policy, "mode": one.mode} | asked
    (answer,) = generate(one.model, one.params, [PROMPTS[prompt]], **how)
    return answer


class Told:
    """What requests were told: their tokens, one by one, and how they ended, by number."""

    def __init__(self):
        self.tokens, self.ended = {}, {}

    def take(self, events):
        for event in events:
            assert event.id not in self.ended, "an answer ended twice"
            tokens = self.tokens.setdefault(event.id, [])
            assert event.first == len(tokens)
            if event.answer is not None:
                tokens += event.answer.tokens[event.first :].tolist()
                assert event.answer.tokens.tolist() == tokens
            if event.ended:
                self.ended[event.id] = event
        return events

    def all_of(self, session, **how):
        while session.busy:
            self.take(session.step(**how))
        return self


# What happens: a request is added, or one is cancelled, or a step is made.
ACTIONS = st.lists(
    st.one_of(
        st.tuples(st.integers(0, len(PROMPTS) - 1), st.integers(0, len(ASKED) - 1)),
        st.tuples(st.just("cancel"), st.integers(0, 12)),
        st.tuples(st.just("step"), st.integers(1, 5)),
    ),
    min_size=4,
    max_size=24,
)


@pytest.mark.long
@pytest.mark.parametrize("mode", MODES)
@settings(max_examples=8, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(actions=ACTIONS)
def test_each_request_gets_what_it_gets_alone(mode, actions):
    """Joins, leaves and cancels in any order, with rules of their own."""
    session, asked, told = Session(decoder(mode), rows=4, sizes=(1, 4)), {}, Told()
    for what, which in actions:
        if what == "step":
            told.take(session.step(which))
        elif what == "cancel":
            assert session.cancel(which) == (which in asked and which not in told.ended)
            told.take(session.step(1))
        else:
            asked[session.add(Request(PROMPTS[what], **ASKED[which]))] = what, which
    told.all_of(session, steps=3)
    assert told.ended.keys() == asked.keys()
    for number, event in told.ended.items():
        expected, tokens = alone(mode, *asked[number]), told.tokens[number]
        assert tokens == expected.tokens[: len(tokens)].tolist()
        if event.ended == CANCELLED:
            continue
        assert len(tokens) == len(expected.tokens)
        np.testing.assert_allclose(event.answer.log_probs, expected.log_probs, atol=1e-4)
        if not MODES[mode].verified:
            assert event.answer.exits.tolist() == expected.exits.tolist()
        stops = ASKED[asked[number][1]].get("stop_ids", ())
        assert event.ended == (STOP if expected.tokens[-1] in stops else LENGTH)


@pytest.mark.parametrize("mode", MODES)
def test_a_long_prompt_is_read_between_the_steps_of_others(mode):
    """And changes nothing for them, nor they for it."""
    session, told = Session(decoder(mode), rows=2), Told()
    first = session.add(Request(PROMPTS[0], max_new_tokens=60))
    told.take(session.step(1))
    second = session.add(Request(LONG, max_new_tokens=8))
    moved = [told.take(session.step(1)) for _ in range(2)]
    # Three chunks: while they were read, the first went on, and the second had nothing yet.
    assert all([event.id for event in events] == [first] for events in moved)
    ended = told.all_of(session).ended
    how = {"policy": decoder(mode).policy, "mode": decoder(mode).mode}
    for number, prompt, new in ((first, PROMPTS[0], 60), (second, LONG, 8)):
        (expected,) = generate(
            decoder(mode).model, decoder(mode).params, [prompt], max_new_tokens=new, **how
        )
        assert ended[number].answer.tokens.tolist() == expected.tokens.tolist()


@pytest.mark.parametrize("mode", MODES)
def test_prompts_that_begin_alike_are_read_once(mode, monkeypatch):
    read = []
    whole = Decoder.read

    def counted(self, state, rules=None, *, chunks):
        read.append(int(chunks))
        return whole(self, state, rules, chunks=chunks)

    monkeypatch.setattr(Decoder, "read", counted)
    session = Session(decoder(mode), rows=2, prefix_bytes=1 << 24)
    prompts = {
        "first": LONG,
        "the same": LONG,
        "longer": [*LONG, *LONG[:60]],
        "shorter": LONG[:70],
        "other end": [*LONG[:128], 5, 5, 5],
        "other middle": [*LONG[:64], 1, *LONG[65:]],
        "nothing alike": LONG[1:],
    }
    expected_chunks = [3, 1, 2, 1, 1, 2, 3]
    one = decoder(mode)
    how = {"policy": one.policy, "mode": one.mode, "max_new_tokens": 8}
    for (name, prompt), chunks in zip(prompts.items(), expected_chunks, strict=True):
        read.clear()
        number = session.add(Request(prompt, 8))
        ended = Told().all_of(session).ended
        assert sum(read) == chunks, name
        monkeypatch.setattr(Decoder, "read", whole)
        (expected,) = generate(one.model, one.params, [prompt], **how)
        monkeypatch.setattr(Decoder, "read", counted)
        assert ended[number].answer.tokens.tolist() == expected.tokens.tolist(), name
        np.testing.assert_allclose(ended[number].answer.log_probs, expected.log_probs, atol=1e-4)


def test_what_is_kept_of_prompts_has_its_room():
    """The oldest go; one that is larger than all room is not kept."""
    one = decoder("verified")
    state = one.start([LONG], 4, jax.random.key(0), None)
    size = sum(x.nbytes for x in jax.tree.leaves((state.cache, state.kept)))
    kept = Prefixes(one.model, one.mode, int(2.5 * size), 64)
    prompts = [[row, *LONG[1:]] for row in range(3)]
    for prompt in prompts:
        kept.keep(prompt, state, 0, {64: {n: x[:, 0] for n, x in state.taps.items()}})
        assert 0 < kept.bytes <= 2.5 * size
    known = [kept.begun(one.empty([p], 4, jax.random.key(0), None), [p])[1] for p in prompts]
    assert known == [0, 64, 64]
    small = Prefixes(one.model, one.mode, size // 2, 64)
    small.keep(LONG, state, 0, {})
    assert small.bytes == 0


def test_rows_and_slots_are_there_while_they_are_needed():
    """A long request makes room for all; when it has gone, the room goes, too."""
    session = Session(decoder("lossy"), rows=4)
    shapes = []

    def step():
        session.step(2)
        state = session._state
        shapes.append(None if state is None else tuple(state.tokens_BS.shape))

    session.add(Request(PROMPTS[0], max_new_tokens=40))
    step()
    session.add(Request(LONG, max_new_tokens=200))
    for _ in range(3):
        step()
    long = session.add(Request(PROMPTS[1], max_new_tokens=200))
    step()
    assert shapes[0] == (1, 256) and shapes[3] == (2, 512) and shapes[4] == (4, 512)
    assert session.cancel(1)
    step()
    assert shapes[-1] == (2, 256)
    assert session.cancel(long) and session.cancel(0)
    step()
    assert shapes[-1] is None and not session.busy


def test_after_the_first_of_each_size_nothing_is_compiled():
    session = Session(decoder("lossy"), rows=2)

    def busy(temperature, **own):
        for prompt in PROMPTS[:4]:
            session.add(Request(prompt, 5, Sampling(temperature), **own))
        Told().all_of(session)
        return programs.decode._cache_size(), programs.prefill._cache_size()

    session.add(Request(PROMPTS[0], 5))
    Told().all_of(session)
    compiled = busy(0.0)
    assert busy(0.7, stop_ids=[3, 4]) == busy(1.1, thresholds=OWN) == busy(0.0) == compiled


@pytest.mark.parametrize("mode", ["lossy", "verified"])
def test_a_warm_session_compiles_nothing(mode, caplog):
    session = Session(decoder(mode), rows=2, slots=256)
    session.warm()
    assert not session.busy
    with jax.log_compiles():
        for prompt in PROMPTS[:5]:
            session.add(Request(prompt, 5))
        Told().all_of(session)
        assert [told for told in caplog.messages if "Compiling" in told] == []
    session.add(Request(PROMPTS[0], 5))
    with pytest.raises(ValueError, match="before its first request"):
        session.warm()


@pytest.mark.parametrize(
    ("request_", "message"),
    [
        (Request([], 3), "prompt 0 is empty"),
        (Request([1], 0), "asks for 0 new tokens"),
        (Request([1, 61], 3), "the model knows 0 to 60"),
        (Request([1] * 510, 3), "need 513 positions but the model's context is 512"),
        (Request([1], 3, stop_ids=[99]), "the stop tokens go from 99"),
        (Request([1], 3, thresholds=[0.5]), "1 thresholds but the model has 2 exits"),
        (Request([1], 3, thresholds=[0.5, float("nan")]), "one number per exit"),
    ],
)
def test_a_bad_request_is_refused_and_nothing_else_is_touched(request_, message):
    session = Session(decoder("lossy"), rows=2)
    with pytest.raises(ValueError, match=message):
        session.add(request_)
    assert not session.busy


def test_what_a_session_is_not_made_for_is_refused():
    one = decoder("lossy")
    with pytest.raises(ValueError, match="make one with draws=True"):
        Session(one, draws=False).add(Request([1], 3, HOT))
    with pytest.raises(ValueError, match="need 303 slots, but the session has 256"):
        Session(one, slots=256).add(Request([1] * 300, 3))
    with pytest.raises(ValueError, match="there is no policy whose thresholds"):
        Session(dataclasses.replace(one, policy=None)).add(Request([1], 3, thresholds=OWN))
    with pytest.raises(ValueError, match="a batch has at least 1 row, not 0"):
        Session(one, rows=0)
    with pytest.raises(ValueError, match=r"the largest of sizes=\[1, 2\] must be rows=4"):
        Session(one, rows=4, sizes=(1, 2))
    assert not Session(one).cancel(0)
