import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from early_exit import confidence


def reference(logits, has_rest):
    """Scores by name, prediction and declining, from float64 probabilities sorted by size."""
    logits = np.asarray(logits, np.float64)
    probs = np.exp(logits - logits.max())
    probs /= probs.sum()
    real = probs[:-1] if has_rest else probs
    prediction = int(real.argmax())
    best = real[prediction]
    others = np.delete(probs, prediction)
    nonzero = probs[probs > 0]
    scores = {
        "max_prob": best,
        "margin": best - others.max(),
        "entropy": 1 + (nonzero * np.log(nonzero)).sum() / np.log(len(probs)),
    }
    return scores, prediction, others.max() > best and others.argmax() == len(others) - 1


def score(name, summary, agreeing=None):
    """`from_logits`; how many heads agree matters for patience alone."""
    agreeing = jnp.zeros_like(summary.prediction) if agreeing is None else agreeing
    return confidence.from_logits(name, summary, agreeing)


OF_ONE_HEAD = tuple(name for name in confidence.FROM_LOGITS if name != "patience")

# Multiples of ¼ are exact in float32, and ties among them are common.
LOGITS = st.integers(2, 6).flatmap(
    lambda size: st.lists(st.integers(-40, 40).map(lambda x: x / 4), min_size=size, max_size=size)
)


@settings(max_examples=60, deadline=None)
@given(LOGITS, st.booleans())
def test_scores_equal_the_reference(logits, has_rest):
    summary = confidence.summarize(jnp.array(logits, jnp.float32), has_rest)
    scores, prediction, declines = reference(logits, has_rest)
    assert int(summary.prediction) == prediction
    declines = has_rest and declines
    assert bool(summary.declines) == declines
    for name, want in scores.items():
        got = float(score(name, summary))
        if declines:
            assert got == -np.inf
        else:
            np.testing.assert_allclose(got, want, atol=1e-5)
            assert -1e-6 <= got <= 1 + 1e-6


@pytest.mark.parametrize("has_rest", [False, True])
def test_softened_scores_are_those_of_divided_logits(has_rest):
    logits = jax.random.normal(jax.random.key(2), (40, 7)) * 4
    kept = confidence.soften(logits, has_rest)
    for k, temperature in enumerate(confidence.TEMPERATURES):
        for n, row in enumerate(np.asarray(logits, np.float64) / temperature):
            scores, prediction, _ = reference(row, has_rest)
            normalizer = np.log(np.exp(row - row[prediction]).sum())
            np.testing.assert_allclose(kept["log_normalizers"][k, n], normalizer, atol=1e-5)
            top = np.exp(-normalizer)
            second = np.exp(-float(kept["second"][n]) / temperature - normalizer)
            np.testing.assert_allclose(top, scores["max_prob"], atol=1e-5)
            np.testing.assert_allclose(top - second, scores["margin"], atol=1e-5)


@pytest.mark.parametrize("has_rest", [False, True])
def test_a_batch_scores_as_its_rows_alone(has_rest):
    logits = jax.random.normal(jax.random.key(0), (3, 4, 7)) * 4
    whole = confidence.summarize(logits, has_rest)
    assert whole.prediction.dtype == jnp.int32 and whole.prediction.shape == (3, 4)
    assert has_rest == bool(whole.declines.any()), "the example must decline somewhere"
    alone = [confidence.summarize(x, has_rest) for x in logits.reshape(12, 7)]
    for name in OF_ONE_HEAD:
        scores = [score(name, summary) for summary in alone]
        got = score(name, whole).reshape(12)
        np.testing.assert_allclose(got, scores, atol=1e-6)


def test_the_runner_up_may_be_none_of_these():
    # Probabilities .5, .1, .4: "none of these" is second, so the margin is .1 and not .4.
    summary = confidence.summarize(jnp.log(jnp.array([0.5, 0.1, 0.4])), has_rest=True)
    np.testing.assert_allclose(score("margin", summary), 0.1, atol=1e-6)
    assert int(summary.prediction) == 0 and not summary.declines


