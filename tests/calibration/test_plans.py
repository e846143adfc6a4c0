"""Plans for a budget against the equations they solve, and quantiles against slow definitions."""

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from early_exit.calibration import plans
from early_exit.policy import first_exit

FEW = settings(max_examples=40, deadline=None)


@st.composite
def problems(draw):
    """(risks, costs, budget) with 2 to 6 exits, the budget between the first and the last cost."""
    steps = draw(st.lists(st.floats(0.05, 5), min_size=2, max_size=6))
    unit = draw(st.sampled_from([1.0, 1e-3, 1e9]))
    costs = unit * np.cumsum(steps)
    risks = draw(st.lists(st.floats(0, 1), min_size=len(steps), max_size=len(steps)))
    part = draw(st.floats(0.01, 1))
    return np.array(risks), costs, costs[0] + part * (costs[-1] - costs[0])


def objective(shares, risks, costs, beta):
    prior = (1 / costs) / np.sum(1 / costs)
    used = shares > 0
    divergence = np.sum(shares[used] * np.log(shares[used] / prior[used]))
    return shares @ risks + beta * divergence


@FEW
@given(problems(), st.sampled_from([0.01, 0.04, 0.5]))
@example((np.array([1.0, 0, 0, 0]), np.array([1, 1.5, 2.5, 5.5]), 1.28125), 0.01)  # a share is 0
@example((np.array([1.0, 0]), np.array([0.05, 1.05]), 1.0499999999999998), 0.01)  # one cost's twin
def test_eero_satisfies_its_equations(problem, beta):
    risks, costs, budget = problem
    shares, price = plans.eero_shares(risks, costs, budget, beta)
    assert (shares >= 0).all() and price >= 0
    np.testing.assert_allclose(shares.sum(), 1, rtol=1e-12)
    # The budget is kept, and spent if it has a price.
    assert shares @ costs <= budget * (1 + 1e-12)
    if price:
        np.testing.assert_allclose(shares @ costs, budget, rtol=1e-8)
        with np.errstate(over="ignore"):
            weights = np.exp(-(risks - risks.min() + price * (costs - budget)) / beta) / costs
        if np.isfinite(weights).all():  # the paper's equation for the price
            terms = (budget - costs) * weights
            rounding = np.spacing(budget) * weights.sum()  # of the differences
            assert abs(terms.sum()) <= 1e-8 * np.abs(terms).sum() + rounding
    # Optimality: the derivative of the Lagrangian is the same for every exit that is used.
    used = shares > 1e-300
    terms = np.log((shares * costs)[used]) + ((risks + price * costs) / beta)[used]
    assert np.ptp(terms) <= 1e-8 * max(1, np.abs(terms).max())


@FEW
@given(problems(), st.integers(0, 9))
def test_no_other_shares_within_the_budget_are_better(problem, seed):
    risks, costs, budget = problem
    shares, _ = plans.eero_shares(risks, costs, budget)
    best = objective(shares, risks, costs, 0.04)
    first = np.eye(len(costs))[0]
    for other in np.random.default_rng(seed).dirichlet(np.ones(len(costs)), 8):
        excess = max(0, other @ costs - budget) / (other @ costs - costs[0])
        within = (1 - excess) * other + excess * first
        assert best <= objective(within, risks, costs, 0.04) + 1e-9


def test_eero_with_one_early_exit_has_a_closed_form():
    costs = np.array([3.0, 10.0])
    for budget in (3.1, 5.0, 9.0):
        shares, _ = plans.eero_shares([0.4, 0.0], costs, budget)
        np.testing.assert_allclose(shares[0], (budget - costs[1]) / (costs[0] - costs[1]))


def test_eero_spends_no_more_than_it_needs():
    """Where going on does not lower the risk, the prior decides, and cost has no price."""
    shares, price = plans.eero_shares([0.1, 0.1, 0.1], [1.0, 2.0, 4.0], budget=4.0)
    assert price == 0
    np.testing.assert_allclose(shares, np.array([4, 2, 1]) / 7)


