import json

import numpy as np
import pytest
import synthetic

from early_exit import policy as policies
from early_exit.calibration import budget, plans

RECORDS = synthetic.records(3000, exits=3)


@pytest.mark.parametrize("method", budget.METHODS)
def test_the_records_keep_to_the_budget(method):
    for unit, limit in (("multiply_adds", 2e6), ("blocks", 4.2), ([0.5, 0.9, 4.0, 4.1], 2.0)):
        policy = budget.fit(RECORDS, "max_prob", limit, method=method, costs=unit)
        assert policy.provenance["spent"] <= limit * (1 + 1e-9)
        assert policy.provenance["target"] == {
            "budget": limit,
            "costs": unit,
            "against": "agreement",
        }
        assert policy.provenance["heads"] == "ab12"


def test_the_tight_form_spends_what_the_papers_leaves():
    """And what it buys is better answers, on new positions too."""
    limit = 3.5e6
    known, fresh = (synthetic.records(4000, exits=6, seed=seed) for seed in (0, 1))
    reached = {}
    for method in ("eero", "eero_tight"):
        policy = budget.fit(known, "max_prob", limit, method=method, against="label")
        reached[method] = policy.provenance, budget.assess(policy, fresh, against="label")
    (paper, paper_fresh), (tight, tight_fresh) = reached["eero"], reached["eero_tight"]
    assert paper["spent"] < 0.97 * limit and tight["spent"] >= 0.999 * limit
    assert tight["quality"] > paper["quality"]
    assert tight_fresh["quality"] > paper_fresh["quality"]


@pytest.mark.parametrize("against", ["agreement", "label"])
def test_search_is_no_worse_than_any_plan_and_better_with_more(against):
    limits = [1.3e6, 2e6, 3e6]
    found = budget.sweep(RECORDS, "max_prob", limits, against=against)
    qualities = [policy.provenance["quality"] for policy in found]
    assert qualities == sorted(qualities)
    for limit, quality in zip(limits, qualities, strict=True):
        for method in ("eero", "eero_tight", "geometric"):
            other = budget.fit(RECORDS, "max_prob", limit, method=method, against=against)
            assert quality >= other.provenance["quality"] - 1e-9


def test_planned_shares_survive_the_file(tmp_path):
    """Float32 scores, float32 thresholds: a reloaded policy does what was planned."""
    policy = budget.fit(RECORDS, "max_prob", 2e6, method="geometric")
    policies.save(policy, tmp_path / "policy.json")
    back = policies.load(tmp_path / "policy.json", exit_depths=RECORDS.exit_depths)
    exits = back.exit_index(RECORDS.scores["max_prob"], RECORDS.exit_depths)
    planned = plans.geometric_shares(RECORDS.costs, 2e6)
    np.testing.assert_allclose(np.bincount(exits) / exits.size, planned, atol=1 / exits.size)
    assert back.provenance == policy.provenance


@pytest.mark.parametrize("method", budget.METHODS)
def test_a_constant_score_costs_less_rather_than_more(method):
    constant = synthetic.records(50, scores={"max_prob": np.full((4, 50), 0.5, np.float32)})
    policy = budget.fit(constant, "max_prob", 2e6, method=method)
    assert policy.provenance["spent"] <= 2e6


@pytest.mark.parametrize("method", budget.METHODS)
def test_one_position_and_one_class(method):
    single = synthetic.records(1, predictions=np.ones((4, 1), np.int32))
    policy = budget.fit(single, "max_prob", 1e6, method=method, against="label")
    assert policy.provenance["spent"] == 1e6 and policy.provenance["quality"] == 1


def test_the_full_cost_lets_search_leave_only_where_nothing_is_lost():
    policy = budget.fit(RECORDS, "max_prob", 4e6)
    assert policy.provenance["quality"] == 1


def test_positions_without_a_label_count_for_cost_alone():
    labels = RECORDS.labels.copy()
    labels[::2] = -1
    some = synthetic.records(3000, exits=3, labels=labels)
    policy = budget.fit(some, "max_prob", 2e6, method="eero_tight", against="label")
    labelled = budget.assess(policy, some.take(labels > 0), against="label")
    assert policy.provenance["quality"] == labelled["quality"]
    np.testing.assert_allclose(policy.provenance["spent"], 2e6, rtol=1e-3)


def test_provenance_is_json():
    policy = budget.fit(RECORDS, "max_prob", 2.0, costs=np.arange(1.0, 5), method="geometric")
    assert json.loads(json.dumps(policy.provenance)) == policy.provenance


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"method": "best"}, "unknown method 'best'; choose one of eero"),
        ({"costs": "seconds"}, "unknown costs 'seconds'; name blocks or multiply_adds"),
        ({"costs": [1.0, 2.0]}, "costs must be 4 numbers, one per exit"),
        ({"costs": [1.0, 3.0, 2.0, 4.0]}, "costs must be positive and rise"),
        ({"against": "taste"}, "unknown aim 'taste'; choose agreement or label"),
        ({"confidence": "margin"}, "unknown confidence 'margin'; the records have max_prob"),
        (
            {"budget": 1e5},
            "budget of 100000 cannot be kept: leaving at the first exit costs 1e\\+06",
        ),
    ],
)
def test_settings_are_checked(settings, message):
    given = {"confidence": "max_prob", "budget": 2e6} | settings
    with pytest.raises(ValueError, match=message):
        budget.fit(RECORDS, **given)


def test_labels_are_needed_to_judge_by_them():
    unlabelled = synthetic.records(10, labels=np.full(10, -1, np.int32))
    assert budget.fit(unlabelled, "max_prob", 2e6).provenance["spent"] <= 2e6
    with pytest.raises(ValueError, match="no position has a label; record labelled data"):
        budget.fit(unlabelled, "max_prob", 2e6, against="label")
