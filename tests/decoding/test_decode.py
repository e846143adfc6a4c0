"""The engine against a slow decoder that recomputes everything, without cache or branches."""

import dataclasses
import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from slow_decoder import CLOSE, SlowDecoder, mixed_policy, softmax

from conftest import build
from early_exit import policy as policies
from early_exit.backbones.cached_attention import CACHE_CHUNK
from early_exit.backbones.decoder import DecoderConfig
from early_exit.decoding import decode as decoding
from early_exit.decoding.costs import Costs
from early_exit.decoding.decoder import Decoder
from early_exit.decoding.generate import generate
from early_exit.decoding.mode import DEFERRED, LOSSY, VERIFIED, Mode, verified
from early_exit.decoding.sampling import Sampling

# Blocks of a program are what it takes to compile it, so most tests have few.
TINIEST = DecoderConfig(
    vocab_size=23,
    width=16,
    depth=3,
    heads=2,
    kv_heads=1,
    head_dim=8,
    mlp_width=24,
    context_length=256,
)
FOUR_BLOCKS = dataclasses.replace(TINIEST, depth=4)

PROMPT = [7, 3, 52, 11, 29]
SMALL_PROMPT = [7, 3, 19, 11, 2]  # in the small vocabulary
REPEATING = [5, 9, 31, 2] * 6
# Few widths, so that there is less to compile.
MODES = {
    mode.name: dataclasses.replace(mode, pending=4)
    for mode in (LOSSY, DEFERRED, verified("exits"), verified("lookup"), VERIFIED)
}
LOSSY, DEFERRED, BY_EXITS, BY_LOOKUP, VERIFIED = MODES.values()
ALL = VERIFIED.name
every_mode = pytest.mark.parametrize("mode", MODES.values(), ids=MODES.keys())


@pytest.fixture(scope="module")
def mixed_deferred(tiny):
    return mixed_policy(*tiny, PROMPT, DEFERRED)


def run(model, params, prompts, policy, new_tokens=12, **kwargs):
    return generate(model, params, prompts, policy=policy, max_new_tokens=new_tokens, **kwargs)


def ran_of(prompt, got):
    """Blocks run at each position of a text decoded with `propagate`; its last has not been run."""
    return [6] * len(prompt) + got.depths[1:].tolist() + [6]


def key_of(row=0, rows=1, seed=0):
    return jax.random.split(jax.random.key(seed), rows)[row]


@pytest.mark.long
@pytest.mark.parametrize("skipped", ["propagate", "defer"])
@pytest.mark.parametrize(
    "exits",
    [
        {"head": "embedding"},
        {"head": "norm", "output": "shared"},
        {"head": "mlp", "classes": 12},
        {"head": "layer", "classes": 12, "output": "shared"},
    ],
    ids=lambda exits: exits["head"],
)
def test_forced_exits_equal_the_slow_decoder(exits, skipped):
    """With `defer`, a full window forces every fourth position through all blocks."""
    model, params = build(FOUR_BLOCKS, points=(1, 3), **exits)
    mode = Mode(skipped=skipped, pending=4)
    for exit_index in (0, 1):
        policy = policies.forced(2, exit_index)
        (got,) = run(model, params, [SMALL_PROMPT], policy, mode=mode)
        slow = SlowDecoder(model, params).decode(SMALL_PROMPT, policy, mode, 12, key_of())
        assert got.tokens.tolist() == slow.tokens
        assert got.exits.tolist() == slow.exits
        early = [exit_index] * 11
        if skipped == "defer":
            early[3::4] = [2] * len(early[3::4])
        assert slow.exits == [2, *early]
        assert got.depths.tolist() == [int(model.exit_depths[e]) for e in slow.exits]


CONFIDENCES = ["max_prob", "margin", "entropy", "patience", "similarity", "gate"]


@pytest.mark.long
@pytest.mark.parametrize("mode", [LOSSY, DEFERRED], ids=["lossy", "deferred"])
@pytest.mark.parametrize("confidence", CONFIDENCES)
def test_every_confidence_equals_the_slow_decoder(confidence, mode):
    model, params = build(FOUR_BLOCKS, points=(1, 2, 3), head="layer", gate=True)
    policy = policies.patient(3, 1)
    if confidence != "patience":
        policy = mixed_policy(model, params, SMALL_PROMPT, mode, confidence)
    (got,) = run(model, params, [SMALL_PROMPT], policy, 24, mode=mode)
    slow = SlowDecoder(model, params).decode(SMALL_PROMPT, policy, mode, 24, key_of())
    assert got.tokens.tolist() == slow.tokens
    assert got.exits.tolist() == slow.exits
    np.testing.assert_allclose(got.log_probs, slow.log_probs, atol=CLOSE)


