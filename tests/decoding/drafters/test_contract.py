"""The drafter contract, by drafters that are made here: any of them, and the answer is the full
model's; what the engine keeps for them is what the full model has there."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from slow_decoder import SlowDecoder

from conftest import TINY, build
from early_exit import policy as policies
from early_exit.decoding import drafters
from early_exit.decoding.decoder import Decoder
from early_exit.decoding.drafters import base
from early_exit.decoding.generate import generate
from early_exit.decoding.mode import LOSSY, VERIFIED, Mode
from early_exit.decoding.sampling import GREEDY, Sampling

PROMPTS = [[7, 3, 52, 11], [5], [1, 2, 3, 1, 2, 3, 1, 2], [40, 41, 2]]
NEW = 24


class Oracle(base.Drafter):
    """Proposes the row's answer, with a fault in every third token; keeps what it was told."""

    name, place, credit = "oracle", len(drafters.BY_NAME), 1.0

    def __init__(self, texts, faults=3):
        self.texts, self.faults = texts, faults

    def taps(self, model):
        return (1, model.config.depth)

    def start(self, model, batch, slots, dtype):
        shape = (batch, slots, model.config.width)
        stood, checks = (jnp.zeros(batch, jnp.int32) for _ in range(2))
        return {"seen": jnp.zeros(shape, dtype), "stood": stood, "checks": checks}

    def propose(self, engine, state, proposed):
        """The second answer of a repeated row starts where the first does: rows by their prompt."""
        width = engine.mode.pending - 1
        at = state.newest_B[:, None] + 1 + jnp.arange(width)[None]
        texts = jnp.asarray(self.texts)
        same = (texts[None, :, :2] == state.tokens_BS[:, None, :2]).all(-1)
        text = texts[jnp.argmax(same, axis=1)]
        drafts = jnp.take_along_axis(text, jnp.minimum(at, text.shape[1] - 1), axis=1)
        wrong = (at % self.faults == 0) if self.faults else jnp.zeros_like(at, bool)
        drafts = jnp.where(wrong, (drafts + 1) % engine.model.config.vocab_size, drafts)
        usable = base.free(state)[:, None] & base.draftable(engine, state, drafts)
        return base.drafted(engine, state, proposed, self, drafts, usable.astype(jnp.float32))

    def settle(self, engine, state, rows_B, drafted_B, accepted_B):
        """Keeps the tapped states of the position before the newest: exact, as is promised."""
        mine = state.kept[self.name]
        before = state.newest_B - 1
        tap = state.taps[str(engine.model.config.depth)]
        last = engine.gather(tap, state, before[:, None])[:, 0]
        rows = jnp.arange(len(before))
        at = jnp.where(rows_B, before, mine["seen"].shape[1])
        kept = {
            "seen": mine["seen"].at[rows, at].set(last, mode="drop"),
            "stood": mine["stood"] + jnp.where(rows_B, accepted_B, 0),
            "checks": mine["checks"] + rows_B,
        }
        return state.change(kept=state.kept | {self.name: kept})


@pytest.fixture
def oracle(monkeypatch):
    """Enters a drafter under its name, with the programs of another forgotten."""

    def enter(drafter):
        monkeypatch.setitem(drafters.BY_NAME, drafter.name, drafter)
        jax.clear_caches()
        return drafter

    yield enter
    jax.clear_caches()


def texts_of(answers, length=64):
    texts = [[*prompt, *answer.tokens] for prompt, answer in zip(PROMPTS, answers, strict=True)]
    return np.array([[*text, *[0] * (length - len(text))] for text in texts], np.int32)


@pytest.mark.long
@pytest.mark.parametrize(
    ("names", "sampling"),
    [(("oracle",), GREEDY), (("exits", "oracle"), Sampling(0.8)), (("lookup", "oracle"), GREEDY)],
    ids=["alone", "after exits, sampled", "after lookup"],
)
def test_a_drafter_changes_no_answer(tiny, oracle, names, sampling):
    """Alone or beside others, greedy or sampled, with faults; and right drafts save passes."""
    how = {"max_new_tokens": NEW, "sampling": sampling}
    full = generate(*tiny, PROMPTS, policy=None, mode=Mode("defer", pending=5), **how)
    oracle(Oracle(texts_of(full)))
    checked = Mode("defer", names, pending=5)
    found = generate(*tiny, PROMPTS, policy=policies.make([0.2, 0.2]), mode=checked, **how)
    for got, expected in zip(found, full, strict=True):
        assert got.tokens.tolist() == expected.tokens.tolist()
    drafted, stood = (
        sum(getattr(got.counts, name).sum() for got in found)
        for name in ("drafted_BW", "accepted_BW")
    )
    assert 0 < stood < drafted
    marks = np.unique(np.concatenate([got.exits for got in found]))
    assert marks[-1] == len(tiny[0].exits.points) + Oracle.place


