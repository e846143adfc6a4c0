import numpy as np
import pytest
import synthetic
from hypothesis import given, settings
from hypothesis import strategies as st

from early_exit import policy as policies
from early_exit.calibration import budget, rejection
from early_exit.policy import make, never

# Few different scores, so that ties are common.
POINTS = st.lists(
    st.tuples(st.sampled_from([-np.inf, 0.0, 0.25, 0.5, 1.0]), st.booleans()),
    min_size=1,
    max_size=16,
)
FEW = settings(max_examples=40, deadline=None)


def arrays(points):
    scores, correct = zip(*points, strict=True)
    return np.array(scores, np.float32), np.array(correct)


@FEW
@given(POINTS)
def test_the_curve_is_what_each_threshold_does(points):
    scores, correct = arrays(points)
    coverage, risk, thresholds = rejection.risk_coverage(scores, correct)
    assert thresholds.tolist() == sorted(set(scores.tolist()), reverse=True)
    for c, r, threshold in zip(coverage, risk, thresholds, strict=True):
        answered = scores >= threshold
        np.testing.assert_allclose([c, r], [answered.mean(), 1 - correct[answered].mean()])


def slow_aurc(scores, correct):
    """Every point's chance to be among the surest k, ties in random order."""
    total = 0.0
    for k in range(1, len(scores) + 1):
        wrong = 0.0
        for score, right in zip(scores, correct, strict=True):
            above, equal = np.sum(scores > score), np.sum(scores == score)
            wrong += (not right) * np.clip((k - above) / equal, 0, 1)
        total += wrong / k
    return total / len(scores)


@FEW
@given(POINTS)
def test_aurc_against_its_definition(points):
    scores, correct = arrays(points)
    np.testing.assert_allclose(rejection.aurc(scores, correct), slow_aurc(scores, correct))
    assert rejection.excess_aurc(scores, correct) >= -1e-12
    by_rank = np.unique(scores, return_inverse=True)[1] ** 3  # only the order counts
    assert rejection.aurc(by_rank, correct) == rejection.aurc(scores, correct)


def test_aurc_of_the_best_and_of_no_order():
    correct = np.array([True] * 30 + [False] * 10)
    assert rejection.excess_aurc(np.linspace(1, 0, 40), correct) == pytest.approx(0)
    assert rejection.aurc(np.zeros(40), correct) == pytest.approx(0.25)
    assert rejection.aurc(np.zeros(1), np.ones(1, bool)) == 0


@pytest.mark.parametrize("scores", [[], [0.5, np.nan]])
def test_scores_are_numbers(scores):
    with pytest.raises(ValueError, match="at least one score, and no NaN"):
        rejection.aurc(np.array(scores), np.ones(len(scores), bool))


def test_selected_answers_are_wrong_as_seldom_as_promised():
    """Scores u are uniform, wrong at 0.6·(1 − u): above t, a share 0.3·(1 − t) is wrong."""
    rng = np.random.default_rng(0)
    risk, delta, draws = 0.12, 0.2, 200
    promised, tempted, coverages = [], [], []
    for _ in range(draws):
        scores = rng.random(2000)
        correct = rng.random(2000) > 0.6 * (1 - scores)
        found = rejection.select(scores, correct, risk, delta)
        assert found.bound is None or found.risk <= found.bound <= risk
        promised.append(0.3 * (1 - min(found.threshold, 1.0)))
        coverages.append(found.coverage)
        coverage, seen, thresholds = rejection.risk_coverage(scores, correct)
        tempted.append(0.3 * (1 - thresholds[seen <= risk].min(initial=1.0)))
    margin = 3 * np.sqrt(delta * (1 - delta) / draws)
    assert np.mean(np.array(promised) > risk) <= delta + margin
    assert np.mean(np.array(tempted) > risk) > delta + margin  # the best-looking threshold fails
    assert 0.15 < np.mean(coverages) < 0.4  # 0.4 is what the true risk allows


@FEW
@given(POINTS, st.sampled_from([0.1, 0.5, 0.9]))
def test_selection_states_what_it_does(points, risk):
    scores, correct = arrays(points)
    found = rejection.select(scores, correct, risk, 0.5)
    answered = scores >= found.threshold
    assert found.coverage == answered.mean()
    if found.coverage:
        assert found.risk == pytest.approx(1 - correct[answered].mean())
    else:
        assert found.threshold == np.inf and found.bound is None


@pytest.mark.parametrize("risk", [0, 1, -0.1, float("nan")])
def test_a_risk_is_a_share(risk):
    with pytest.raises(ValueError, match=r"risk is a share in \(0, 1\)"):
        rejection.select(np.ones(3), np.ones(3, bool), risk, 0.1)
    with pytest.raises(ValueError, match=r"delta is a share in \(0, 1\)"):
        rejection.select(np.ones(3), np.ones(3, bool), 0.1, risk)


RECORDS = synthetic.records(3000, exits=2)
POLICY = make([0.9, 0.8], "max_prob")


@pytest.mark.parametrize("abstain", [0.0, 0.05, 0.2, 1.0])
def test_at_most_the_rate_stays_without_an_answer(abstain):
    policy = rejection.fit(RECORDS, POLICY, abstain=abstain)
    stated = policy.provenance["rejection"]
    exits = policy.exit_index(RECORDS.scores["max_prob"], RECORDS.exit_depths)
    final = RECORDS.scores["max_prob"][-1]
    withheld = (exits == 2) & np.array([bool(policy.abstains(score)) for score in final])
    assert 1 - stated["answered"] == pytest.approx(withheld.mean())
    assert withheld.mean() <= abstain
    assert withheld.mean() == pytest.approx(min(abstain, np.mean(exits == 2)), abs=1e-3)
    # Those withheld are the least sure of those that could be.
    assert final[withheld].max(initial=-1) <= final[(exits == 2) & ~withheld].min(initial=2)
    assert policy.thresholds.tolist() == POLICY.thresholds.tolist()