@pytest.mark.parametrize("fields", [{"decay": 4.0}, {"budget": 3.5}, {"decay": 1.0, "budget": 5.0}])
def test_decay_and_budget_equal_the_slow_decoder(tiny, mixed, fields):
    changed = policies.make(mixed.thresholds, **fields)
    (plain,) = run(*tiny, [PROMPT], mixed, 24)
    (got,) = run(*tiny, [PROMPT], changed, 24)
    slow = SlowDecoder(*tiny).decode(PROMPT, changed, LOSSY, 24, key_of())
    assert got.exits.tolist() == slow.exits != plain.exits.tolist()
    assert got.tokens.tolist() == slow.tokens
    if "budget" in fields:
        assert got.depths[1:].mean() <= fields["budget"]


def test_a_decaying_threshold_receives_the_position(tiny, mixed):
    """As τ → ∞ a threshold λ falls from 0.9 λ + 0.1 to 0.9 λ with the first token."""
    threshold, _ = np.asarray(mixed.thresholds)

    def exits(threshold, **fields):
        policy = policies.make([threshold, policies.NEVER], **fields)
        return run(*tiny, [PROMPT], policy, 24)[0].exits.tolist()

    at_once = exits(threshold / 0.9, decay=1e6)
    assert at_once == exits(threshold) != exits(threshold + 0.1)


TEMPERATE, TOP_K, TOP_P = Sampling(1.0), Sampling(0.7, top_k=5), Sampling(1.3, top_p=0.8)
# Head, classes, confidence, decay, budget, mode, window, sampling: each makes another program.
# Every value is there with several of the others'.
PROGRAMS = [
    ("norm", 0, "max_prob", 3.0, 2.0, "lossy", 4, TEMPERATE),
    ("layer", 12, "patience", None, 2.0, "lossy", 4, TOP_P),
    ("mlp", 12, "similarity", 3.0, None, "deferred", 2, TOP_K),
    ("layer", 0, "entropy", None, 2.0, "deferred", 6, TOP_P),
    ("norm", 12, "gate", 3.0, 2.0, "deferred", 3, Sampling()),
    ("mlp", 0, "margin", None, None, "verified: exits", 5, TEMPERATE),
    ("layer", 12, "max_prob", 3.0, 2.0, "verified: exits", 2, TOP_K),
    ("norm", 0, "gate", None, 2.0, "verified: exits", 3, TOP_P),
    ("mlp", 12, "patience", None, None, ALL, 4, TEMPERATE),
    ("layer", 0, "similarity", None, 2.0, ALL, 6, Sampling()),
    ("norm", 12, "entropy", 3.0, None, ALL, 2, TOP_P),
    ("mlp", 0, "margin", 3.0, 2.0, ALL, 3, TOP_K),
]
# What a program is run on; no example compiles anything.
DATA = st.fixed_dictionaries(
    {
        "quantile": st.floats(0.2, 0.9),
        "prompt": st.lists(st.integers(0, 22), min_size=1, max_size=12),
        "new_tokens": st.integers(1, 20),
        "stop": st.booleans(),
        "seed": st.integers(0, 3),
    }
)
built = functools.cache(build)


