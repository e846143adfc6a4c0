"""Recurrent exits in decoding: what they draft is what their chains say, whatever came before."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from slow_chain import slow_chain

from conftest import TINY, build
from early_exit import policy as policies
from early_exit.decoding.costs import Costs
from early_exit.decoding.decoder import Decoder
from early_exit.decoding.drafters import base
from early_exit.decoding.drafters.recurrent import Recurrent
from early_exit.decoding.engine import Engine
from early_exit.decoding.mode import DEFERRED, VERIFIED, Mode, verified
from early_exit.decoding.sampling import GREEDY, Sampling
from early_exit.policy import DraftPolicy

PROMPTS = [[7, 3, 52, 11] * 20, [5], [1, 2, 3, 1, 2, 3, 1, 2], [40, 41, 2]]
NEW = 24
TAPS = {"recurrent_taps": (2, 5, 6)}


def free(mode, batch=1):
    """Costs by which everything that can be drafted is drafted and checked."""
    return Costs(jnp.ones(len(mode.widths)), jnp.float32(0))


@pytest.fixture(scope="module")
def model_and_params():
    return build(**TAPS)


@functools.partial(jax.jit, static_argnames=("model", "mode"))
def proposed(params, rules, costs, state, *, model, mode):
    engine = Engine.of(params, rules, costs, model=model, mode=mode)
    (drafter,) = (d for d in engine.drafters if d.name == "recurrent")
    nothing = base.Proposed.nothing(len(state.newest_B), mode.capacity - 1)
    return drafter.propose(engine, state, nothing)[0]


def drafts_of(decoder, state):
    """What each row's newest token is followed by after the recurrent exit has proposed."""
    how = {"model": decoder.model, "mode": decoder.mode}
    rules = decoder.rules(len(state.newest_B))
    after = proposed(decoder.params, rules, decoder.costs, state, **how)
    return [
        np.asarray(after.tokens_BS[row, state.newest_B[row] + 1 : after.newest_B[row] + 1]).tolist()
        for row in range(len(state.newest_B))
    ]


@pytest.mark.long
@pytest.mark.parametrize(
    ("blocks", "names"), [(0, ("recurrent",)), (1, ("lookup", "recurrent")), (2, ("recurrent",))]
)
def test_drafts_are_the_chain_s_after_any_passes(blocks, names):
    """After the prompt, and after passes in which drafts of either kind stood or fell."""
    model, params = build(**TAPS, recurrent_blocks=blocks)
    mode = Mode("defer", names, pending=5)
    decoder = Decoder(model, params, None, (), mode, free(mode))
    state = decoder.start(PROMPTS, [NEW] * 4, jax.random.key(0), None)
    for steps in (0, 1, 3):
        state = decoder.run(state, steps=steps)
        found = drafts_of(decoder, state)
        for row, drafts in enumerate(found):
            assert len(drafts) == mode.pending - 1
            text, newest = state.tokens_BS[row], state.newest_B[row]
            how = {"model": model, "steps": len(drafts), "own": True}
            assert drafts == slow_chain(params, text, newest, **how)[1].tolist(), (steps, row)


MODES = {
    "recurrent": verified("recurrent"),
    "all": VERIFIED,
    "sampled": verified("recurrent"),
}


@pytest.mark.long
@pytest.mark.parametrize(
    ("mode", "costs"),
    [("recurrent", free), ("all", free), ("sampled", free), ("all", Costs.assumed)],
)
def test_the_answer_is_the_full_model_s(model_and_params, mode, costs):
    model, params = model_and_params
    sampling = Sampling(0.9, top_p=0.95) if mode == "sampled" else GREEDY
    mode = dataclasses.replace(MODES[mode], pending=5)
    full = answers(model, params, None, DEFERRED, None, sampling=sampling)
    policy = policies.make([0.2, 0.2])
    found = answers(model, params, policy, mode, costs(mode, 4), sampling=sampling)
    for got, expected in zip(found, full, strict=True):
        assert got.tokens.tolist() == expected.tokens.tolist()
        np.testing.assert_allclose(got.log_probs, expected.log_probs, atol=1e-4)
    drafted = sum(got.counts.drafted_BW.sum() for got in found)
    assert drafted > 0 or costs is not free


def answers(model, params, policy, mode, costs, stop_ids=(), prompts=PROMPTS, sampling=GREEDY):
    decoder = Decoder(model, params, policy, stop_ids, mode, costs, sampling)
    state = decoder.start(prompts, [NEW] * len(prompts), jax.random.key(3), 256)
    return decoder.generations(decoder.run(state), [0.0] * len(prompts))


def test_rows_are_what_they_are_alone(model_and_params):
    model, params = model_and_params
    mode = dataclasses.replace(VERIFIED, pending=5)
    together = answers(model, params, policies.make([0.2, 0.2]), mode, free(mode), (3, 9))
    for prompt, expected in zip(PROMPTS, together, strict=True):
        (alone,) = answers(
            model, params, policies.make([0.2, 0.2]), mode, free(mode), (3, 9), [prompt]
        )
        assert alone.tokens.tolist() == expected.tokens.tolist()
        assert not set(alone.tokens[:-1].tolist()) & {3, 9}


def always(steps=4):
    return DraftPolicy(jnp.full(steps, -jnp.inf), jnp.full((steps, 10), 0.5))


