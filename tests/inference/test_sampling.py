import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from early_exit.inference.sampling import GREEDY, Sampling, choose, filtered

LOGITS = st.lists(st.integers(-40, 40).map(lambda n: n / 8), min_size=2, max_size=12)


def kept_by_definition(logits, sampling):
    """Indices that survive: top-k by count, then the fewest most probable that reach top_p.

    Tokens as probable as the last one kept stay too: nothing tells them apart.
    """
    logits = np.array(logits, np.float64) / sampling.temperature
    kept = set(range(len(logits)))
    if sampling.top_k:
        least = sorted(logits, reverse=True)[: sampling.top_k][-1]
        kept = {i for i in kept if logits[i] >= least}
    if sampling.top_p < 1:
        weights = {i: np.exp(logits[i]) for i in kept}
        order = sorted(kept, key=lambda i: -weights[i])
        total, reached, last = sum(weights.values()), 0.0, None
        for i in order:
            if reached >= sampling.top_p - 1e-6:
                break
            reached += weights[i] / total
            last = logits[i]
        kept = {i for i in kept if logits[i] >= last}
    return kept


@settings(deadline=None, max_examples=60)
@given(
    LOGITS,
    st.sampled_from([0.5, 1.0, 2.0]),
    st.integers(0, 5),
    st.sampled_from([0.1, 0.37, 0.61, 0.93, 1.0]),
)
def test_filters_keep_what_their_definition_keeps(logits, temperature, top_k, top_p):
    sampling = Sampling(temperature, top_k, top_p)
    found = np.asarray(filtered(jnp.array([logits], jnp.float32), sampling))[0]
    kept = kept_by_definition(logits, sampling)
    assert set(np.flatnonzero(np.isfinite(found))) == kept and kept
    for i in kept:
        np.testing.assert_allclose(found[i], logits[i] / temperature, rtol=1e-6)


def test_rows_are_filtered_and_drawn_apart():
    logits = jax.random.normal(jax.random.key(0), (6, 30)) * 3
    keys = jax.random.split(jax.random.key(1), 6)
    sampling = Sampling(1.3, 5, 0.8)
    together = choose(keys, logits, sampling)
    alone = [choose(keys[i : i + 1], logits[i : i + 1], sampling)[0] for i in range(6)]
    assert together.tolist() == [int(x) for x in alone]


def test_only_what_was_kept_is_drawn():
    logits = jnp.tile(jnp.array([[2.0, 1.0, 0.0, -1.0]]), (500, 1))
    drawn = choose(jax.random.split(jax.random.key(0), 500), logits, Sampling(1.0, top_k=2))
    assert set(drawn.tolist()) == {0, 1}


def test_greedy_takes_the_best_whatever_the_key():
    logits = jax.random.normal(jax.random.key(0), (4, 9))
    for seed in range(3):
        drawn = choose(jax.random.split(jax.random.key(seed), 4), logits, GREEDY)
        np.testing.assert_array_equal(drawn, logits.argmax(-1))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"temperature": -1}, "temperature must be ≥ 0"),
        ({"top_k": -2}, "top_k must be ≥ 0"),
        ({"top_p": 0}, r"top_p must be in \(0, 1\]"),
        ({"top_p": 1.5}, r"top_p must be in \(0, 1\]"),
    ],
)
def test_bad_settings(settings, message):
    with pytest.raises(ValueError, match=message):
        Sampling(**settings)