@FEW
@given(problems())
def test_a_higher_budget_lets_fewer_have_left_anywhere(problem):
    risks, costs, budget = problem
    for shares_at in (
        lambda b: plans.eero_shares(risks, costs, b)[0],
        lambda b: plans.geometric_shares(costs, b),
    ):
        low, high = np.cumsum([shares_at(budget), shares_at((budget + costs[-1]) / 2)], axis=1)
        assert (low >= high - 1e-9).all()


@FEW
@given(problems())
def test_geometric_shares_spend_the_budget(problem):
    _, costs, budget = problem
    shares = plans.geometric_shares(costs, budget)
    np.testing.assert_allclose(shares.sum(), 1)
    np.testing.assert_allclose(shares @ costs, budget, rtol=1e-8)
    ratios = shares[1:] / np.where(shares[:-1] > 1e-290, shares[:-1], np.nan)
    if np.isfinite(ratios).all() and budget < costs[-1]:
        np.testing.assert_allclose(ratios, ratios[0], rtol=1e-6)


def test_the_least_and_the_largest_budget():
    costs = [1.0, 2.0, 3.0]
    for budget, everyone in ((1.0, 0), (3.0, 2), (9.0, 2)):
        assert plans.geometric_shares(costs, budget)[everyone] == 1
    assert plans.eero_shares([1, 0, 0], costs, 1.0)[0].tolist() == [1, 0, 0]
    # Everything leaves at once, new positions of any score included.
    scores = np.array([[0.5, 0.6], [0.1, 0.9]], np.float32)
    for thresholds in (plans.thresholds_of_all, plans.thresholds_of_survivors):
        assert thresholds(scores, [1, 0, 0])[0] == -np.inf


# Few different scores, so that ties are common; −inf is a head that declines.
SCORES = st.integers(1, 3).flatmap(
    lambda exits: st.lists(
        st.lists(
            st.sampled_from([-np.inf, 0.0, 0.25, 0.5, 0.75, 1.0]), min_size=exits, max_size=exits
        ),
        min_size=1,
        max_size=12,
    )
)


def shares_of(seed, exits):
    """Tenths, so that counts fall on whole numbers often."""
    return np.random.default_rng(seed).multinomial(10, np.ones(exits + 1) / (exits + 1)) / 10


@FEW
@given(SCORES, st.integers(0, 99))
def test_thresholds_of_all_are_those_of_the_empirical_distribution(points, seed):
    scores = np.array(points, np.float32).T
    shares = shares_of(seed, len(scores))
    thresholds = plans.thresholds_of_all(scores, shares)
    for e, score in enumerate(scores):
        for value in score:
            leaves = np.mean(score <= value) >= 1 - shares[: e + 1].sum() - 1e-12
            assert leaves == (value >= thresholds[e])


@FEW
@given(SCORES, st.integers(0, 99))
def test_thresholds_of_survivors_take_whole_ties_until_the_plan_is_met(points, seed):
    scores = np.array(points, np.float32).T
    shares = shares_of(seed, len(scores))
    thresholds = plans.thresholds_of_survivors(scores, shares)
    staying, left = list(range(scores.shape[1])), 0
    for e, score in enumerate(scores):
        planned = shares[: e + 1].sum() * scores.shape[1] - 1e-9
        leavers = []
        for value in sorted({score[n] for n in staying}, reverse=True):
            if left + len(leavers) >= planned:
                break
            leavers += [n for n in staying if score[n] == value]
        assert sorted(leavers) == [n for n in staying if score[n] >= thresholds[e]]
        staying = [n for n in staying if n not in leavers]
        left += len(leavers)


@FEW
@given(SCORES, st.integers(0, 99))
def test_never_less_has_left_than_planned(points, seed):
    scores = np.array(points, np.float32).T
    shares = shares_of(seed, len(scores))
    for plan in (plans.thresholds_of_all, plans.thresholds_of_survivors):
        exits = first_exit(scores, plan(scores, shares))
        for e in range(len(scores)):
            assert np.mean(exits <= e) >= shares[: e + 1].sum() - 1e-9


def test_the_tight_plan_is_carried_out_where_the_papers_leaves_slack():
    """Heads that differ in part in what they find easy; distinct scores."""
    rng = np.random.default_rng(0)
    scores = rng.normal(size=4000) + rng.normal(size=(3, 4000))
    costs, shares = np.arange(1.0, 5), np.array([0.2, 0.2, 0.2, 0.4])
    tight, paper = (
        costs[first_exit(scores, plan(scores, shares))].mean()
        for plan in (plans.thresholds_of_survivors, plans.thresholds_of_all)
    )
    np.testing.assert_allclose(tight, shares @ costs, rtol=1e-3)
    assert paper < 0.95 * tight


