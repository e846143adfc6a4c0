"""What a user asks of a policy, by name, and the policy that keeps it.

The one idea: every method is a function of records. What it may look at is settled here: whoever
promises something about new data tests it on groups that no other choice has seen.
"""

import dataclasses

import jax.numpy as jnp
import numpy as np

from early_exit import policy as policies
from early_exit.calibration import (
    budget,
    certify,
    chains,
    drift,
    rejection,
    risk,
    temperature,
    thresholds,
)
from early_exit.calibration.records import Records
from early_exit.policy import ExitPolicy
from early_exit.settings.sections import CalibrateSettings

BUDGETED = (*budget.METHODS, "joint")
NAMES = ("epsilon", *certify.METHODS, *BUDGETED)


def fit(records: Records, settings: CalibrateSettings) -> ExitPolicy:
    """The policy that keeps what is asked; its provenance says how well, and on what.

    With temperatures, it says under `temperature` what they do to the calibration error and, as
    that alone misleads, what share would leave without them (`coverage_without`) and at what cost.

    Raises:
      ValueError: unknown names, values out of range, or too few groups.
    """
    if len(records.exit_depths) == 1:  # a recurrent exit alone
        policy = policies.make((), settings.confidence, **chains.asked(settings))
        return risk.with_evidence(policy, records)
    if settings.method in BUDGETED and settings.budget is None:
        raise ValueError(f"{settings.method} spends a budget; give one, in {settings.costs}")
    design = tested = answered = records
    if settings.reject_risk is not None:
        tested, answered = tested.split(0.5, settings.seed)
        design = tested
    if settings.method in certify.METHODS:
        design, tested = tested.split(settings.design, settings.seed)

    if not settings.temperature:
        policy = _fit(design, tested, settings)
        stated = {"drift": _drift(policy, tested, tested)}
    else:
        if settings.confidence in temperature.untold():
            raise ValueError(
                f"temperatures are known for max_prob and margin, not for {settings.confidence}"
            )
        found = temperature.fit(design)
        without = _fit(design, tested, settings).provenance
        softer = [temperature.apply(part, found) for part in (design, tested, answered)]
        policy = _fit(*softer[:2], settings)
        stated = {
            "temperature": {
                "error_before": temperature.calibration_error(tested),
                "error_after": temperature.calibration_error(softer[1]),
                "coverage_without": without["coverage"],
                "mean_cost_without": without["mean_cost"],
            },
            "drift": _drift(policy, softer[1], tested),
        }
        policy = dataclasses.replace(policy, temperatures=jnp.float32(found))
        answered = softer[2]
    policy = dataclasses.replace(policy, provenance={**policy.provenance, **stated})
    if settings.abstain is None and settings.reject_risk is None:
        return policy
    return rejection.fit(
        answered,
        policy,
        abstain=settings.abstain,
        risk=settings.reject_risk,
        delta=settings.delta,
        seed=settings.seed,
    )


def described(policy: ExitPolicy) -> str:
    """What a policy was asked for, in a few words; `by hand` if by no method."""
    stated = policy.provenance
    method = stated.get("method", "by hand")
    if method == "epsilon":
        return f"epsilon {stated['epsilon']:g}"
    if method in certify.METHODS:
        return f"{method} {stated['alpha']:g}"
    if method in BUDGETED:
        return f"{method} {stated['target']['budget']:g} {stated['target']['costs']}"
    return method


def _fit(design: Records, tested: Records, settings: CalibrateSettings) -> ExitPolicy:
    if settings.method == "epsilon":
        return thresholds.fit(tested, settings.confidence, settings.epsilon)
    if settings.method in budget.METHODS:
        return budget.fit(
            tested,
            settings.confidence,
            settings.budget,
            method=settings.method,
            costs=settings.costs,
            against=settings.against,
        )
    if settings.method == "joint":
        return rejection.fit_exits(
            tested,
            settings.confidence,
            settings.budget,
            abstain=settings.abstain,
            risk=settings.reject_risk,
            costs=settings.costs,
        )
    return certify.fit(
        tested,
        certify.path(design, settings.confidence, settings.among),
        settings.confidence,
        method=settings.method,
        alpha=settings.alpha,
        delta=settings.delta,
        risk_of=settings.risk,
        among=settings.among,
        unit=settings.unit,
        seed=settings.seed,
    )


def _drift(policy: ExitPolicy, scored: Records, said: Records) -> dict:
    """`drift.histogram` of answers that leave by the scores in `scored`.

    Args:
      said: the same positions without temperatures, as in use an answer's probability has none.
    """
    exits = policy.exit_index(scored.score(policy.confidence), scored.exit_depths)
    top = said.score("max_prob")[exits, np.arange(exits.size)]
    return drift.histogram(exits, top, len(scored.exit_depths))
