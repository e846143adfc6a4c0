"""What data can promise at best is what a fit shows on records without a single loss, no more."""

import dataclasses

import numpy as np
import pytest
import synthetic

from early_exit.calibration import certify, methods, promise
from early_exit.settings.sections import CalibrateSettings

# 38 texts of unlike lengths; all exits always answer as the full model does, and are right.
GROUPS = np.repeat(np.arange(38), np.random.default_rng(0).integers(1, 9, 38))
ALWAYS_RIGHT = dataclasses.replace(
    synthetic.records(len(GROUPS)),
    predictions=np.ones((4, len(GROUPS)), np.int32),
    groups=GROUPS.astype(np.int32),
)


@pytest.mark.parametrize("unit", ["group", "position"])
@pytest.mark.parametrize("method", sorted(certify.METHODS))
def test_the_least_risk_is_the_least_that_a_fit_can_show(method, unit):
    settings = CalibrateSettings(method=method, unit=unit)
    (found,) = promise.reach(GROUPS, settings, "texts")
    for alpha, leaves in ((1.001 * found.least, True), (0.999 * found.least, False)):
        asked = dataclasses.replace(settings, alpha=alpha)
        policy = methods.fit(ALWAYS_RIGHT, asked)
        assert policy.provenance["units"] == found.units
        assert (policy.provenance["coverage"] > 0) == leaves
        (again,) = promise.reach(GROUPS, asked, "texts")
        if leaves:
            promise.check([again], asked)
        else:
            with pytest.raises(ValueError, match=f"alpha={alpha:g} cannot be promised"):
                promise.check([again], asked)


def test_the_least_rate_of_wrong_answers_is_the_least_that_a_fit_can_show():
    settings = CalibrateSettings(method="epsilon", reject_risk=0.1)
    (found,) = promise.reach(GROUPS, settings, "texts")
    for risk, answers in ((1.001 * found.least, True), (0.999 * found.least, False)):
        policy = methods.fit(ALWAYS_RIGHT, dataclasses.replace(settings, reject_risk=risk))
        stated = policy.provenance["rejection"]
        assert stated["groups"] == found.units and (stated["answered"] > 0) == answers


def test_with_both_promises_each_has_its_texts():
    settings = CalibrateSettings(method="ltt", reject_risk=0.3)
    rejected, certified = promise.reach(GROUPS, settings, "texts")
    policy = methods.fit(ALWAYS_RIGHT, dataclasses.replace(settings, alpha=0.3))
    assert policy.provenance["rejection"]["groups"] == rejected.units == 19
    assert policy.provenance["units"] == certified.units < 19


def test_it_is_said_in_a_sentence_that_rounds_up():
    (found,) = promise.reach(GROUPS, CalibrateSettings(method="ltt"), "texts")
    assert str(found) == (
        "27 independent texts to test on: alpha ≥ 0.082 at δ = 0.1 is the most that they can "
        "promise"
    )
    assert found.least < 0.082


def test_a_policy_that_never_leaves_is_taken_where_that_is_allowed():
    settings = CalibrateSettings(method="ltt", alpha=0.01, allow_never=True)
    promise.check(promise.reach(GROUPS, settings, "texts"), settings)


def test_too_few_texts_are_refused_before_a_model_runs():
    one = np.zeros(5, np.int32)
    with pytest.raises(ValueError, match="leaves one part of the records empty"):
        promise.reach(one, CalibrateSettings(method="ucb"), "texts")


def test_methods_that_promise_nothing_of_new_data_have_no_reach():
    settings = CalibrateSettings(method="search", budget=4.0)
    assert not promise.reach(GROUPS, settings, "texts")
    assert promise.stated(settings, classifies=False, kind="texts") is None


def test_a_promise_names_its_subject():
    text, example = (
        promise.stated(CalibrateSettings(method="ltt"), classifies=classifies, kind="units")[
            "subject"
        ]
        for classifies in (False, True)
    )
    assert "given text" in text and "not of decoded answers" in text and "examples" in example
