"""Thresholds for a budget: the best answers that a mean cost per position buys.

The one idea: all of it works on records, so every budget there is takes seconds, and none a run of
the model.

- `eero`, `eero_tight`: shares by exponential weights, carried out as the paper does, or exactly.
- `geometric`: shares that grow or shrink by a constant factor from exit to exit (MSDNet).
- `search`: no plan, but the best thresholds that can be found.

A budget and costs have one unit, whichever: blocks, multiply-adds, milliseconds by a model of time.
Recorded costs include every head on the way; a head where nothing leaves is not consulted in use,
so the true cost is lower still. (The `budget` that a policy itself may have is another thing: an
account kept from token to token, whatever the scores.)
"""

from collections.abc import Sequence

import numpy as np

from early_exit import policy as policies
from early_exit.calibration import plans
from early_exit.calibration.records import Records
from early_exit.calibration.risk import disagreement, with_evidence
from early_exit.calibration.search import chances, search

METHODS = ("eero", "eero_tight", "geometric", "search")


def fit(
    records: Records,
    confidence: str,
    budget: float,
    *,
    method: str = "search",
    costs: str | Sequence[float] = "multiply_adds",
    against: str = "agreement",
    beta: float = 0.04,
    slack: float = 0.0,
    starts: Sequence[np.ndarray] = (),
) -> policies.ExitPolicy:
    """A policy whose positions cost at most `budget` on average, on the records.

    The provenance states what was `spent` and the `quality` reached, beside `risk.evidence`.

    Args:
      costs: "blocks", "multiply_adds", or E + 1 rising numbers in the budget's unit, such as
        milliseconds.
      against: what makes an answer good: "agreement" with the full model, or the "label".
        Positions without a label count for cost, not for risk.
      beta, slack: of `plans.eero_shares` and, for `eero`, of `plans.thresholds_of_all`.
      starts: thresholds that `search` must not fall behind, beside the other methods'.

    Raises:
      ValueError: unknown names, costs that do not rise, or a budget below the first exit's cost.
    """
    if method not in METHODS:
        raise ValueError(f"unknown method {method!r}; choose one of {', '.join(METHODS)}")
    each = plans.rising(costs_of(records, costs), budget)
    good, known = goodness(records, against), judged(records, against)
    risks = 1 - good[:, known].mean(axis=1)
    scores = records.score(confidence)[:-1]

    def reached(thresholds):
        exits = policies.first_exit(scores, thresholds)
        spent = each[exits].mean()
        return (
            spent <= budget * (1 + 1e-9),
            good[exits, np.arange(len(exits))][known].mean(),
            -spent,
        )

    def thresholds(method):
        if method == "search":
            others = [*(thresholds(other) for other in METHODS if other != "search"), *starts]
            expected = chances(records.score(confidence), good, known)
            return max(search(scores, expected, each, budget, others), *others, key=reached)
        if method == "geometric":
            return plans.thresholds_of_survivors(scores, plans.geometric_shares(each, budget))
        shares, _ = plans.eero_shares(risks, each, budget, beta)
        if method == "eero":
            return plans.thresholds_of_all(scores, shares, slack)
        return plans.thresholds_of_survivors(scores, shares)

    return described(thresholds(method), records, confidence, method, budget, costs, against)


def described(
    thresholds: np.ndarray,
    records: Records,
    confidence: str,
    method: str,
    budget: float,
    costs: str | Sequence[float],
    against: str,
) -> policies.ExitPolicy:
    """A policy with these thresholds; its provenance says what for, and what it does."""
    named = costs if isinstance(costs, str) else [float(cost) for cost in costs]
    policy = policies.make(
        thresholds,
        confidence,
        method=method,
        target={"budget": float(budget), "costs": named, "against": against},
        **assess(policies.make(thresholds, confidence), records, costs, against),
    )
    return with_evidence(policy, records)


def sweep(
    records: Records, confidence: str, budgets: Sequence[float], **settings
) -> list[policies.ExitPolicy]:
    """`fit` for every budget, from the lowest to the highest.

    What `search` finds does not get worse with a higher budget.
    """
    found: list[policies.ExitPolicy] = []
    for budget in sorted(budgets):
        starts = [np.asarray(policy.thresholds) for policy in found[-1:]]
        found.append(fit(records, confidence, budget, starts=starts, **settings))
    return found


def assess(
    policy: policies.ExitPolicy,
    records: Records,
    costs: str | Sequence[float] = "multiply_adds",
    against: str = "agreement",
) -> dict:
    """What a policy does on records: `spent`, its mean cost, and `quality`, the share of answers
    that are the full model's, or the label."""
    costs, good = costs_of(records, costs), goodness(records, against)
    exits = policy.exit_index(records.score(policy.confidence), records.exit_depths)
    right = good[exits, np.arange(len(exits))][judged(records, against)]
    return {"spent": float(costs[exits].mean()), "quality": float(right.mean())}


def costs_of(records: Records, costs: str | Sequence[float]) -> np.ndarray:
    """Costs [E + 1], float64, of leaving at each exit; named, or as given."""
    if isinstance(costs, str):
        named = {"blocks": records.exit_depths, "multiply_adds": records.costs}
        if costs not in named:
            raise ValueError(f"unknown costs {costs!r}; name {' or '.join(named)}, or give numbers")
        costs = named[costs]
    costs = np.asarray(costs, np.float64)
    if costs.shape != records.exit_depths.shape:
        raise ValueError(
            f"costs must be {len(records.exit_depths)} numbers, one per exit, not {costs}"
        )
    return costs


def goodness(records: Records, against: str) -> np.ndarray:
    """bool [E + 1, N], whether each exit's answer is the full model's, or the label."""
    if against == "agreement":
        return ~disagreement(records)
    if against == "label":
        return records.predictions == records.labels
    raise ValueError(f"unknown aim {against!r}; choose agreement or label")


def judged(records: Records, against: str) -> np.ndarray:
    """bool [N], whether it is known which answers are good.

    Raises:
      ValueError: it never is.
    """
    known = (records.labels >= 0) | (against == "agreement")
    if not known.any():
        raise ValueError("no position has a label; record labelled data, or aim for agreement")
    return known
