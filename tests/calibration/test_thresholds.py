"""ε-accuracy thresholds against Valade's definition, spelt out over every candidate."""

from fractions import Fraction

import numpy as np
import pytest
import synthetic
from hypothesis import example, given, settings
from hypothesis import strategies as st

from early_exit import policy as policies
from early_exit.calibration import thresholds
from early_exit.calibration.records import Records
from early_exit.calibration.thresholds import coverage_at, epsilon_accuracy

# Few different scores, so that ties are common; −inf is "no prediction".
POINTS = st.lists(
    st.tuples(st.sampled_from([-np.inf, -1.0, 0.0, 0.25, 0.5, 1.0]), st.booleans()),
    min_size=1,
    max_size=24,
)
EPSILONS = st.integers(1, 20).map(lambda n: n / 20)


def arrays(points):
    scores, correct = zip(*points, strict=True)
    return np.array(scores, np.float32), np.array(correct)


def reference(points, twentieths):
    """The lowest score whose leavers are right often enough, in exact arithmetic."""
    reached = []
    for threshold, _ in points:
        leavers = [correct for score, correct in points if score >= threshold]
        if threshold > -np.inf and Fraction(sum(leavers), len(leavers)) >= Fraction(twentieths, 20):
            reached.append(threshold)
    return min(reached, default=np.inf)


@given(POINTS, st.integers(1, 20))
@example([(0.5, True)], 20)
@example([(0.5, False)], 1)
@example([(-np.inf, True)], 1)
@example([(0.5, True)] * 10 + [(0.5, False)] * 2, 17)  # a constant score: all leave, or none
@example([(0.5, True)] * 55 + [(0.5, False)] * 45, 11)  # in floating point .55 · 100 > 55
@example([(1.0, False)] + [(0.5, True)] * 9, 18)  # wrong at the top, right in the long run
def test_thresholds_equal_the_definition(points, twentieths):
    threshold = epsilon_accuracy(*arrays(points), twentieths / 20)
    assert threshold == reference(points, twentieths)


@given(POINTS, EPSILONS)
def test_leavers_reach_the_accuracy(points, epsilon):
    scores, correct = arrays(points)
    threshold = epsilon_accuracy(scores, correct, epsilon)
    leavers = scores >= threshold
    coverage = coverage_at(scores, correct, epsilon)
    assert coverage == leavers.mean()
    if threshold == policies.NEVER:
        assert coverage == 0
    else:
        assert correct[leavers].mean() >= epsilon - 1e-9
        assert not leavers[scores == -np.inf].any()


@given(POINTS, EPSILONS, EPSILONS)
def test_thresholds_rise_with_epsilon(points, one, other):
    low, high = (epsilon_accuracy(*arrays(points), e) for e in sorted([one, other]))
    assert low <= high


