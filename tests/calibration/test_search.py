import itertools

import numpy as np
import pytest
import synthetic
from hypothesis import given, settings
from hypothesis import strategies as st

from early_exit.calibration import plans
from early_exit.calibration.search import chances, search
from early_exit.policy import first_exit


def outcome(scores, values, costs, thresholds):
    """Mean value and mean cost, position by position."""
    exits = first_exit(scores, thresholds)
    return np.mean(values[exits, np.arange(len(exits))]), np.mean(np.asarray(costs)[exits])


def best_of_all(scores, values, costs, budgets):
    """The highest value within each budget, over every threshold vector there is."""
    choices = [[np.inf, *np.unique(score)] for score in scores]
    outcomes = [outcome(scores, values, costs, t) for t in itertools.product(*choices)]
    return [max(v for v, cost in outcomes if cost <= budget + 1e-9) for budget in budgets]


@st.composite
def problems(draw):
    exits = draw(st.integers(1, 2))
    point = st.tuples(
        st.lists(st.sampled_from([-np.inf, 0, 0.5, 1]), min_size=exits, max_size=exits),
        st.lists(st.booleans(), min_size=exits + 1, max_size=exits + 1),
    )
    scores, values = zip(*draw(st.lists(point, min_size=1, max_size=12)), strict=True)
    budget = draw(st.sampled_from([1.0, 1.3, 1.8, 2.5, 9.0]))
    return np.array(scores, np.float32).T, np.array(values).T, np.arange(1.0, exits + 2), budget


@settings(max_examples=60, deadline=None)
@given(problems())
def test_what_is_found_keeps_to_the_budget_and_is_no_worse_than_its_starts(problem):
    scores, values, costs, budget = problem
    starts = [np.array(t, np.float32) for t in itertools.product([-np.inf, 0.5, 1, np.inf])]
    starts = [np.broadcast_to(start, len(scores)).copy() for start in starts]
    value, cost = outcome(scores, values, costs, search(scores, values, costs, budget, starts))
    assert cost <= budget + 1e-9
    for start in starts:
        other, its_cost = outcome(scores, values, costs, start)
        assert its_cost > budget + 1e-9 or value >= other - 1e-9
    if len(scores) == 1:  # one threshold: every one of them has been weighed
        assert value >= best_of_all(scores, values, costs, [budget])[0] - 1e-9


def test_little_is_lost_against_trying_everything():
    costs, budgets, lost = np.array([1.0, 2, 3]), (1.2, 1.6, 2.2), []
    for seed in range(6):
        records = synthetic.records(30, exits=2, seed=seed)
        scores, values = records.scores["max_prob"][:-1], records.predictions
        for budget, best in zip(budgets, best_of_all(scores, values, costs, budgets), strict=True):
            value, cost = outcome(scores, values, costs, search(scores, values, costs, budget))
            assert cost <= budget + 1e-9
            lost.append(best - value)
    assert min(lost) >= -1e-9
    assert np.mean(lost) < 0.02 and np.median(lost) == 0


def test_better_than_plans_where_one_exit_is_useless():
    """Plans send positions to every exit; here the second costs and decides as the first does."""
    records = synthetic.records(3000, exits=3)
    scores, values = records.scores["max_prob"][:-1].copy(), records.predictions.copy()
    scores[1], values[1] = scores[0], values[0]
    costs = np.array([1.0, 2, 3, 4])
    shares, _ = plans.eero_shares(1 - values.mean(axis=1), costs, 2.0)
    planned = [
        plans.thresholds_of_survivors(scores, shares),
        plans.thresholds_of_survivors(scores, plans.geometric_shares(costs, 2.0)),
    ]
    found = search(scores, values, costs, 2.0, planned)
    assert np.mean(first_exit(scores, found) == 1) < 0.01
    best = max(outcome(scores, values, costs, t)[0] for t in planned)
    assert outcome(scores, values, costs, found)[0] > best + 0.005


def test_of_equal_answers_the_cheapest_are_taken():
    scores = np.array([[0.9, 0.5, 0.1]], np.float32)
    values = np.array([[1, 1, 0], [1, 1, 1]])
    assert search(scores, values, [1.0, 2.0], budget=2.0).tolist() == [0.5]
    assert search(scores, np.ones((2, 3)), [1.0, 2.0], budget=2.0).tolist() == [pytest.approx(0.1)]


def test_chances_rise_with_the_score_and_keep_what_is_known():
    rng = np.random.default_rng(0)
    scores = np.array([rng.random(500), np.round(rng.random(500), 1)], np.float32)
    good = rng.random((2, 500)) < scores**2
    judged = rng.random(500) < 0.8
    found = chances(scores, good, judged)
    for chance, score, right in zip(found, scores, good, strict=True):
        assert (np.diff(chance[np.argsort(score)]) >= 0).all()
        np.testing.assert_allclose(chance[judged].mean(), right[judged].mean())
        # No rising function is nearer to what happened, for one its own mean value by value.
        far = np.mean((right - chance)[judged] ** 2)
        for other in (score, score**2, np.full(500, right[judged].mean())):
            assert far <= np.mean((right - other)[judged] ** 2)
        assert np.abs(chance - score**2).mean() < 0.07
    never = chances(np.array([[-np.inf, 0.5]]), np.array([[True, False]]), np.array([False, True]))
    assert never.tolist() == [[0.0, 0.0]]


def test_what_is_found_by_chances_is_better_on_new_positions():
    """Than what is found by zeros and ones, which is better on the old."""
    costs, qualities = np.array([1.0, 2, 3, 4]), []
    fresh = synthetic.records(8000, seed=99)
    for seed in range(12):
        known = synthetic.records(400, seed=seed)
        scores, good = known.scores["max_prob"], known.correct
        expected = chances(scores, good, np.ones(400, bool))
        by_luck, by_chance = (search(scores[:-1], v, costs, 2.0) for v in (good, expected))
        for records in (known, fresh):
            seen = records.scores["max_prob"][:-1], records.correct, costs
            qualities.append(outcome(*seen, by_chance)[0] - outcome(*seen, by_luck)[0])
    assert np.mean(qualities[::2]) < 0 < np.mean(qualities[1::2])


def test_values_may_be_any_numbers():
    """A loss as well as a hit; and a last resort that costs no more than what it stands in for."""
    scores = np.array([[0.9, 0.5, 0.1], [0.2, 0.3, 0.8]], np.float32)
    values = -np.array([[0.0, 3.0, 3.0], [2.0, 2.5, 0.1], [1.0, 1.0, 1.0]])
    found = search(scores, values, [1.0, 2.0, 2.0], budget=2.0)
    assert first_exit(scores, found).tolist() == [0, 2, 1]
