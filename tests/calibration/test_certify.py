import dataclasses
import math

import numpy as np
import pytest
import synthetic
from hypothesis import given, settings
from hypothesis import strategies as st

from early_exit import policy as policies
from early_exit.calibration import bounds, certify, thresholds
from early_exit.calibration.records import Records

NEVER = policies.NEVER
POPULATION = synthetic.records(20_000, seed=1)
ROWS = certify.path(synthetic.records(300, seed=2), "max_prob")
LEAVERS = certify.path(synthetic.records(300, seed=2), "max_prob", "leavers")


def drawn(count, seed):
    """Independent positions of the population."""
    part = POPULATION.take(np.random.default_rng(seed).integers(0, 20_000, count))
    return dataclasses.replace(part, groups=np.arange(count, dtype=np.int32))


def fit(records, rows=ROWS, **changes):
    options = {"method": "ltt", "alpha": 0.1, "delta": 0.1}
    return certify.fit(records, rows, "max_prob", **options | changes)


def true_risk(row, among="all"):
    exits = policies.first_exit(POPULATION.scores["max_prob"][:-1], np.asarray(row))
    left = exits < 3
    wrong = (POPULATION.predictions[exits, np.arange(20_000)] != POPULATION.predictions[-1])[left]
    return wrong.sum() / (left.sum() if among == "leavers" else 20_000) if left.any() else 0.0


def test_a_path_goes_from_never_to_always_without_turning_back():
    assert (np.diff(ROWS, axis=0) <= 0).all()
    assert ROWS.dtype == np.float32 and ROWS.shape[1] == 3
    shares = [np.mean(policies.first_exit(POPULATION.scores["max_prob"][:-1], r) < 3) for r in ROWS]
    assert 0 < shares[0] < 0.1 and shares[-1] > 0.99
    assert max(np.diff(shares)) < 0.1


def test_a_path_for_leavers_begins_where_some_leave():
    design = synthetic.records(300, seed=2)
    scores = design.scores["max_prob"][:-1]
    assert np.mean(policies.first_exit(scores, LEAVERS[0]) < 3) >= certify.FIRST_COVERAGE
    np.testing.assert_array_equal(LEAVERS, ROWS[len(ROWS) - len(LEAVERS) :])
    nobody = synthetic.records(
        9, predictions=np.repeat([[0], [1]], [3, 1], 0) * np.ones(9, np.int32)
    )
    assert certify.path(nobody, "max_prob", "leavers").shape == (0, 3)


@pytest.mark.parametrize("among", certify.AMONG)
@pytest.mark.parametrize("method", certify.METHODS)
def test_the_last_before_the_first_failure_is_taken(method, among):
    """A loop over rows and positions, each risk tested by definition."""
    records = drawn(150, seed=5)
    rows, alpha = {"all": (ROWS, 0.15), "leavers": (LEAVERS, 0.2)}[among]
    expected = [NEVER] * 3
    for row in rows:
        losses = []
        for n, scores in enumerate(records.scores["max_prob"].T):
            e = next((e for e in range(3) if scores[e] >= row[e]), 3)
            wrong = float(records.predictions[e, n] != records.predictions[3, n])
            if among == "all" or e < 3:
                losses.append(wrong)
        if certify.METHODS[method](np.array(losses), alpha, 0.1) > 0.1:
            break
        expected = row.tolist()
    policy = fit(records, rows, method=method, alpha=alpha, among=among)
    assert policy.thresholds.tolist() == expected != [NEVER] * 3


@pytest.mark.parametrize("among", certify.AMONG)
@pytest.mark.parametrize("method", certify.METHODS)
def test_risk_is_kept_but_for_delta(method, among):
    """At the binomial margin, over draws from a population whose risks are known."""
    draws, rows = 150, {"all": ROWS, "leavers": LEAVERS}[among]
    broken = 0
    for seed in range(draws):
        policy = fit(drawn(120, seed), rows, method=method, alpha=0.15, delta=0.2, among=among)
        broken += true_risk(policy.thresholds, among) > 0.15
    assert broken / draws <= 0.2 + 3 * math.sqrt(0.2 * 0.8 / draws)


def test_the_best_of_many_by_chance_breaks_the_promise():
    """What the tests above would find were nothing corrected for: a control."""
    broken = 0
    for seed in range(60):
        records = drawn(120, seed)
        scores = records.scores["max_prob"][:-1]
        kept = [NEVER] * 3
        for row in ROWS:
            exits = policies.first_exit(scores, row)
            wrong = records.predictions[exits, np.arange(120)] != records.predictions[-1]
            kept = row if wrong.mean() <= 0.15 else kept
        broken += true_risk(kept) > 0.15
    assert broken / 60 > 0.4


