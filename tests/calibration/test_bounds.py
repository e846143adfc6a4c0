"""Tests of a mean, against their definitions and, exactly, against every sample there is."""

import itertools
import math

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from scipy import stats

from early_exit.calibration import bounds

TESTS = (bounds.hoeffding_bentkus, bounds.binomial, bounds.betting)
DELTAS = (0.01, 0.1, 0.3)


def at_most(k, n, alpha):
    """P[Bin(n, α) ≤ k], term by term."""
    return math.fsum(math.comb(n, i) * alpha**i * (1 - alpha) ** (n - i) for i in range(k + 1))


def sample(errors, n):
    return np.repeat([1.0, 0.0], [errors, n - errors])


@pytest.mark.parametrize(("errors", "n", "alpha"), [(0, 1, 0.3), (0, 30, 0.1), (3, 60, 0.1)])
def test_hoeffding_bentkus_is_the_smaller_of_two(errors, n, alpha):
    mean = errors / n
    h = mean * math.log(mean / alpha) if mean else 0.0
    h += (1 - mean) * math.log((1 - mean) / (1 - alpha))
    expected = min(math.exp(-n * h), math.e * at_most(errors, n, alpha))
    found = bounds.hoeffding_bentkus(sample(errors, n), alpha)
    assert found == pytest.approx(expected, rel=1e-9)
    assert bounds.binomial(sample(errors, n), alpha) == pytest.approx(at_most(errors, n, alpha))


def test_a_mean_at_alpha_shows_nothing():
    assert bounds.hoeffding_bentkus(sample(5, 50), 0.1) == 1
    assert bounds.hoeffding_bentkus(np.full(10, 0.2), 0.1) == 1
    assert bounds.betting(sample(50, 50), 0.1) == 1


def test_shares_that_sum_to_a_whole_number_are_not_rounded_up():
    """Three and a little, by floating point alone, are three errors."""
    shares = np.append(np.tile([0.1, 0.2], 10), np.zeros(40))
    assert shares.mean() * 60 > 3
    expected = bounds.hoeffding_bentkus(sample(3, 60), 0.1)
    assert bounds.hoeffding_bentkus(shares, 0.1) == pytest.approx(expected)


@pytest.mark.parametrize("alpha", [0.05, 0.2, 0.5])
@pytest.mark.parametrize("n", [1, 7, 40])
@pytest.mark.parametrize("test", TESTS[:2])
def test_p_values_are_valid_for_every_number_of_errors(test, n, alpha):
    """If the mean is α, the chance that p ≤ δ is at most δ: summed over all outcomes."""
    p_values = [test(sample(k, n), alpha) for k in range(n + 1)]
    chances = [at_most(k, n, alpha) - (at_most(k - 1, n, alpha) if k else 0) for k in range(n + 1)]
    for delta in DELTAS:
        assert sum(c for c, p in zip(chances, p_values, strict=True) if p <= delta) <= delta + 1e-12


@pytest.mark.parametrize("values", [(0.0, 1.0), (0.0, 0.1, 0.7)])
@pytest.mark.parametrize("delta", DELTAS)
def test_bets_are_valid_in_every_order(values, delta):
    """Over all sequences of a few values whose mean is α."""
    weights = {2: np.array([0.8, 0.2]), 3: np.array([0.5, 0.3, 0.2])}[len(values)]
    alpha, n = float(weights @ values), {2: 12, 3: 8}[len(values)]
    won = 0.0
    for drawn in itertools.product(range(len(values)), repeat=n):
        losses = np.array([values[i] for i in drawn])
        if bounds.betting(losses, alpha, delta) <= delta:
            won += float(np.prod(weights[list(drawn)]))
    assert won <= delta + 1e-12


def test_bets_are_sharper_where_losses_vary_little():
    shares = np.random.default_rng(0).uniform(0.01, 0.03, 150)
    upper = [bounds.upper(lambda a, t=t: t(shares, a, 0.1), 0.1) for t in (TESTS[0], TESTS[2])]
    assert 0.02 < upper[1] < 0.04 < upper[0]


LOSSES = st.lists(st.integers(0, 4).map(lambda n: n / 4), min_size=1, max_size=30)


@settings(max_examples=60, deadline=None)
@given(LOSSES, st.floats(0.01, 0.98), st.floats(0.001, 0.01), st.sampled_from(TESTS))
def test_a_greater_risk_is_easier_to_keep(losses, alpha, more, test):
    losses = np.round(losses) if test is bounds.binomial else np.array(losses)
    assert test(losses, alpha + more, 0.1) <= test(losses, alpha, 0.1) * (1 + 1e-12)


@pytest.mark.parametrize(("errors", "n"), [(0, 10), (2, 50), (49, 50)])
def test_the_binomial_bound_is_that_of_clopper_and_pearson(errors, n):
    found = bounds.upper(lambda a: bounds.binomial(sample(errors, n), a), 0.1)
    assert found == pytest.approx(stats.beta.ppf(0.9, errors + 1, n - errors), abs=1e-9)


@settings(max_examples=30, deadline=None)
@given(LOSSES, st.sampled_from(DELTAS), st.sampled_from(TESTS))
@example([0.0, 1.0, 0.0, 0.0, 0.0, 0.0, 0.0, 1.0], 0.3, bounds.betting)
def test_a_bound_is_the_least_risk_that_passes(losses, delta, test):
    losses = np.round(losses) if test is bounds.binomial else np.array(losses)
    bound = bounds.upper(lambda a: test(losses, a, delta), delta)
    # What a bet has won stays won, so its bound may be less than the mean of all losses.
    least = losses.min() if test is bounds.betting else losses.mean()
    assert least <= bound <= 1
    assert bound == 1 or test(losses, bound, delta) <= delta
    assert test(losses, bound - 1e-6, delta) > delta or bound < 1e-6


@pytest.mark.parametrize("alpha", [0.01, 0.05, 0.2])
@pytest.mark.parametrize("delta", [0.05, 0.1])
def test_units_needed_are_just_enough(alpha, delta):
    needed = bounds.units_needed(alpha, delta)
    for test in TESTS[:2]:
        assert test(np.zeros(needed), alpha, delta) <= delta
        assert test(np.zeros(needed - 1), alpha, delta) > delta


def test_an_exact_test_counts_errors():
    with pytest.raises(ValueError, match="each loss must be 0 or 1"):
        bounds.binomial(np.array([0.0, 0.5]), 0.1)


def test_bets_do_not_fall_for_units_that_come_sorted():
    """Were the easy ones first, the bets would win much before they lose it all."""
    sorted_ = np.repeat([0.0, 1.0], [100, 100])
    assert bounds.betting(sorted_, 0.3) > 0.1
