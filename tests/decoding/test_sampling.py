import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats
from slow_decoder import SlowDecoder, softmax

from early_exit import policy as policies
from early_exit.decoding import sampling as samplings
from early_exit.decoding.costs import Costs
from early_exit.decoding.generate import generate
from early_exit.decoding.mode import LOSSY, VERIFIED, Mode
from early_exit.decoding.sampling import GREEDY, Sampling

PROMPT = [7, 3, 52, 11, 29]
choose = jax.jit(samplings.choose, static_argnames=("sampling", "vocab_size"))
filtered = jax.jit(samplings.filtered, static_argnames="sampling")

# Few lengths, and few settings below: each is a program.
LOGITS = st.sampled_from([2, 12]).flatmap(
    lambda length: st.lists(
        st.integers(-40, 40).map(lambda n: n / 8), min_size=length, max_size=length
    )
)
FILTERS = [
    Sampling(temperature, top_k, top_p)
    for temperature, top_k, top_p in [
        (1.0, 0, 1.0),
        (0.5, 1, 1.0),
        (2.0, 5, 1.0),
        (0.5, 0, 0.1),
        (1.0, 0, 0.93),
        (2.0, 3, 0.37),
        (1.0, 5, 0.61),
        (0.5, 2, 0.93),
    ]
]


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


@settings(deadline=None, max_examples=200)
@given(LOGITS, st.sampled_from(FILTERS))
def test_filters_keep_what_their_definition_keeps(logits, sampling):
    found = np.asarray(filtered(jnp.array([logits], jnp.float32), sampling))[0]
    kept = kept_by_definition(logits, sampling)
    assert set(np.flatnonzero(np.isfinite(found))) == kept and kept
    for i in kept:
        below = (logits[i] - max(logits)) / sampling.temperature
        np.testing.assert_allclose(found[i], below, rtol=1e-6)


@pytest.mark.parametrize(
    ("temperature", "scale"),
    [(1e-45, 1e-3), (1e-40, 1.0), (1e-38, 1e4), (4e-38, 1.0), (1e-30, 1e-3), (1e-3, 1.0)],
)
@pytest.mark.parametrize(("top_k", "top_p"), [(0, 1.0), (5, 1.0), (0, 0.4), (3, 1e-9)])
def test_near_zero_a_temperature_is_greedy(temperature, scale, top_k, top_p):
    """With any filter, where the gaps between logits are large beside it."""
    logits = scale * jnp.array([[1.0, -3.0, 7.0, 2.0, 6.5], [0.0, -1.0, -9.0, -2.0, -1.5]])
    keys = jax.random.split(jax.random.key(3), 2)
    drawn = choose(keys, logits, Sampling(temperature, top_k, top_p), None, 5)
    assert drawn.tolist() == choose(keys, logits, GREEDY, None, 5).tolist() == [2, 0]


def test_near_infinity_a_temperature_is_uniform():
    """Also where logits are as large as float32 has them."""
    logits = jnp.array([3e38, -3e38, 0.0, 1.0])
    found = np.asarray(filtered(logits[None], Sampling(1e30)))[0]
    assert np.isfinite(found[[0, 2, 3]]).all()
    found = np.asarray(filtered(logits[None, 2:], Sampling(1e38)))[0]
    np.testing.assert_allclose(found, 0, atol=1e-6)


def test_masked_logits_are_never_drawn_at_any_temperature():
    logits = jnp.array([[-jnp.inf, 0.0, -jnp.inf, -1.0]])
    for temperature in (1e-45, 0.7, 1e38):
        keys = jax.random.split(jax.random.key(0), 50)
        drawn = choose(keys, jnp.tile(logits, (50, 1)), Sampling(temperature), None, 4)
        assert set(drawn.tolist()) <= {1, 3}


def test_rows_are_filtered_and_drawn_apart():
    logits = jax.random.normal(jax.random.key(0), (6, 30)) * 3
    keys = jax.random.split(jax.random.key(1), 6)
    sampling = Sampling(1.3, 5, 0.8)
    together = choose(keys, logits, sampling, None, 30)
    alone = [choose(keys[i : i + 1], logits[i : i + 1], sampling, None, 30)[0] for i in range(6)]
    assert together.tolist() == [int(x) for x in alone]
    in_a_square = choose(keys.reshape(2, 3), logits.reshape(2, 3, 30), sampling, None, 30)
    assert in_a_square.reshape(-1).tolist() == together.tolist()


def test_only_what_was_kept_is_drawn():
    logits = jnp.tile(jnp.array([[2.0, 1.0, 0.0, -1.0]]), (500, 1))
    keys = jax.random.split(jax.random.key(0), 500)
    assert set(choose(keys, logits, Sampling(1.0, top_k=2), None, 4).tolist()) == {0, 1}
    # Classes are filtered by their own logits, whatever tokens they stand for.
    ids = jnp.array([7, 0, 3, 9])
    assert set(choose(keys, logits, Sampling(1.0, top_k=2), ids, 11).tolist()) == {0, 1}