def test_the_budget_holds_for_new_positions_as_stated():
    """One score for all heads leaves no slack. It is uniform, so the true cost is known."""
    rng = np.random.default_rng(0)
    costs, shares, delta = np.array([1.0, 2.0, 4.0]), np.array([0.3, 0.3, 0.4]), 0.1
    count, draws = 400, 1000

    def over(slack):
        scores = np.tile(rng.random(count), (2, 1))
        first, second = np.clip(plans.thresholds_of_all(scores, shares, slack), 0, 1)
        left = 1 - first, 1 - min(first, second)
        return costs @ np.diff([0, *left, 1]) - shares @ costs

    without = np.array([over(0.0) for _ in range(draws)])
    assert np.quantile(without, 0.99) <= 4 / np.sqrt(count) and np.mean(without > 0) > 0.2
    safe = np.array([over(np.sqrt(np.log(2 / delta) / 2)) for _ in range(draws)])
    assert np.mean(safe > 0) <= delta + 3 * np.sqrt(delta * (1 - delta) / draws)


def test_noise_breaks_ties_as_the_paper_does():
    scores = np.full((2, 1000), 0.5, np.float32)
    noisy = plans.with_noise(scores, seed=1)
    assert np.unique(noisy).size == noisy.size and np.ptp(noisy) <= 1e-5
    np.testing.assert_array_equal(noisy, plans.with_noise(scores, seed=1))
    shares = np.array([0.3, 0.3, 0.4])
    left = first_exit(noisy, plans.thresholds_of_all(noisy, shares)) == 0
    np.testing.assert_allclose(left.mean(), 0.3, atol=2e-3)
    # Without it, one score is one decision.
    assert (first_exit(scores, plans.thresholds_of_all(scores, shares)) == 0).all()


@pytest.mark.parametrize(
    ("costs", "budget", "message"),
    [
        ([1.0, 1.0], 1.0, "costs must be positive and rise"),
        ([2.0, 1.0], 2.0, "costs must be positive and rise"),
        ([0.0, 1.0], 1.0, "costs must be positive and rise"),
        ([], 1.0, "costs must be positive and rise"),
        ([2.0, 3.0], 1.5, "budget of 1.5 cannot be kept: leaving at the first exit costs 2"),
        ([2.0, 3.0], float("nan"), "budget of nan cannot be kept"),
    ],
)
def test_costs_and_budget_are_checked(costs, budget, message):
    with pytest.raises(ValueError, match=message):
        plans.eero_shares([0.1] * len(costs), costs, budget)
    with pytest.raises(ValueError, match=message):
        plans.geometric_shares(costs, budget)


def test_risks_and_beta_are_checked():
    with pytest.raises(ValueError, match="must be 2 risks, one per exit"):
        plans.eero_shares([0.1], [1.0, 2.0], 1.5)
    with pytest.raises(ValueError, match="beta must be a positive number, not 0"):
        plans.eero_shares([0.1, 0.1], [1.0, 2.0], 1.5, beta=0)


@pytest.mark.parametrize("plan", [plans.thresholds_of_all, plans.thresholds_of_survivors])
@pytest.mark.parametrize(
    ("scores", "shares", "message"),
    [
        (np.zeros((1, 0)), [0.5, 0.5], "at least one score per exit"),
        (np.zeros((0, 3)), [1.0], "at least one score per exit"),
        (np.array([[0.1, np.nan]]), [0.5, 0.5], "no NaN"),
        (np.ones((1, 2)), [1.0], "must be 2 numbers that sum to 1"),
        (np.ones((1, 2)), [0.5, 0.6], "must be 2 numbers that sum to 1"),
        (np.ones((1, 2)), [-0.5, 1.5], "must be 2 numbers that sum to 1"),
    ],
)
def test_scores_and_shares_are_checked(plan, scores, shares, message):
    with pytest.raises(ValueError, match=message):
        plan(scores, shares)