def test_withholding_the_least_sure_leaves_fewer_wrong():
    wrong = [
        rejection.fit(RECORDS, never(2), abstain=abstain).provenance["rejection"]["wrong"]
        for abstain in (0.0, 0.1, 0.3, 0.6)
    ]
    assert wrong == sorted(wrong, reverse=True) and wrong[0] > wrong[-1] + 0.02


def test_a_rate_needs_no_labels_and_ties_are_answered():
    unlabelled = synthetic.records(40, exits=2, labels=np.full(40, -1, np.int32))
    assert rejection.fit(unlabelled, never(2), abstain=0.5).provenance["rejection"]["wrong"] is None
    constant = synthetic.records(
        10, exits=2, scores={"max_prob": np.full((3, 10), 0.5, np.float32)}
    )
    policy = rejection.fit(constant, never(2), abstain=0.5)
    assert policy.provenance["rejection"]["answered"] == 1


def test_a_promised_risk_holds_for_the_whole_policy():
    policy = rejection.fit(RECORDS, make([0.98, 0.95], "max_prob"), risk=0.045)
    stated = policy.provenance["rejection"]
    assert not stated["unreachable"] and stated["wrong"] <= stated["bound"] <= 0.045
    assert 0.5 < stated["answered"] < 1
    assert rejection.assess(policy, synthetic.records(3000, exits=2, seed=5))["wrong"] <= 0.045


def test_a_risk_out_of_reach_answers_nothing_and_says_so():
    fitted = budget.fit(RECORDS, "max_prob", 2e6)
    policy = rejection.fit(RECORDS, fitted, risk=0.001)
    assert policy.provenance["coverage"] == 0 and "spent" not in policy.provenance
    assert policy.provenance["rejection"]["unreachable"] is True
    assert policy.thresholds.tolist() == [np.inf] * 2 and policy.reject == np.inf
    assert policy.provenance["rejection"]["answered"] == 0


@pytest.mark.parametrize("asked", [{"abstain": 0.2}, {"abstain": 0.0}, {"risk": 0.001}])
def test_rejection_survives_the_file(asked, tmp_path):
    policy = rejection.fit(RECORDS, POLICY, **asked)
    policies.save(policy, tmp_path / "policy.json")
    back = policies.load(tmp_path / "policy.json", exit_depths=RECORDS.exit_depths)
    assert back.reject == policy.reject and back.provenance == policy.provenance
    assert rejection.assess(back, RECORDS) == rejection.assess(policy, RECORDS)


def test_positions_of_one_group_are_one_piece_of_evidence():
    few = synthetic.records(3000, exits=2, groups=np.arange(3000, dtype=np.int32) // 300)
    assert rejection.fit(few, POLICY, risk=0.1).provenance["rejection"]["unreachable"]
    assert rejection.fit(few, POLICY, risk=0.5).provenance["rejection"]["groups"] == 10


@pytest.mark.parametrize("asked", [{"abstain": 0.1}, {"risk": 0.1}])
def test_exits_and_rejection_together(asked):
    policy = rejection.fit_exits(RECORDS, "max_prob", 2.4e6, **asked)
    known = RECORDS if "abstain" in asked else synthetic.records(3000, exits=2, seed=6)
    policy = rejection.fit(known, policy, **asked)
    stated = policy.provenance
    assert stated["method"] == "joint" and stated["spent"] <= 2.4e6 * (1 + 1e-9)
    alone = budget.fit(RECORDS, "max_prob", 2.4e6, against="label")
    apart = rejection.fit(RECORDS, alone, **asked).provenance["rejection"]
    if "abstain" in asked:
        assert stated["rejection"]["answered"] >= 0.9 - 1e-9
        assert stated["rejection"]["wrong"] <= apart["wrong"]
    else:
        fresh = synthetic.records(3000, exits=2, seed=7)
        assert rejection.assess(policy, fresh)["wrong"] <= 0.1 + 0.02
        assert stated["rejection"]["bound"] <= 0.1


def test_neither_both_nor_nonsense():
    for asked in ({}, {"abstain": 0.1, "risk": 0.1}):
        with pytest.raises(ValueError, match="give either abstain.* or risk"):
            rejection.fit(RECORDS, POLICY, **asked)
    with pytest.raises(ValueError, match=r"abstain is a share in \[0, 1\], not 5"):
        rejection.fit(RECORDS, POLICY, abstain=5)
    with pytest.raises(ValueError, match="the final exit has no gate to reject by"):
        rejection.fit(RECORDS, never(2, "gate"), abstain=0.1)


def test_of_generated_tokens_the_probability_must_be_what_is_rejected_by():
    assert rejection.least_probability(None) == rejection.least_probability(never(2)) == 0
    assert rejection.least_probability(make([2.0], reject=0.25)) == 0.25
    with pytest.raises(ValueError, match="by margin, which is not kept .* calibrate with max_prob"):
        rejection.least_probability(make([2.0], "margin", reject=0.25))
    with pytest.raises(ValueError, match="max_prob at temperatures of its own, which"):
        rejection.least_probability(make([2.0], temperatures=[1.0, 2.0], reject=0.25))
