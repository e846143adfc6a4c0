import numpy as np
import pytest
import synthetic

from early_exit import policy as policies
from early_exit.calibration import risk


def grouped(seed=0):
    """Thirty positions of three groups whose names and places are mixed."""
    groups = np.random.default_rng(seed).choice([7, 2, 40], 30).astype(np.int32)
    return synthetic.records(30, seed=seed, groups=groups)


def slow_loss(records, name, e, n):
    predicted, final = records.predictions[e, n], records.predictions[-1, n]
    if name == "disagreement":
        return float(predicted != final)
    return float(final == records.labels[n] and predicted != records.labels[n])


@pytest.mark.parametrize("staying", [None, 0.0, 0.25])
@pytest.mark.parametrize("unit", risk.UNITS)
@pytest.mark.parametrize("name", risk.RISKS)
def test_losses_of_units_equal_a_loop(name, unit, staying):
    records = grouped()
    exits = np.random.default_rng(1).integers(0, 4, 30)
    found = risk.units(records, name, unit).losses(exits, staying)
    losses = [
        staying if staying is not None and e == 3 else slow_loss(records, name, e, n)
        for n, e in enumerate(exits)
    ]
    if unit == "group":
        losses = [
            np.mean([losses[n] for n in range(30) if records.groups[n] == g]) for g in (2, 7, 40)
        ]
    np.testing.assert_allclose(found, losses, rtol=1e-12)


def test_the_full_model_loses_nothing():
    records = grouped()
    for name in risk.RISKS:
        assert not risk.RISKS[name](records)[-1].any()


def test_the_drop_in_accuracy_is_at_most_its_risk():
    records = synthetic.records(500)
    losses = risk.accuracy_drop(records).mean(axis=1)
    drop = records.correct[-1].mean() - records.correct.mean(axis=1)
    assert (losses >= drop).all() and losses[0] > drop[0] > 0


def test_a_drop_needs_labels():
    unlabelled = synthetic.records(5, labels=np.full(5, -1, np.int32))
    with pytest.raises(ValueError, match="5 of 5 positions have no label"):
        risk.units(unlabelled, "accuracy_drop", "group")


def test_a_users_loss_sees_records_and_exits():
    def share_left(records, exits):
        groups = np.unique(records.groups)
        return np.array([(exits[records.groups == g] < 3).mean() for g in groups])

    records, exits = grouped(), np.random.default_rng(1).integers(0, 4, 30)
    found = risk.units(records, share_left, "group").losses(exits)
    np.testing.assert_array_equal(found, share_left(records, exits))
    assert risk.name_of(share_left) == "share_left"
    with pytest.raises(ValueError, match="the risk of leavers is for named risks"):
        risk.units(records, share_left, "group").losses(exits, staying=0.1)


@pytest.mark.parametrize("losses", [[0.1, 0.2], [0.0, 0.5, 1.5], [0.0, np.nan, 0.1], 0.5])
def test_a_users_loss_is_a_share_of_every_unit(losses):
    def mine(records, exits):
        return losses

    units = risk.units(grouped(), mine, "group")
    with pytest.raises(
        ValueError, match=r"the risk 'mine' must give 3 losses in \[0, 1\], one for"
    ):
        units.losses(np.zeros(30, int))


def test_unknown_names():
    with pytest.raises(ValueError, match="unknown unit 'token'; choose one of group, position"):
        risk.units(grouped(), "disagreement", "token")
    with pytest.raises(ValueError, match="unknown risk 'regret'; choose one of disagreement, acc"):
        risk.units(grouped(), "regret", "group")


def test_every_position_of_a_group_is_as_likely_drawn():
    records = grouped()
    records = synthetic.records(30, groups=records.groups, labels=np.arange(30, dtype=np.int32))
    drawn = [risk.one_of_each_group(records, seed) for seed in range(400)]
    assert all(part.groups.tolist() == [2, 7, 40] for part in drawn)
    counts = np.bincount(np.concatenate([part.labels for part in drawn]), minlength=30)
    for group in (2, 7, 40):
        members = np.flatnonzero(records.groups == group)
        share = 1 / len(members)
        margin = 5 * np.sqrt(share * (1 - share) / 400)
        np.testing.assert_allclose(counts[members] / 400, share, atol=margin)


def test_evidence_equals_a_loop():
    records = synthetic.records(200)
    policy = policies.make([0.9, policies.NEVER, 0.7], method="mine")
    left = []
    for scores in records.scores["max_prob"].T:
        left.append(next((e for e in (0, 2) if scores[e] >= np.float32([0.9, 0, 0.7])[e]), 3))
    agrees = [records.predictions[e, n] == records.predictions[3, n] for n, e in enumerate(left)]
    leavers = [agree for agree, e in zip(agrees, left, strict=True) if e < 3]
    found = risk.evidence(policy, records)
    assert found["positions"] == 200
    assert found["coverage"] == len(leavers) / 200
    assert found["agreement"] == pytest.approx(np.mean(leavers))
    assert found["disagreement"] == pytest.approx(1 - np.mean(agrees))
    assert found["mean_depth"] == pytest.approx(np.mean([2 * e + 2 for e in left]))
    assert found["mean_cost"] == pytest.approx(np.mean([e + 1 for e in left]) / 4)
    np.testing.assert_allclose(found["exit_shares"], np.bincount(left, minlength=4) / 200)

    stated = risk.with_evidence(policy, records).provenance
    assert stated == {"method": "mine", **found, "unreachable": [4], "heads": "ab12"}


def test_a_policy_that_nobody_follows_has_no_agreement():
    assert risk.evidence(policies.never(3), synthetic.records(9))["agreement"] is None