@pytest.mark.parametrize("name", OF_ONE_HEAD)
def test_a_surer_distribution_scores_higher(name):
    logits = jnp.array([2.0, 1.0, 0.5, -1.0])
    sharpened = jnp.stack([logits * sharpness for sharpness in (0.0, 0.3, 1.0, 3.0, 100.0)])
    scores = np.asarray(score(name, confidence.summarize(sharpened)))
    assert (np.diff(scores) > 0).all()
    uniform = {"max_prob": 0.25, "margin": 0.0, "entropy": 0.0}[name]
    np.testing.assert_allclose(scores[[0, -1]], [uniform, 1.0], atol=1e-6)


def test_extreme_logits_give_finite_scores():
    logits = jnp.array([[1e4, -1e4, 0.0], [-1e4, -1e4, -1e4], [1e4, 1e4, -1e4]])
    summary = confidence.summarize(logits, has_rest=False)
    for name, want in {
        "max_prob": [1, 1 / 3, 0.5],
        "margin": [1, 0, 0],
        "entropy": [1, 0, 1 - np.log(2) / np.log(3)],
    }.items():
        np.testing.assert_allclose(score(name, summary), want, atol=1e-5)


def test_unknown_confidence():
    summary = confidence.summarize(jnp.zeros(3))
    with pytest.raises(ValueError, match="unknown confidence 'similarity'; choose one of max_prob"):
        score("similarity", summary)


def test_every_confidence_is_from_logits_or_from_hidden_states():
    """Decoding asks for the first after evaluating a head, for the second before."""
    assert confidence.FROM_HIDDEN == ("similarity", "gate")
    assert set(confidence.NAMES) == {*OF_ONE_HEAD, "patience", "similarity", "gate"}
    assert len(confidence.NAMES) == len(confidence.FROM_LOGITS) + len(confidence.FROM_HIDDEN)


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 6), st.booleans(), st.integers(0, 2**32 - 1))
def test_patience_counts_the_heads_before_that_said_the_same(heads, has_rest, seed):
    """Against a look back over the list of all that was said, None where a head declined."""
    rng = np.random.default_rng(seed)
    logits = rng.integers(0, 3, (heads, 4, 3)).astype(np.float32) / 4  # few classes, many ties
    predicted, agreeing = jnp.full(4, -1), jnp.zeros(4, jnp.int32)
    history = [[] for _ in range(4)]
    for of_head in logits:
        summary = confidence.summarize(jnp.asarray(of_head), has_rest)
        agreeing = confidence.agreeing(summary, predicted, agreeing)
        predicted = confidence.said(summary)
        for n, row in enumerate(of_head):
            _, prediction, declines = reference(row, has_rest)
            same = [earlier == prediction for earlier in reversed(history[n])]
            run = [*same, False].index(False)
            declined = has_rest and declines
            assert int(predicted[n]) == (-1 if declined else prediction)
            assert float(score("patience", summary, agreeing)[n]) == (-np.inf if declined else run)
            history[n].append(None if declined else prediction)


def test_similarity_of_a_batch_equals_each_row_alone():
    """A norm over the whole batch instead of each row is right only at batch 1."""
    sizes = np.array([0.01, 1, 30, 4], np.float32)[:, None, None]
    before, after = np.random.default_rng(1).standard_normal((2, 4, 3, 8), np.float32) * sizes
    similarity = jax.jit(confidence.similarity)
    whole = np.asarray(similarity(before, after))
    assert whole.shape == (4, 3)
    for row in range(4):
        for t in range(3):
            a, b = (np.asarray(x[row, t], np.float64) for x in (before, after))
            cosine = a @ b / np.sqrt(a @ a) / np.sqrt(b @ b)
            np.testing.assert_allclose(whole[row, t], cosine, atol=1e-6)
            alone = similarity(before[row : row + 1, t], after[row : row + 1, t])
            np.testing.assert_allclose(alone, [cosine], atol=1e-6)


def test_similarity_examples():
    x = jnp.array([3.0, 4.0])
    for other, want in [(x, 1), (7 * x, 1), (-x, -1), (jnp.array([-4.0, 3.0]), 0), (0 * x, 0)]:
        np.testing.assert_allclose(confidence.similarity(x, other), want, atol=1e-6)
    half = x.astype(jnp.bfloat16)
    assert confidence.similarity(half, half).dtype == jnp.float32