def test_many_points_at_the_edge():
    """Exactly ε of many points, where a running mean in float32 would be a matter of luck."""
    for count in (20, 1_000, 200_000):
        correct = np.ones(count, bool)
        correct[-count // 20 :] = False
        scores = np.linspace(1, 0, count, dtype=np.float32)
        assert coverage_at(scores, correct, 0.95) == 1
        correct[0] = False
        assert coverage_at(scores, correct, 0.95) < 1


@pytest.mark.parametrize("epsilon", [0, -0.5, 1.0001, 95, float("nan")])
def test_epsilon_is_an_accuracy(epsilon):
    with pytest.raises(ValueError, match=r"epsilon is an accuracy in \(0, 1\], not"):
        epsilon_accuracy(np.ones(3), np.ones(3, bool), epsilon)


@pytest.mark.parametrize("scores", [[], [0.5, np.nan]])
def test_scores_are_numbers(scores):
    with pytest.raises(ValueError, match="at least one score, and no NaN"):
        epsilon_accuracy(np.array(scores), np.ones(len(scores), bool), 0.9)


def records_of(scores, agrees, **metadata):
    """Records of exits after every fourth block; nothing but the agreement counts."""
    agrees = np.array(agrees)
    exits, positions = agrees.shape
    scores = np.concatenate([np.array(scores, np.float32), np.ones((1, positions), np.float32)])
    return Records(
        exit_depths=np.arange(4, 4 * exits + 5, 4),
        costs=np.arange(1.0, exits + 2),
        scores={"max_prob": scores, "margin": scores / 2},
        predictions=np.concatenate([~agrees, np.zeros((1, positions), bool)]).astype(np.int32),
        labels=np.full(positions, -1, np.int32),
        groups=np.arange(positions, dtype=np.int32),
        losses=np.zeros((exits + 1, positions), np.float32),
        metadata=metadata,
    )


def records():
    """Exit 4 is right on its surer half, exit 8 never, exit 12 always."""
    return records_of(
        [[0.9, 0.8, 0.2, 0.1]] * 3,
        [[True, True, False, False], [False] * 4, [True] * 4],
        heads="ab12",
        step=7,
    )


def test_each_exit_has_its_own_threshold_in_units_of_the_score():
    policy = thresholds.fit(records(), "margin", 0.9)
    np.testing.assert_allclose(policy.thresholds, [0.4, np.inf, 0.05])
    assert policy.confidence == "margin"


def test_the_provenance_names_unreachable_exits_and_the_records():
    policy = thresholds.fit(records(), "max_prob", 0.9)
    asked = {"method": "epsilon", "epsilon": 0.9, "level": 0.9}
    found = {"agreement": 1.0, "coverage": 1.0, "positions": 4, "unreachable": [8]}
    assert (asked | found | {"heads": "ab12", "step": 7}).items() <= policy.provenance.items()


def test_a_policy_that_reaches_nothing_never_leaves_and_says_so():
    policy = thresholds.fit(records_of([[0.5, 0.1]] * 2, [[False] * 2] * 2), "max_prob", 0.1)
    assert policy.thresholds.tolist() == [np.inf, np.inf]
    assert policy.provenance["unreachable"] == [4, 8]
    assert policy.provenance["coverage"] == 0 and policy.provenance["agreement"] is None


def test_a_deep_exit_is_not_credited_with_what_left_before_it():
    """Each head alone reaches .8, but the second only on positions that the first has taken."""
    agrees = np.ones((2, 10), bool)
    agrees[0, [0, 8, 9]] = False
    agrees[1, [8, 9]] = False
    scores = np.array([[0.9] * 8 + [0.1] * 2, [0.5] * 10], np.float32)
    alone = [epsilon_accuracy(*pair, 0.8) for pair in zip(scores, agrees, strict=True)]
    np.testing.assert_allclose(alone, [0.9, 0.5])  # together: 7 of 10
    policy = thresholds.fit(records_of(scores, agrees), "max_prob", 0.8)
    np.testing.assert_allclose(policy.thresholds, [0.9, np.inf])
    assert policy.provenance["agreement"] == 7 / 8


def leavers(records, policy):
    """Whether each position that leaves early agrees where it leaves, one by one."""
    limits = np.asarray(policy.thresholds)
    found = []
    for scores, agrees in zip(records.scores["max_prob"][:-1].T, records.agrees.T, strict=True):
        left = [e for e, score in enumerate(scores) if score >= limits[e]]
        if left:
            found.append(bool(agrees[left[0]]))
    return found


MANY = st.sampled_from([1, 3]).flatmap(
    lambda exits: st.lists(
        st.lists(
            st.tuples(st.sampled_from([-np.inf, 0.0, 0.5, 1.0]), st.booleans()),
            min_size=exits,
            max_size=exits,
        ),
        min_size=12,  # one size, as each is compiled
        max_size=12,
    )
)


@settings(max_examples=30, deadline=None)
@given(MANY, st.sampled_from([(0.3, 0.5), (0.5, 0.8), (0.8, 0.9), (0.9, 1.0)]))
def test_all_leavers_together_reach_the_accuracy(points, epsilons):
    points = np.array(points, dtype=object)  # [N, E, 2]
    fitted = records_of(points[..., 0].T.astype(np.float32), points[..., 1].T.astype(bool))
    both = [thresholds.fit(fitted, "max_prob", epsilon) for epsilon in epsilons]
    assert (np.asarray(both[0].thresholds) <= np.asarray(both[1].thresholds)).all()
    for epsilon, policy in zip(epsilons, both, strict=True):
        found = leavers(fitted, policy)
        assert not found or np.mean(found) >= epsilon - 1e-9
        assert policy.provenance["coverage"] == len(found) / len(points)
        assert policy.provenance["agreement"] == (np.mean(found) if found else None)


def test_a_fitted_policy_can_be_saved(tmp_path):
    policy = thresholds.fit(records(), "max_prob", 0.9)
    policies.save(policy, tmp_path / "policy.json")
    back = policies.load(tmp_path / "policy.json", exit_depths=records().exit_depths)
    assert back.provenance == policy.provenance
    np.testing.assert_array_equal(back.thresholds, policy.thresholds)


def test_a_fitted_policy_lets_exactly_the_calibrated_points_leave():
    """Scores and thresholds are both float32: no point is lost between fitting and deciding."""
    rng = np.random.default_rng(0)
    scores = rng.random((1, 200), np.float32)
    agrees = rng.random((1, 200)) < scores
    policy = thresholds.fit(records_of(scores, agrees), "max_prob", 0.8)
    left = np.asarray(policy.leaves(0, scores[0], 0.0))
    assert left.mean() == coverage_at(scores[0], agrees[0], 0.8) > 0.1
    assert agrees[0][left].mean() >= 0.8


def test_a_path_has_every_heads_threshold_at_every_level():
    rng = np.random.default_rng(3)
    scores = rng.integers(0, 9, (2, 60)).astype(np.float32) / 8
    fitted = records_of(scores, rng.random((2, 60)) < scores)
    levels = np.array([0.3, 0.55, 0.8, 1.0])
    for level, row in zip(levels, thresholds.path(fitted, "max_prob", levels), strict=True):
        pairs = zip(scores, fitted.agrees, strict=True)
        assert row.tolist() == [epsilon_accuracy(*pair, level) for pair in pairs]


def test_unknown_confidence():
    with pytest.raises(ValueError, match="unknown confidence 'entropy'; the records have max_prob"):
        thresholds.fit(records(), "entropy", 0.9)


@pytest.mark.parametrize("seed", range(3))
def test_a_ladder_is_the_fit_of_each_epsilon(seed):
    records = synthetic.records(300, seed=seed)
    epsilons = [0.4, 0.75, 0.8, 0.95, 1.0]
    rows = thresholds.ladder(records, "max_prob", epsilons)
    assert rows.dtype == np.float32
    for epsilon, row in zip(epsilons, rows, strict=True):
        fitted = thresholds.fit(records, "max_prob", epsilon)
        assert row.tolist() == np.asarray(fitted.thresholds).tolist()
    assert len(np.unique(rows, axis=0)) > 3
    with pytest.raises(ValueError, match="epsilon is an accuracy in"):
        thresholds.ladder(records, "max_prob", [0.5, 1.5])