@settings(max_examples=25, deadline=None)
@given(
    st.integers(0, 50),
    st.tuples(st.floats(0.02, 0.6), st.floats(0.02, 0.6)),
    st.sampled_from(sorted(certify.METHODS)),
    st.sampled_from(certify.AMONG),
)
def test_thresholds_do_not_rise_with_alpha(seed, alphas, method, among):
    records, rows = drawn(60, seed), {"all": ROWS, "leavers": LEAVERS}[among]
    low, high = (
        fit(records, rows, method=method, alpha=alpha, among=among) for alpha in sorted(alphas)
    )
    assert (np.asarray(high.thresholds) <= np.asarray(low.thresholds)).all()


@pytest.mark.parametrize("method", certify.METHODS)
def test_the_bound_is_the_least_alpha_that_would_have_done(method):
    records = drawn(200, seed=3)
    for among, rows, alpha in (("all", ROWS, 0.2), ("leavers", LEAVERS, 0.2)):
        policy = fit(records, rows, method=method, alpha=alpha, among=among)
        stated, taken = policy.provenance, np.asarray(policy.thresholds)
        assert stated["risk"] < stated["bound"] <= alpha
        one = taken[None]
        again = fit(records, one, method=method, alpha=stated["bound"] + 1e-6, among=among)
        assert again.thresholds.tolist() == taken.tolist()
        less = fit(records, one, method=method, alpha=stated["bound"] - 1e-3, among=among)
        assert less.thresholds.tolist() == [NEVER] * 3
        if among == "leavers":
            assert stated["risk"] == pytest.approx(1 - stated["agreement"])


def test_the_provenance_says_what_was_promised_and_found():
    records = drawn(200, seed=3)
    policy = fit(records, alpha=0.2)
    stated = policy.provenance
    asked = {"method": "ltt", "alpha": 0.2, "delta": 0.1, "risk_of": "disagreement"}
    assert asked.items() <= stated.items()
    assert (stated["among"], stated["unit"], stated["units"]) == ("all", "group", 200)
    assert stated["risk"] == pytest.approx(stated["disagreement"])
    assert stated["heads"] == "ab12" and stated["unreachable"] == []


@pytest.mark.parametrize("method", certify.METHODS)
@pytest.mark.parametrize("count", [1, 20])
def test_too_few_units_never_leave_and_say_how_many_it_takes(method, count):
    policy = fit(drawn(count, 0), method=method, alpha=0.05)
    assert policy.thresholds.tolist() == [NEVER] * 3
    stated = policy.provenance
    assert (stated["risk"], stated["bound"], stated["units"]) == (None, None, count)
    assert stated["units_needed"] == bounds.units_needed(0.05, 0.1) == 45
    assert stated["unreachable"] == [2, 4, 6] and stated["coverage"] == 0


def test_a_model_that_always_agrees_leaves_at_once():
    same = synthetic.records(100, predictions=np.ones((4, 100), np.int32))
    policy = fit(same, certify.path(same, "max_prob"))
    assert policy.provenance["exit_shares"] == [1, 0, 0, 0]
    assert policy.provenance["risk"] == 0


def test_equal_scores_leave_together_or_not_at_all():
    scores = {"max_prob": np.full((4, 200), 0.5, np.float32)}
    right = np.ones((4, 200), np.int32)
    right[:3, :10] = 0
    policy = fit(synthetic.records(200, scores=scores, predictions=right))
    tied = synthetic.records(200, seed=4, scores=scores, predictions=right)
    for alpha, threshold in ((0.02, NEVER), (0.2, 0.5)):
        policy = fit(tied, certify.path(tied, "max_prob"), alpha=alpha)
        assert policy.thresholds[0] == np.float32(threshold)


@pytest.mark.parametrize("method", ["ltt", "ucb"])
def test_repeating_the_positions_of_a_text_is_no_new_evidence(method):
    records = drawn(80, seed=6)
    tenfold = records.take(np.repeat(np.arange(80), 10))
    policy = fit(records, method=method, alpha=0.25)
    assert fit(tenfold, method=method, alpha=0.25).thresholds.tolist() == policy.thresholds.tolist()
    deceived = fit(tenfold, method=method, alpha=0.25, unit="position")
    assert deceived.provenance["coverage"] > policy.provenance["coverage"]