def test_it_is_told_what_stood_and_sees_exact_states(tiny, oracle):
    """Taps of the position before the newest are the full model's, however drafts fell."""
    model, params = tiny
    full = generate(model, params, PROMPTS, policy=None, max_new_tokens=NEW)
    oracle(Oracle(texts_of(full)))
    decoder = Decoder(model, params, None, (), Mode("defer", ("oracle",), pending=5))
    state = decoder.start(PROMPTS, [NEW] * 4, jax.random.key(0), None)
    state = decoder.run(state)
    kept = jax.device_get(state.kept["oracle"])
    counts = jax.device_get(state.counts)
    assert kept["stood"].tolist() == counts.accepted_BW.sum(axis=1).tolist()
    slow = SlowDecoder(model, params)
    for row, (prompt, answer) in enumerate(zip(PROMPTS, full, strict=True)):
        text = [*prompt, *answer.tokens.tolist()]
        hidden = slow.states(text[:-1])[0][-1]
        told = np.flatnonzero(np.abs(kept["seen"][row]).sum(axis=-1))
        assert len(told) == kept["checks"][row] > NEW / 5 and told[-1] == len(text) - 2
        np.testing.assert_allclose(kept["seen"][row][told], hidden[told], atol=1e-4)


def test_taps_after_the_prompt_are_those_of_its_last_position(tiny, oracle):
    """Prompts of more than one chunk, and of other lengths beside them."""
    model, params = tiny
    prompts = [[3, 1, 4] * 50, [9, 8], [7] * 64]
    oracle(Oracle(np.zeros((1, 8), np.int32)))
    decoder = Decoder(model, params, None, (), Mode("defer", ("oracle",), pending=5))
    state = decoder.start(prompts, [4] * 3, jax.random.key(0), None)
    slow = SlowDecoder(model, params)
    for row, prompt in enumerate(prompts):
        hidden = slow.states(prompt)[0]
        slot = int(state.pending_slots(np.int32(len(prompt) - 1)))
        for block in (1, TINY.depth):
            tap = np.asarray(state.taps[str(block)][row, slot])
            np.testing.assert_allclose(tap, hidden[block, -1], atol=1e-4)


def test_modes_without_a_drafter_that_taps_keep_nothing(tiny):
    decoder = Decoder(*tiny, policies.never(2), (), VERIFIED)
    state = decoder.start(PROMPTS[:1], [4], jax.random.key(0), None)
    assert state.taps == {} and set(state.kept) == {"exits", "lookup"}  # it has no recurrent exit
    assert not jax.tree.leaves(state.kept["exits"])


def test_every_drafter_has_a_place_of_its_own():
    places = [drafter.place for drafter in drafters.BY_NAME.values()]
    assert places == list(range(len(places))) and drafters.BY_NAME["exits"].place == 0
    assert drafters.places([3, 6]) == ["block 3", "block 6", "lookup", "recurrent"]
    assert len(drafters.credits(4)) == 4 + 1 + len(places) - 1


def test_right_drafts_fill_the_passes(oracle):
    """A drafter that is never wrong: each pass gives as many tokens as may wait."""
    (model, params), pending = build(seed=3), 5
    full = generate(model, params, PROMPTS[:1], policy=None, max_new_tokens=NEW, mode=LOSSY)
    oracle(Oracle(texts_of(full * 4), faults=0))
    mode = Mode("defer", ("oracle",), pending=pending)
    (got,) = generate(model, params, PROMPTS[:1], policy=None, max_new_tokens=NEW, mode=mode)
    assert got.tokens.tolist() == full[0].tokens.tolist()
    passes = got.counts.passes_BEN[-1].sum()
    assert passes == -(-(NEW - 1) // pending)