@pytest.mark.parametrize("sampling", [Sampling(1.0), Sampling(0.7, top_k=4), Sampling(2.0, 0, 0.8)])
def test_heads_that_say_the_same_draw_the_same_token(sampling):
    """The same distribution with its classes in another order, and with tokens that never come."""
    rng = np.random.default_rng(0)
    logits = jnp.asarray(rng.normal(size=(400, 9)) * 2, jnp.float32)
    keys = jax.random.split(jax.random.key(1), 400)
    ids = jnp.asarray(rng.permutation(20)[:9])
    order = rng.permutation(9)
    tokens = ids[choose(keys, logits, sampling, ids, 20)]
    shuffled = ids[order][choose(keys, logits[:, order], sampling, ids[order], 20)]
    np.testing.assert_array_equal(tokens, shuffled)
    everything = jnp.full((400, 20), -jnp.inf).at[:, ids].set(logits)
    np.testing.assert_array_equal(tokens, choose(keys, everything, sampling, None, 20))
    # A nearly equal distribution gives nearly always the same: an independent draw would give
    # another token as often as two draws from the distribution differ.
    nearly = ids[choose(keys, logits + 0.02 * rng.normal(size=(400, 9)), sampling, ids, 20)]
    other = jax.random.split(jax.random.key(2), 400)
    apart = ids[choose(other, logits, sampling, ids, 20)]
    assert (nearly != tokens).mean() < 0.05 < 0.2 < (apart != tokens).mean()


@pytest.mark.parametrize("reduced", [False, True], ids=["all", "reduced"])
def test_draws_follow_the_distribution(reduced):
    """χ² against jax's own draws, in two samples; those at another temperature are told apart."""
    logits = jnp.array([1.5, 0.2, -0.5, 0.9, -2.0, 0.0])
    ids = jnp.array([11, 3, 8, 0, 5, 2]) if reduced else None
    count = 6000
    keys = jax.random.split(jax.random.key(0), count)
    spread = jnp.broadcast_to(logits, (count, 6))
    drawn = choose(keys, spread, Sampling(0.8), ids, 12 if reduced else 6)

    def p_value(temperature):
        theirs = jax.random.categorical(jax.random.key(1), logits / temperature, shape=(count,))
        table = [np.bincount(draws, minlength=6) for draws in (np.asarray(drawn), theirs)]
        return stats.chi2_contingency(np.array(table)).pvalue

    assert p_value(0.8) > 1e-3
    assert p_value(1.0) < 1e-6, "the test cannot tell a wrong temperature"


def test_greedy_takes_the_best_whatever_the_key():
    logits = jax.random.normal(jax.random.key(0), (4, 9))
    for seed in range(3):
        drawn = choose(jax.random.split(jax.random.key(seed), 4), logits, GREEDY, None, 9)
        np.testing.assert_array_equal(drawn, logits.argmax(-1))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"temperature": -1}, "temperature must be a number ≥ 0"),
        ({"temperature": float("nan")}, "temperature must be a number ≥ 0, not nan"),
        ({"temperature": float("inf")}, "temperature must be a number ≥ 0, not inf"),
        ({"top_k": -2}, "top_k must be ≥ 0"),
        ({"top_p": 0}, r"top_p must be in \(0, 1\]"),
        ({"top_p": 1.5}, r"top_p must be in \(0, 1\]"),
    ],
)
def test_bad_settings(settings, message):
    with pytest.raises(ValueError, match=message):
        Sampling(**settings)


def chi_square(draws, probs):
    """p-value of draws under a distribution; the rarest tokens pooled until each cell expects 5."""
    expected = probs * len(draws)
    order = np.argsort(expected)
    observed = np.bincount(draws, minlength=len(probs))[order].astype(float)
    cut = np.searchsorted(np.cumsum(expected[order]), 5) + 1
    observed = np.append(observed[cut:], observed[:cut].sum())
    expected = np.append(expected[order][cut:], expected[order][:cut].sum())
    return stats.chisquare(observed, expected).pvalue


@pytest.mark.long
@pytest.mark.parametrize("mode", [LOSSY, VERIFIED], ids=["lossy", "verified"])
def test_sampling_draws_from_the_right_distribution(tiny, mode):
    """χ² of the second draw of many rows: the exit's own distribution, or the full model's."""
    model, params = tiny
    rows, temperature = 4000, 2.0
    mode = Mode(mode.skipped, mode.drafters, pending=2)
    # By what is assumed of so many rows, no draft would pay.
    free = Costs(jnp.ones(len(mode.widths)), jnp.float32(0))
    how = {"mode": mode, "costs": free, "sampling": Sampling(temperature)}
    batch = generate(
        model, params, [PROMPT] * rows, policy=policies.forced(2, 0), max_new_tokens=3, **how
    )
    if mode.verified:
        assert 0 < sum(row.counts.accepted_BW.sum() for row in batch) < rows
    first = np.array([row.tokens[0] for row in batch])
    second = np.array([row.tokens[1] for row in batch])
    # Condition on the most frequent first token, so that all draws share one distribution.
    common = int(np.bincount(first).argmax())
    draws = second[first == common]
    assert len(draws) > 200
    _, exit_logits, final_logits, _ = SlowDecoder(model, params).states([*PROMPT, common])
    right, wrong = exit_logits[0][5], final_logits[5]
    if mode.verified:
        right, wrong = wrong, right
    assert chi_square(draws, softmax(right / temperature)) > 1e-3
    assert chi_square(draws, softmax(right)) < 1e-4, "the test cannot tell a wrong temperature"
    assert chi_square(draws, softmax(wrong / temperature)) < 1e-4, "nor one model from the other"
