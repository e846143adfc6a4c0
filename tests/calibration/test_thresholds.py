"""ε-accuracy thresholds against Valade's definition, spelt out over every candidate."""

from fractions import Fraction

import numpy as np
import pytest
from hypothesis import example, given
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
@example([(1.0, True)] * 19 + [(0.5, False)], 19)  # 19 of 20 is .95, whatever floats say
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


def records():
    """Exit 4 is right on its surer half, exit 8 never, exit 12 always."""
    scores = np.array([[0.9, 0.8, 0.2, 0.1]] * 3, np.float32)
    agrees = np.array([[True, True, False, False], [False] * 4, [True] * 4])
    return Records(
        exit_depths=np.array([4, 8, 12, 16]),
        scores={"max_prob": scores, "margin": scores / 2},
        agrees=agrees,
        correct=~np.concatenate([agrees, agrees[:1]]),  # not what counts
        losses=np.zeros((4, 4), np.float32),
        metadata={"heads": "ab12", "step": 7},
    )


def test_each_exit_is_fitted_on_its_own_agreement():
    policy = thresholds.fit(records(), "margin", 0.9)
    np.testing.assert_allclose(policy.thresholds, [0.4, np.inf, 0.05])
    assert policy.confidence == "margin"


def test_the_provenance_names_unreachable_exits_and_the_records():
    assert thresholds.fit(records(), "max_prob", 0.9).provenance == {
        "method": "epsilon_accuracy",
        "epsilon": 0.9,
        "positions": 4,
        "unreachable": [8],
        "heads": "ab12",
        "step": 7,
    }


def test_a_fitted_policy_can_be_saved(tmp_path):
    policy = thresholds.fit(records(), "max_prob", 0.9)
    policies.save(policy, tmp_path / "policy.json")
    back = policies.load(tmp_path / "policy.json", exits=3)
    assert back.provenance == policy.provenance
    np.testing.assert_array_equal(back.thresholds, policy.thresholds)


def test_a_fitted_policy_lets_exactly_the_calibrated_points_leave():
    """Scores and thresholds are both float32: no point is lost between fitting and deciding."""
    rng = np.random.default_rng(0)
    scores = rng.random((1, 200), np.float32)
    agrees = rng.random((1, 200)) < scores
    fitted = Records(
        np.array([4, 8]),
        {"max_prob": scores},
        agrees,
        np.zeros((2, 200), bool),
        np.zeros((2, 200), np.float32),
    )
    policy = thresholds.fit(fitted, "max_prob", 0.8)
    left = np.asarray(policy.leaves(0, scores[0]))
    assert left.mean() == coverage_at(scores[0], agrees[0], 0.8) > 0.1
    assert agrees[0][left].mean() >= 0.8


def test_unknown_confidence():
    with pytest.raises(ValueError, match="unknown confidence 'entropy'; the records have max_prob"):
        thresholds.fit(records(), "entropy", 0.9)
