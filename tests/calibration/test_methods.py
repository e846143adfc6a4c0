import json

import numpy as np
import pytest
import synthetic

from early_exit import confidence
from early_exit import policy as policies
from early_exit.calibration import certify, methods, temperature
from early_exit.calibration.records import Softened
from early_exit.settings.sections import CalibrateSettings

RECORDS = synthetic.records(600)


def softened(seed=0):
    """Records with made-up normalisers: every exit twice too sure of two classes."""
    rng = np.random.default_rng(seed)
    ease = np.linspace(1, 3, 4)[:, None] * rng.exponential(size=(4, 600))
    right = rng.random((4, 600)) < 1 / (1 + np.exp(-ease))
    below = 2 * ease
    temperatures = np.array(confidence.TEMPERATURES)
    normalizers = np.log1p(np.exp(-below / temperatures[:, None, None])).astype(np.float32)
    top = np.exp(-normalizers[temperatures == 1][0])
    return synthetic.records(
        600,
        predictions=right.astype(np.int32),
        scores={"max_prob": top, "margin": 2 * top - 1, "entropy": top},
        losses=(-np.log(np.where(right, top, 1 - top))).astype(np.float32),
        softened=Softened(temperatures, normalizers, below.astype(np.float32)),
    )


def settings_of(method):
    abstain = 0.1 if method == "joint" else None
    return CalibrateSettings(method=method, epsilon=0.9, alpha=0.2, budget=4.0, abstain=abstain)


@pytest.mark.parametrize("method", methods.NAMES)
def test_every_method_leaves_early_and_its_evidence_is_kept_in_the_file(method, tmp_path):
    policy = methods.fit(RECORDS, settings_of(method))
    stated = policy.provenance
    assert stated["method"] == method and stated["heads"] == "ab12"
    assert 0 < stated["coverage"] <= 1 and 0 < stated["mean_cost"] < 1
    assert stated["positions"] == stated["drift"]["positions"]
    policies.save(policy, tmp_path / "policy.json")
    json.loads((tmp_path / "policy.json").read_text(), parse_constant=pytest.fail)
    back = policies.load(tmp_path / "policy.json", exit_depths=RECORDS.exit_depths)
    assert methods.described(back) == methods.described(policy) and method in methods.described(
        back
    )


@pytest.mark.parametrize("method", certify.METHODS)
def test_what_is_promised_is_tested_on_groups_that_nothing_else_has_seen(method, monkeypatch):
    seen = []

    def path(design, *_):
        seen.append(set(design.groups.tolist()))
        return np.full((1, 3), 0.5, np.float32)

    monkeypatch.setattr(certify, "path", path)
    whole = certify.fit
    monkeypatch.setattr(
        certify,
        "fit",
        lambda records, *a, **k: (
            seen.append(set(records.groups.tolist())) or whole(records, *a, **k)
        ),
    )
    stated = methods.fit(RECORDS, settings_of(method)).provenance
    design, tested = seen
    assert not design & tested and len(design | tested) == 600
    assert stated["units"] == len(tested) == 420


def test_temperatures_change_the_scores_and_the_provenance_says_what_it_is_worth():
    records = softened()
    policy = methods.fit(records, CalibrateSettings(epsilon=0.8, temperature=True))
    found = temperature.fit(records)
    np.testing.assert_array_equal(policy.temperatures, found.astype(np.float32))
    assert policy.temperatures.min() > 1.5 and policy.temperatures.max() < 3
    stated = policy.provenance["temperature"]
    assert max(stated["error_after"]) < min(stated["error_before"][:2])
    without = methods.fit(records, CalibrateSettings(epsilon=0.8))
    assert without.temperatures is None
    assert stated["coverage_without"] == without.provenance["coverage"]
    # The thresholds are in units of the softened score, which is lower.
    assert (policy.thresholds <= without.thresholds).all()
    changed = temperature.apply(records, found)
    exits = policy.exit_index(changed.scores["max_prob"], records.exit_depths)
    assert np.mean(exits < 3) == policy.provenance["coverage"]


@pytest.mark.parametrize("method", ["ltt", "search"])
def test_temperatures_go_with_every_method(method):
    policy = methods.fit(
        softened(),
        CalibrateSettings(
            method=method, alpha=0.3, budget=4.0, temperature=True, confidence="margin"
        ),
    )
    assert policy.temperatures.shape == (4,) and policy.provenance["coverage"] > 0


def test_a_share_may_stay_without_an_answer():
    policy = methods.fit(RECORDS, CalibrateSettings(epsilon=0.9, abstain=0.1))
    assert np.isfinite(policy.reject)
    assert 0.85 < policy.provenance["rejection"]["answered"] <= 1
    assert policy.provenance["method"] == "epsilon"


@pytest.mark.parametrize("method", ["epsilon", "ltt"])
def test_wrong_answers_are_promised_to_be_few(method):
    settings = CalibrateSettings(method=method, alpha=0.2, reject_risk=0.3, delta=0.2)
    policy = methods.fit(RECORDS, settings)
    stated = policy.provenance["rejection"]
    assert stated["groups"] == 300 and stated["bound"] <= 0.3
    assert policy.provenance["positions"] == {"epsilon": 300, "ltt": 210}[method]


def test_no_method_is_by_hand():
    assert methods.described(policies.make([0.5])) == "by hand"


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (CalibrateSettings(method="search"), "search spends a budget; give one, in blocks"),
        (CalibrateSettings(confidence="margin"), "unknown confidence 'margin'"),
        (
            CalibrateSettings(method="ltt", design=1e-9),
            "a share of 1e-09 of 600 groups",
        ),
        (CalibrateSettings(temperature=True), "records lack what temperatures are fitted on"),
        (
            CalibrateSettings(temperature=True, confidence="entropy"),
            "known for max_prob and margin, not for",
        ),
    ],
)
def test_bad_settings(settings, message):
    with pytest.raises(ValueError, match=message):
        methods.fit(RECORDS, settings)