@pytest.mark.long
@pytest.mark.parametrize("program", PROGRAMS, ids=lambda p: "-".join(map(str, (p[5], *p[:3]))))
@settings(
    max_examples=6,
    deadline=None,
    derandomize=True,
    suppress_health_check=list(HealthCheck),
)
@given(data=DATA)
def test_every_combination_equals_the_slow_decoder(program, data):
    head, classes, confidence, decay, budget, mode, window, sampling = program
    # A recurrent exit beside the others where there are drafters of all kinds.
    taps = {"recurrent_taps": (1, 3), "recurrent_blocks": window % 3} if mode == ALL else {}
    model, params = built(TINIEST, points=(1, 2), head=head, classes=classes, gate=True, **taps)
    prompt, new_tokens, key = data["prompt"], data["new_tokens"], key_of(seed=data["seed"])
    mode = dataclasses.replace(MODES[mode], pending=window)
    slow = SlowDecoder(model, params)
    never = policies.never(2, confidence)
    scores = np.array(slow.decode(prompt, never, mode, 20, key).scores[1:], np.float64)
    finite = np.where(np.isfinite(scores), scores, -1)
    thresholds = np.quantile(finite, data["quantile"], axis=0)
    policy = policies.make(thresholds, confidence, decay=decay, budget=budget)
    # In verified decoding the text is the full model's whatever the policy says.
    drafts = policy if mode.verified else None
    alone = None if drafts else policy
    expected = slow.decode(prompt, alone, mode, new_tokens, key, sampling=sampling)
    stop_ids = [expected.tokens[len(expected.tokens) // 2]] if data["stop"] else []
    expected = slow.decode(prompt, alone, mode, new_tokens, key, stop_ids, sampling)
    (got,) = run(
        model,
        params,
        [prompt],
        policy,
        new_tokens,
        mode=mode,
        stop_ids=stop_ids,
        sampling=sampling,
        seed=data["seed"],
        costs=Costs(jnp.ones(len(mode.widths)), jnp.float32(0)),  # nothing is spared
    )
    assert got.tokens.tolist() == expected.tokens
    np.testing.assert_allclose(got.log_probs, expected.log_probs, atol=CLOSE)
    if drafts is None:
        assert got.exits.tolist() == expected.exits
    else:
        check_drafts(slow, prompt, got, policy, sampling, key)


def check_drafts(slow, prompt, got, policy, sampling, key):
    """What the exits are said to have drafted is what they say on the full model's own states."""
    text = [*prompt, *got.tokens.tolist()]
    states = slow.states(text)
    for at, (token, e) in enumerate(zip(got.tokens, got.exits, strict=True), len(prompt) - 1):
        if e < len(states[1]):
            drawn, _ = slow.draw(states[1][e][at], key, at + 1, sampling, True)
            assert drawn == token
            if policy.decay is None and policy.budget is None:
                said = []
                for earlier in range(e + 1):
                    score, best = slow.score(policy.confidence, states, earlier, at, said)
                    said.append(best)
                assert score >= float(policy.thresholds[e]) - 1e-5
    # Every token but the first came from a check of the full model, or was a draft that stood.
    checks = got.counts.head_passes_BE[-1] - 1
    assert len(got.tokens) - 1 == checks + got.counts.accepted_BW.sum()
    assert (got.exits != len(states[1])).sum() == got.counts.accepted_BW.sum()


@every_mode
def test_never_firing_thresholds_equal_the_plain_model(tiny, mode):
    never = policies.never(2)
    (got,) = run(*tiny, [PROMPT], never, 40, mode=mode)
    (plain,) = run(*tiny, [PROMPT], None, 40)
    np.testing.assert_array_equal(got.tokens, plain.tokens)
    np.testing.assert_allclose(got.log_probs, plain.log_probs, atol=1e-5)
    assert got.counts.evaluations_BE[:2].tolist() == [0, 0]
    slow = SlowDecoder(*tiny).decode(PROMPT, None, LOSSY, 40, key_of())
    assert plain.tokens.tolist() == slow.tokens


@pytest.mark.parametrize("prompts", [[PROMPT], [PROMPT, [1, 2], list(range(30))]], ids=len)
def test_deferred_keys_and_values_are_the_full_models(prompts):
    """Whatever has reached a block holds what the full model holds for the same tokens, whether it
    waited for its own row or went along with another."""
    model, params = build(head="layer", classes=20)
    policy = mixed_policy(model, params, PROMPT, DEFERRED, length=40)
    decoder = Decoder(model, params, policy, (), DEFERRED)
    state = decoder.start(prompts, 40, jax.random.key(0), None)
    waited, went_along = False, False
    for _ in range(12):
        state = decoder.run(state, steps=3)
        cache, tokens_BS, newest_B, filled_BE = jax.device_get(
            (state.cache, state.tokens_BS, state.newest_B, state.filled_BE)
        )
        assert (np.diff(filled_BE, axis=1) <= 0).all()
        waited |= (filled_BE[:, 0] - filled_BE[:, -1] > 1).any()
        went_along |= (filled_BE[:, -1] > np.array(state.chosen_B)).any()
        for row in range(len(prompts)):
            text = tokens_BS[row, : newest_B[row] + 1].tolist()
            fresh = decoder.start([text], 1, jax.random.key(0), tokens_BS.shape[1])
            fresh_cache = jax.device_get(fresh.cache)
            for segment, (first, last) in enumerate(model.segments):
                filled = filled_BE[row, segment]
                names = [f"block/{i}" for i in range(first, last)]
                names += [f"exit/{last}"] if segment < 2 else []
                for name in names:
                    for mine, full in zip(cache[name], fresh_cache[name], strict=True):
                        np.testing.assert_allclose(
                            mine[row, :, :filled], full[0, :, :filled], atol=1e-4
                        )
    assert went_along if len(prompts) > 1 else waited and not went_along


def test_deferred_positions_pass_each_block_at_most_once(tiny, mixed_deferred):
    (got,) = run(*tiny, [PROMPT], mixed_deferred, 40, mode=DEFERRED)
    assert got.counts.positions_BE[0] == 39
    assert (np.diff(got.counts.positions_BE) <= 0).all()
    assert got.layer_tokens == got.counts.positions_BE.sum() * 2
    reached = [(got.exits[1:] >= e).sum() for e in range(3)]
    assert got.counts.passes_BEN.sum(axis=1).tolist() == reached
    assert (got.counts.evaluations_BE <= [*reached[:2], 40]).all()


@pytest.mark.parametrize("window", [2, 3, 8])
def test_a_full_window_forces_the_deep_pass(window):
    model, params = build(TINIEST, points=(1, 2))
    mode = Mode("defer", pending=window)
    for policy in (policies.forced(2, 0), policies.forced(2, 1)):
        (got,) = run(model, params, [SMALL_PROMPT], policy, 26, mode=mode)
        early = (got.exits[1:] < 2).astype(int)
        runs = [len(list(group)) for is_early, group in itertools.groupby(early) if is_early]
        assert set(runs[:-1]) == {window - 1}


def test_adding_exits_leaves_the_full_model_alone(tiny):
    other = build(points=(1, 3, 5), head="layer", classes=9, gate=True)
    (a,) = run(*tiny, [PROMPT], None, 20)
    (b,) = run(*other, [PROMPT], None, 20)
    np.testing.assert_array_equal(a.tokens, b.tokens)
    np.testing.assert_array_equal(a.log_probs, b.log_probs)


def test_a_backbone_alone_decodes(tiny):
    model, params = tiny
    (whole,) = run(model, params, [PROMPT], None, 8)
    (bare,) = run(model, {"backbone": params["backbone"]}, [PROMPT], None, 8)
    np.testing.assert_array_equal(bare.tokens, whole.tokens)


@every_mode
def test_log_probs_are_those_of_the_head_that_decided(tiny, mixed, mixed_deferred, mode):
    model, params = tiny
    policy = mixed_deferred if mode is DEFERRED else mixed
    (got,) = run(model, params, [PROMPT], policy, 24, mode=mode)
    text = [*PROMPT, *got.tokens.tolist()]
    ran = ran_of(PROMPT, got) if mode is LOSSY else None
    _, exit_logits, final_logits, _ = SlowDecoder(model, params).states(text, ran)
    for n, (token, e, log_prob) in enumerate(
        zip(got.tokens, got.exits, got.log_probs, strict=True)
    ):
        logits = final_logits if mode.verified else [*exit_logits, final_logits][e]
        expected = np.log(softmax(logits[len(PROMPT) - 1 + n])[token])
        np.testing.assert_allclose(log_prob, expected, atol=1e-4)


@every_mode
def test_stop_tokens_end_a_row_whoever_says_them(tiny, mode):
    for policy in (None, policies.forced(2, 0), policies.never(2)):
        for prompt in (PROMPT, REPEATING):
            (free,) = run(*tiny, [prompt], policy, 30, mode=mode)
            for place in (3, 10, 17):
                stop = int(free.tokens[place])
                first = free.tokens.tolist().index(stop)
                (stopped,) = run(*tiny, [prompt], policy, 30, stop_ids=[stop], mode=mode)
                assert stopped.tokens.tolist() == free.tokens[: first + 1].tolist()


def test_allocated_cache_does_not_change_the_answer(tiny, mixed):
    (small,) = run(*tiny, [PROMPT], mixed, 30)
    (large,) = run(*tiny, [PROMPT], mixed, 30, slots=512)
    np.testing.assert_array_equal(small.tokens, large.tokens)


@pytest.mark.parametrize(
    ("batch", "platform", "size"),
    [(1, "cpu", 64), (1, "tpu", 128), (2, "gpu", 128), (3, "tpu", 64), (64, "cpu", 16)],
)
def test_chunks_fill_every_cache(batch, platform, size):
    assert decoding.chunk_size(batch, platform) == size
    assert CACHE_CHUNK % size == 0


def test_wide_chunks_as_on_accelerators_change_no_answer(tiny, monkeypatch):
    model, params = tiny
    prompt = (np.arange(200) * 7 % 61).tolist()
    how = {"policy": None, "max_new_tokens": 6}
    (usual,) = generate(model, params, [prompt], slots=256, **how)
    monkeypatch.setattr(decoding, "_MOST", 128)
    (wide,) = generate(model, params, [prompt], slots=384, **how)  # a shape of this test alone
    assert wide.tokens.tolist() == usual.tokens.tolist()
    np.testing.assert_allclose(wide.log_probs, usual.log_probs, atol=1e-5)


@pytest.mark.parametrize("mode", [LOSSY, VERIFIED], ids=["lossy", "verified"])
def test_long_prompts_and_answers_cross_chunks(tiny, mode):
    """Prefill runs in chunks of 64, attention reads the cache in chunks of 128."""
    rng = np.random.default_rng(0)
    policy = policies.forced(2, 1)
    slow = SlowDecoder(*tiny)
    settings = {"mode": mode, "slots": 640}  # one program for all of them
    for length in (63, 64, 65, 127, 129, 300):
        prompt = rng.integers(0, 61, length).tolist()
        (got,) = run(*tiny, [prompt], policy, 8, **settings)
        expected = slow.decode(prompt, None if mode.verified else policy, mode, 8, key_of())
        assert got.tokens.tolist() == expected.tokens
    (got,) = run(*tiny, [PROMPT], policy, 507, **settings)  # the whole context
    (again,) = run(*tiny, [[*PROMPT, *got.tokens[:-9].tolist()]], policy, 9, **settings)
    assert len(got.tokens) == 507
    if mode.verified:
        assert got.tokens[-9:].tolist() == again.tokens.tolist()


@pytest.mark.long
@every_mode
def test_bfloat16_is_decoded_in_bfloat16_and_as_well_as_one_pass_over_the_text(mode):
    """Beside float32 on the same text: as far from it, within a factor, as a bfloat16 pass is."""
    model, params = build(TINIEST, points=(1, 2))
    half = jax.tree.map(lambda x: x.astype(jax.numpy.bfloat16), params)
    whole = jax.tree.map(lambda x: x.astype(jax.numpy.float32), half)
    decoder = Decoder(model, half, policies.forced(2, 0), (), mode)
    state = decoder.run(decoder.start([SMALL_PROMPT], 12, jax.random.key(0), None))
    assert state.hidden_BWD.dtype == state.cache["block/0"][0].dtype == jax.numpy.bfloat16
    (got,) = decoder.generations(state, [0.0])
    assert len(got.tokens) == 12
    text, depth = [*SMALL_PROMPT, *got.tokens.tolist()], model.config.depth
    ran = [depth] * len(SMALL_PROMPT) + got.depths[1:].tolist() + [depth]

    def log_probs(params):
        """[12, V], each of the head that decided."""
        states = SlowDecoder(model, params).states(text, ran if mode == LOSSY else None)
        heads = (
            [states[2]] * 12 if mode.verified else [[*states[1], states[2]][e] for e in got.exits]
        )
        rows = [head[len(SMALL_PROMPT) - 1 + n] for n, head in enumerate(heads)]
        return np.log([softmax(row) for row in rows])

    expected = log_probs(whole)
    near = 2 * np.abs(log_probs(half) - expected).max()
    assert near < 0.1
    chosen = expected[np.arange(12), got.tokens]
    np.testing.assert_allclose(got.log_probs, chosen, rtol=0, atol=near)
    assert (chosen > expected.max(axis=1) - near).all()