def test_deferred_drafts_stand_with_exact_keys(model_and_params):
    """Every draft stands; what the full model then says is said after exactly this text."""
    model, params = model_and_params
    policy = dataclasses.replace(policies.never(2), drafts=always())
    mode = dataclasses.replace(DEFERRED, pending=5)
    for prompt, answer in zip(PROMPTS, answers(model, params, policy, mode, None), strict=True):
        mark = len(model.exits.points) + 2
        by_full = np.flatnonzero(answer.exits == len(model.exits.points))
        assert (answer.exits == mark).sum() > len(by_full)
        text = np.array([*prompt, *answer.tokens])
        bound = model.bind(params)
        hidden, context = bound.backbone.stem({"tokens": jnp.asarray(text)[None]})
        last = bound.backbone.run_blocks(hidden, 0, TINY.depth, context)
        log_probs = jax.nn.log_softmax(bound.backbone.readout(last))[0]
        for i in by_full:
            before = len(prompt) + i - 1
            assert int(log_probs[before].argmax()) == answer.tokens[i]
            np.testing.assert_allclose(log_probs[before].max(), answer.log_probs[i], atol=1e-4)
        # The drafts between are the chain's, after the text as it stood.
        first = len(prompt) + by_full[0] + 1
        padded = np.pad(text, (0, 128 - len(text)))
        how = {"model": model, "steps": 4, "own": True}
        drafts = slow_chain(params, padded, first - 1, **how)[1].tolist()
        count = min(4, int(by_full[1] - by_full[0] - 1)) if len(by_full) > 1 else 4
        assert text[first : first + count].tolist() == drafts[:count]


def test_deferred_thresholds_end_chains(model_and_params):
    """A step that never stands ends every chain in front of it."""
    model, params = model_and_params
    never = DraftPolicy(jnp.array([-jnp.inf, jnp.inf, -jnp.inf]), jnp.full((3, 10), 0.5))
    policy = dataclasses.replace(policies.never(2), drafts=never)
    mode = dataclasses.replace(DEFERRED, pending=5)
    for answer in answers(model, params, policy, mode, None):
        drafted = (answer.exits == len(model.exits.points) + 2).astype(int)
        assert drafted.any() and not (drafted[1:] & drafted[:-1]).any()


@pytest.mark.parametrize(("promised", "stands"), [(0.8, 0.4), (0.5, 0.55), (0.6, 0.05)])
def test_trust_makes_of_a_promise_what_is_kept(promised, stands):
    """Rows whose drafts stand with one probability, and are promised to do so with another."""
    rng, rows, drafted = np.random.default_rng(0), 64, 4
    kept = {"trust_B": jnp.ones(rows)}
    found = []
    for _ in range(120):
        kept["promised_B"] = promised * kept["trust_B"]
        accepted = np.cumprod(rng.random((rows, drafted)) < stands, axis=1).sum(1)
        told = [jnp.ones(rows, bool), jnp.full(rows, drafted), jnp.array(accepted)]
        kept["trust_B"] = Recurrent._learned(kept, *told)
        found.append(promised * kept["trust_B"])
    assert abs(np.mean(found[40:]) - stands) < 0.03
    # Rows that drafted nothing, or were not checked, have learned nothing.
    before = kept["trust_B"]
    for nothing in ({"promised_B": jnp.zeros(rows)}, {}):
        told[0] = jnp.array([bool(nothing)] * rows)
        np.testing.assert_array_equal(Recurrent._learned(kept | nothing, *told), before)


def test_drafts_that_never_stand_are_made_no_more(model_and_params):
    """Each is promised to stand, and the head is made to say what the model never does."""
    model, params = model_and_params
    mode = dataclasses.replace(verified("recurrent"), pending=5)
    policy = dataclasses.replace(policies.never(2), drafts=always())
    wrong = jax.tree.map(lambda x: x, params)
    wrong["exits"]["recurrent"] = jax.tree.map(jnp.negative, params["exits"]["recurrent"])
    costs = Costs(jnp.linspace(1, 1.6, len(mode.widths)), jnp.float32(0.02))
    decoder = Decoder(model, wrong, policy, (), mode, costs)
    state = decoder.start(PROMPTS[:1], [100], jax.random.key(0), 256)
    trusted, drafts = [], []
    for _ in range(8):
        state = decoder.run(state, steps=10)
        trusted.append(float(state.kept["recurrent"]["trust_B"][0]))
        drafts.append(float(state.counts.draft_steps_B[0]))
    # A few were enough to learn it. Trust comes back slowly, and is lost when it is tried again.
    assert max(trusted) < 0.7 and drafts[-1] < 30, (trusted, drafts)


def test_costs_decide_how_much_is_checked(model_and_params):
    """Where wide passes cost much, none is made; where another step costs much, none either."""
    model, params = model_and_params
    sure = dataclasses.replace(
        always(), stands_KN=jnp.full((4, 10), 0.9), thresholds_K=jnp.full(4, jnp.inf)
    )
    policy = dataclasses.replace(policies.never(2), drafts=sure)
    mode = Mode("defer", ("recurrent",), pending=8)
    for passes, draft, widths in (
        ([1, 1, 1], 0.0, {8}),
        ([1, 1, 9], 0.0, {1, 4}),
        ([1, 9, 9], 0.0, {1}),
        ([1, 1, 1], 9.0, {1}),
    ):
        costs = Costs(jnp.array(passes, jnp.float32), jnp.float32(draft))
        (answer,) = answers(model, params, policy, mode, costs, prompts=PROMPTS[:1])
        met = {mode.widths[i] for i in np.flatnonzero(answer.counts.passes_BEN[-1])}
        # The last positions of an answer leave no room for more.
        assert max(met) == max(widths) and met <= widths | {1, 4}, (passes, draft)
