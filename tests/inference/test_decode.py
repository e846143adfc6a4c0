"""The jitted loop against a reference that recomputes everything, without cache or branches."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from conftest import build
from early_exit import policy as policies
from early_exit.backbones import base
from early_exit.inference.decode import decode, prefill
from early_exit.inference.generate import generate, stream
from early_exit.inference.sampling import Sampling

PROMPT = [7, 3, 52, 11, 29]


def softmax(x):
    x = np.asarray(x, np.float64)
    e = np.exp(x - x.max())
    return e / e.sum()


SCORES = {
    "max_prob": lambda p: p.max(),
    "margin": lambda p: np.sort(p)[-1] - np.sort(p)[-2],
    "entropy": lambda p: 1 + (p * np.log(p)).sum() / np.log(len(p)),
}


def hidden_states(model, params, length):
    """A function (tokens, blocks run at each position) → hidden states [depth + 1, length, D].

    A position that left after n blocks keeps its hidden state in all deeper ones, which see it as
    the input to their keys and values: CALM's state propagation, spelt out on the whole text.
    """

    @jax.jit
    def states(tokens, ran):
        bound = model.bind(params)
        hidden, context = bound.backbone.stem({"tokens": tokens[None]})
        found = [hidden]
        for i in range(model.config.depth):
            deeper, _ = bound.backbone.blocks[str(i)](found[-1], context)
            found.append(jnp.where((i < ran)[None, :, None], deeper, found[-1]))
        features = [
            head.features(found[point], context)[0]
            for head, point in zip(bound.heads, model.exits.points, strict=True)
        ]
        logits = [base.logits(f, t) for f, t in zip(features, bound.exit_tables(), strict=True)]
        return jnp.concatenate(found), [x[0] for x in logits], bound.backbone.readout(found[-1])[0]

    def padded(tokens, ran):
        tokens = np.pad(np.asarray(tokens, np.int32), (0, length - len(tokens)))
        ran = np.pad(np.asarray(ran, np.int32), (0, length - len(ran)))
        return jax.device_get(states(tokens, ran))

    return padded


def reference(model, params, prompt, thresholds, confidence, new_tokens):
    """Greedy decoding that recomputes the whole text for every token, without a cache.

    Returns:
      (new tokens, exits, scores of both exits at every step but the first).
    """
    states = hidden_states(model, params, len(prompt) + new_tokens)
    ids = params.get("token_ids")
    tokens, exits, scores = list(prompt), [], []
    ran = [model.config.depth] * (len(prompt) - 1)  # blocks run at each earlier position
    for step in range(new_tokens):
        at = len(tokens) - 1
        hidden, exit_logits, final_logits = states(tokens, [*ran, model.config.depth])
        token, leave, depth = int(final_logits[at].argmax()), len(exit_logits), len(hidden) - 1
        edges = (0, *model.exits.points)
        scores.append([])
        for e, logits in enumerate(exit_logits):
            logits = logits[at]
            if confidence == "similarity":
                a, b = hidden[edges[e], at], hidden[edges[e + 1], at]
                score = a @ b / np.linalg.norm(a) / np.linalg.norm(b)
            else:
                score = SCORES[confidence](softmax(logits))
                if ids is not None and logits.argmax() == len(logits) - 1:
                    score = -np.inf
            scores[-1].append(score)
            if step and leave == len(exit_logits) and score >= thresholds[e]:
                best = int(logits[: None if ids is None else -1].argmax())
                token, leave, depth = best if ids is None else int(ids[best]), e, edges[e + 1]
        ran.append(depth)
        tokens.append(token)
        exits.append(leave)
    return tokens[len(prompt) :], exits, np.array(scores[1:])


def run(model, params, prompts, policy, new_tokens=12, **kwargs):
    return generate(model, params, prompts, policy=policy, max_new_tokens=new_tokens, **kwargs)


def mixed_policy(model, params, confidence="max_prob"):
    """Thresholds with which the positions after PROMPT leave at every exit, the final included."""
    never = [policies.NEVER] * 2
    _, _, scores = reference(model, params, PROMPT, never, confidence, 24)
    finite = np.where(np.isfinite(scores), scores, np.nan)
    for first, second in itertools.product((0.6, 0.7, 0.8, 0.9), (0.3, 0.5, 0.7)):
        thresholds = np.nanquantile(finite, (first, second), axis=0).diagonal()
        policy = policies.make(thresholds, confidence)
        (got,) = run(model, params, [PROMPT], policy, 24)
        if set(got.exits[1:]) == {0, 1, 2}:
            return policy
    raise AssertionError("no thresholds make positions leave at every exit")


@pytest.mark.parametrize("exit_index", [0, 1])
@pytest.mark.parametrize(
    "exits",
    [
        {"head": "embedding"},
        {"head": "norm", "output": "shared"},
        {"head": "mlp", "classes": 20},
        {"head": "layer", "classes": 20, "output": "shared"},
    ],
    ids=lambda exits: exits["head"],
)
def test_forced_exits_equal_the_reference(exits, exit_index):
    model, params = build(**exits)
    (got,) = run(model, params, [PROMPT], policies.forced(2, exit_index))
    thresholds = [policies.ALWAYS if e == exit_index else policies.NEVER for e in range(2)]
    tokens, left, _ = reference(model, params, PROMPT, thresholds, "max_prob", 12)
    assert got.tokens.tolist() == tokens
    assert got.exits.tolist() == left == [2] + [exit_index] * 11
    assert got.depths.tolist() == [6] + [model.exits.points[exit_index]] * 11


@pytest.mark.parametrize("confidence", ["max_prob", "margin", "entropy", "similarity"])
@pytest.mark.parametrize("exits", [{}, {"head": "layer", "classes": 30}], ids=["mlp", "layer"])
def test_thresholds_equal_the_reference(confidence, exits):
    model, params = build(**exits)
    policy = mixed_policy(model, params, confidence)
    (got,) = run(model, params, [PROMPT], policy, 24)
    tokens, left, _ = reference(
        model, params, PROMPT, np.asarray(policy.thresholds), confidence, 24
    )
    assert got.tokens.tolist() == tokens
    assert got.exits.tolist() == left


def test_never_firing_thresholds_equal_the_plain_model(tiny):
    model, params = tiny
    (never,) = run(model, params, [PROMPT], policies.never(2), 40)
    (plain,) = run(model, params, [PROMPT], None, 40)
    np.testing.assert_array_equal(never.tokens, plain.tokens)
    np.testing.assert_allclose(never.log_probs, plain.log_probs, atol=1e-5)
    assert never.evaluations.tolist() == [0, 0, 40]


def test_adding_exits_leaves_the_full_model_alone(tiny):
    model, params = tiny
    other_model, other = build(points=(1, 3, 5), head="layer", classes=9)
    (a,) = run(model, params, [PROMPT], None, 20)
    (b,) = run(other_model, other, [PROMPT], None, 20)
    np.testing.assert_array_equal(a.tokens, b.tokens)
    np.testing.assert_array_equal(a.log_probs, b.log_probs)


def test_rows_of_a_batch_equal_rows_alone(tiny):
    model, params = tiny
    prompts = [PROMPT, [1], list(range(40)), [60, 0, 60], [5, 9] * 70]
    lengths = [9, 30, 4, 1, 17]
    policy = mixed_policy(model, params)
    batch = run(model, params, prompts, policy, lengths)
    for prompt, length, row in zip(prompts, lengths, batch, strict=True):
        (alone,) = run(model, params, [prompt], policy, length)
        np.testing.assert_array_equal(row.tokens, alone.tokens)
        np.testing.assert_array_equal(row.exits, alone.exits)
        np.testing.assert_array_equal(row.evaluations, alone.evaluations)
        np.testing.assert_allclose(row.log_probs, alone.log_probs, atol=1e-5)
        assert len(row.tokens) == length
    assert len({tuple(row.exits[1:]) for row in batch}) > 1


def test_log_probs_are_those_of_the_head_that_emitted(tiny):
    model, params = tiny
    (got,) = run(model, params, [PROMPT], mixed_policy(model, params), 24)
    text = [*PROMPT, *got.tokens.tolist()]
    ran = [6] * len(PROMPT) + got.depths[1:].tolist()
    _, exit_logits, final_logits = hidden_states(model, params, len(text))(text, ran)
    for n, (token, e, log_prob) in enumerate(
        zip(got.tokens, got.exits, got.log_probs, strict=True)
    ):
        logits = [*exit_logits, final_logits][e][len(PROMPT) - 1 + n]
        np.testing.assert_allclose(log_prob, np.log(softmax(logits)[token]), atol=1e-4)


def test_stop_tokens_end_a_row_whatever_exit_emits_them(tiny):
    model, params = tiny
    for policy in (None, policies.forced(2, 0), policies.never(2)):
        (free,) = run(model, params, [PROMPT], policy, 30)
        stop = int(free.tokens[10])
        first = free.tokens.tolist().index(stop)
        (stopped,) = run(model, params, [PROMPT], policy, 30, stop_ids=[stop])
        assert stopped.tokens.tolist() == free.tokens[: first + 1].tolist()


def test_streaming_gives_the_same_tokens_and_compiles_nothing_new(tiny):
    model, params = tiny
    policy = mixed_policy(model, params)
    (whole,) = run(model, params, [PROMPT], policy, 21)
    compiled = decode._cache_size(), prefill._cache_size()
    portions = list(
        stream(model, params, [PROMPT[:3]], policy=policy, max_new_tokens=21, portion=4)
    )
    assert [len(rows[0].tokens) for rows in portions] == [1, 5, 9, 13, 17, 21]
    (other,) = run(model, params, [PROMPT], policies.make([0.3, 0.1]), 21)
    (again,) = run(model, params, [PROMPT], policy, 21)
    np.testing.assert_array_equal(again.tokens, whole.tokens)
    np.testing.assert_array_equal(again.log_probs, whole.log_probs)
    assert (decode._cache_size(), prefill._cache_size()) == compiled


def test_allocated_cache_does_not_change_the_answer(tiny):
    model, params = tiny
    policy = mixed_policy(model, params)
    (small,) = run(model, params, [PROMPT], policy, 30)
    (large,) = run(model, params, [PROMPT], policy, 30, slots=512)
    np.testing.assert_array_equal(small.tokens, large.tokens)


def test_long_prompts_cross_chunks(tiny):
    """Prefill runs in chunks of 64, attention reads the cache in chunks of 128."""
    model, params = tiny
    rng = np.random.default_rng(0)
    for length in (63, 64, 65, 127, 129, 300):
        prompt = rng.integers(0, 61, length).tolist()
        (got,) = run(model, params, [prompt], policies.forced(2, 1), 4)
        thresholds = [policies.NEVER, policies.ALWAYS]
        tokens, _, _ = reference(model, params, prompt, thresholds, "max_prob", 4)
        assert got.tokens.tolist() == tokens


@pytest.mark.parametrize(
    ("prompts", "new", "message"),
    [
        ([[]], 3, "prompt 0 is empty"),
        ([[1], [1]], [3, 0], "prompt 1 asks for 0 new tokens"),
        ([[1] * 510], 3, "513 positions but the model's context is 512"),
        ([[1], [2, 61]], 3, "prompt 1 has token ids from 2 to 61, but the model knows 0 to 60"),
        ([[-1]], 3, "prompt 0 has token ids from -1"),
    ],
)
def test_bad_prompts(tiny, prompts, new, message):
    model, params = tiny
    with pytest.raises(ValueError, match=message):
        run(model, params, prompts, None, new)


def test_sampling_draws_from_the_exits_distribution(tiny):
    """χ² of 4000 first draws at a forced exit against that head's own softmax."""
    model, params = tiny
    rows, temperature = 4000, 1.7
    sampling = Sampling(temperature=temperature)
    prompts = [PROMPT] * rows
    batch = run(model, params, prompts, policies.forced(2, 0), 2, sampling=sampling)
    first = np.array([row.tokens[0] for row in batch])
    second = np.array([row.tokens[1] for row in batch])
    # Condition on the most frequent first token, so that all draws share one distribution.
    common = np.bincount(first).argmax()
    draws = second[first == common]
    bound = model.bind(params)
    hidden, context = bound.backbone.stem({"tokens": jnp.array([[*PROMPT, int(common)]])})
    hidden = bound.backbone.run_blocks(hidden, 0, 2, context)
    features, _ = bound.heads[0].features(hidden, context)
    logits = np.asarray(base.logits(features, bound.exit_tables()[0])[0, -1])

    def chi_square(probs):
        expected = probs * len(draws)
        order = np.argsort(expected)
        observed = np.bincount(draws, minlength=len(probs))[order].astype(float)
        # Pool the rarest tokens until every cell expects five.
        cut = np.searchsorted(np.cumsum(expected[order]), 5) + 1
        observed = np.append(observed[cut:], observed[:cut].sum())
        expected = np.append(expected[order][cut:], expected[order][:cut].sum())
        return stats.chisquare(observed, expected).pvalue

    assert len(draws) > 200
    assert chi_square(softmax(logits / temperature)) > 1e-3
    assert chi_square(softmax(logits)) < 1e-6, "the test cannot tell a wrong temperature"


@pytest.mark.parametrize("exits", [1, 3])
def test_a_policy_for_another_number_of_exits_is_refused(tiny, exits):
    """An index past its end would be clamped, and some other exit's threshold used."""
    with pytest.raises(ValueError, match=f"{exits} thresholds but the model has 2 exits"):
        run(*tiny, [PROMPT], policies.never(exits), 3)


@pytest.mark.parametrize("slots", [128, 300])
def test_slots_that_do_not_fit_are_refused(tiny, slots):
    with pytest.raises(ValueError, match=f"slots={slots} must be a multiple of 128 that holds"):
        run(*tiny, [[1] * 140], None, 3, slots=slots)