@pytest.mark.parametrize("method", ["ltt", "ucb"])
def test_leavers_of_a_text_are_told_from_the_others_by_the_loss_of_these(method):
    """The share of wrong ones among leavers is below α if the mean is, α standing for the rest."""
    groups = np.repeat(np.arange(300, dtype=np.int32), 8)
    records = dataclasses.replace(drawn(2400, seed=7), groups=groups)
    policy = fit(records, LEAVERS, method=method, alpha=0.3, among="leavers")
    expected = [NEVER] * 3
    for row in LEAVERS:
        exits = policies.first_exit(records.scores["max_prob"][:-1], row)
        wrong = records.predictions[exits, np.arange(2400)] != records.predictions[-1]
        losses = np.where(exits < 3, wrong, 0.3).reshape(300, 8).mean(axis=1)
        if certify.METHODS[method](losses, 0.3, 0.1) > 0.1:
            break
        expected = row.tolist()
    assert policy.thresholds.tolist() == expected
    assert method == "ltt" or expected != [NEVER] * 3
    assert policy.provenance["coverage"] == 0 or policy.provenance["agreement"] > 0.7


def test_an_exact_test_draws_one_position_of_each_text():
    """So it sees 40 texts, though there are 400 positions, and another draw sees others."""
    groups = np.repeat(np.arange(40, dtype=np.int32), 10)
    records = dataclasses.replace(drawn(400, seed=7), groups=groups)
    found = [
        fit(records, method="clopper_pearson", alpha=0.3, seed=s).provenance for s in (0, 0, 1)
    ]
    assert all(stated["units"] == 40 for stated in found)
    assert found[0]["unit"] == "position drawn from each group"
    assert found[0] == found[1] != found[2]
    every = fit(records, method="clopper_pearson", alpha=0.3, unit="position").provenance
    assert (every["units"], every["unit"]) == (400, "position")


@pytest.mark.parametrize("method", certify.METHODS)
def test_a_users_risk_does_what_the_named_one_does(method):
    def changed(records, exits):
        return records.predictions[exits, np.arange(len(exits))] != records.predictions[-1]

    records = drawn(100, seed=8)
    own, named = (
        fit(records, method=method, alpha=0.2, risk_of=r) for r in (changed, "disagreement")
    )
    assert own.thresholds.tolist() == named.thresholds.tolist()
    assert own.provenance["risk_of"] == "changed"


def test_accuracy_may_drop_where_disagreement_may_not():
    """Answers that change from one wrong one to another are no loss of accuracy."""
    records = drawn(300, seed=9)
    records = dataclasses.replace(records, labels=np.full(300, 2, np.int32))
    assert fit(records, risk_of="accuracy_drop").provenance["coverage"] > 0.9
    assert fit(records).provenance["coverage"] < 0.8


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"method": "luck"}, "unknown method 'luck'; choose one of ltt, clopper_pearson, ucb"),
        ({"among": "some"}, "unknown among 'some'; choose one of all, leavers"),
        ({"alpha": 0}, r"alpha is a share in \(0, 1\), not 0"),
        ({"delta": 1.0}, r"delta is a share in \(0, 1\), not 1.0"),
        ({"alpha": float("nan")}, r"alpha is a share in \(0, 1\), not nan"),
        ({"unit": "token"}, "unknown unit 'token'"),
        ({"risk_of": "regret"}, "unknown risk 'regret'"),
        ({"rows": ROWS[:, :2]}, r"rows of thresholds have the shape .* records are of 3 early"),
    ],
)
def test_bad_settings(changes, message):
    with pytest.raises(ValueError, match=message):
        fit(drawn(10, 0), **changes)


def test_unknown_confidence():
    with pytest.raises(ValueError, match="unknown confidence 'margin'; the records have max_prob"):
        certify.fit(drawn(10, 0), ROWS, "margin", method="ltt", alpha=0.1, delta=0.1)


def test_thresholds_of_a_path_are_each_heads_own_at_the_level():
    design = synthetic.records(100)
    rows = certify.path(design, "max_prob")[certify.FIRST_STEPS - 1 :]
    for level, row in zip(thresholds.LEVELS[::-1], rows, strict=True):
        if round(level * 1000) % 97 == 0:
            pairs = zip(design.scores["max_prob"][:-1], design.agrees, strict=True)
            assert row.tolist() == [thresholds.epsilon_accuracy(*pair, level) for pair in pairs]


def test_a_model_without_early_exits_goes_all_the_way():
    only = Records(
        np.array([4]),
        np.array([1.0]),
        {"max_prob": np.ones((1, 50), np.float32)},
        np.ones((1, 50), np.int32),
        np.ones(50, np.int32),
        np.zeros((1, 50), np.float32),
        np.arange(50, dtype=np.int32),
    )
    policy = certify.fit(only, np.zeros((1, 0)), "max_prob", method="ltt", alpha=0.1, delta=0.1)
    assert policy.provenance["coverage"] == 0
