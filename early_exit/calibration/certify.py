"""Policies with a guarantee: with probability 1 − δ over the calibration data, risk ≤ α.

The one idea: a policy of several exits has as many parameters, and trying many of them on the same
data finds some that only look good. So the policies to be tried are put in a row beforehand, on
other data, from one that hardly leaves to one that leaves everywhere. They are tested in this
order, each at the full level δ, and the last before the first failure is taken ("fixed sequence
testing", Angelopoulos et al. 2021, "Learn then Test", §4; Schuster et al. 2022, CALM). A policy
whose risk is above α is then only taken if the first such in the row passes its own test, which has
probability ≤ δ.

What is guaranteed is the mean loss of a whole policy, each position leaving where its exits let it,
so survivors of earlier exits are no special case. Units must be independent (see `risk`): for
texts, the guarantee is about new texts like these. Where no policy passes, nothing leaves early.
"""

import numpy as np

from early_exit import policy as policies
from early_exit.calibration import bounds, risk, thresholds
from early_exit.calibration.records import Records

# How each method tests a policy's mean loss. The exact binomial test wants losses of 0 or 1.
METHODS = {
    "ltt": bounds.hoeffding_bentkus,
    "clopper_pearson": bounds.binomial,
    "ucb": bounds.betting,
}
AMONG = ("all", "leavers")
# Of very few leavers nothing can be shown, and the first failure is the end. So where the risk is
# that of leavers, testing begins where this share of the positions leaves.
FIRST_COVERAGE = 0.2
# Steps from never leaving to the highest level, at which none who leave was wrong on the design.
FIRST_STEPS = 20


def path(design: Records, confidence: str, among: str = "all") -> np.ndarray:
    """Policies to be tested in this order: thresholds float32 [J, E], none rising from row to row.

    A row is a level of agreement that all exits share (`thresholds.path`), from 1 down; before
    these, growing parts of those who leave at the level 1.

    Args:
      design: records of other groups than those that the test will see.
    """
    scores = design.score(confidence)[:-1]
    rows = thresholds.path(design, confidence, thresholds.LEVELS[::-1])
    lower = 1 - np.arange(1, FIRST_STEPS) / FIRST_STEPS
    before = [
        np.quantile(score[score >= limit], lower, method="higher")
        if (score >= limit).any()
        else np.full(len(lower), policies.NEVER)
        for score, limit in zip(scores, rows[0], strict=True)
    ]
    rows = np.concatenate([np.stack(before, axis=1).astype(np.float32), rows])
    if among == "all":
        return rows
    for j, row in enumerate(rows):
        if np.mean(policies.first_exit(scores, row) < len(scores)) >= FIRST_COVERAGE:
            return rows[j:]
    return rows[:0]


def fit(
    records: Records,
    rows: np.ndarray,
    confidence: str,
    *,
    method: str,
    alpha: float,
    delta: float,
    risk_of: str | risk.UserLoss = "disagreement",
    among: str = "all",
    unit: str = "group",
    seed: int = 0,
) -> policies.ExitPolicy:
    """The last of `rows` before the first whose risk cannot be shown to be at most α.

    Thresholds do not rise with α where they do not from row to row. The provenance states the
    number of `units`, the `risk` found on them and its `bound`, the least α that would have done
    for this policy (both None where nothing leaves), and what the policy does (`risk.evidence`).

    Args:
      rows: float [J, E], thresholds chosen without a look at `records`, such as `path` gives.
      method: `ltt` (Hoeffding–Bentkus), `ucb` (betting; sharper for shares) or `clopper_pearson`
        (exact, for losses that are 0 or 1; of each group, one position is drawn by `seed`).
      risk_of: `disagreement` with the full model, `accuracy_drop`, or a function of
        (records, exits int [N]) that gives the loss in [0, 1] of every unit.
      among: what the mean is over: `all` positions, where those that run to the end have the loss
        of the final exit; or the `leavers`, so that α is the share of wrong ones among them.
      unit: what is independent: `group`, a whole text or example, whose loss is the mean over its
        positions; or `position`, if those of one group are no more alike than others.

    Raises:
      ValueError: unknown names, α or δ outside (0, 1), or rows for another number of exits.
    """
    _check(method, alpha, delta, among)
    policy = policies.never(len(records.exit_depths) - 1, confidence)
    if rows.shape[1:] != policy.thresholds.shape:
        raise ValueError(
            f"the rows of thresholds have the shape {rows.shape}, but the records are of "
            f"{len(policy.thresholds)} early exits"
        )
    seen = records
    if method == "clopper_pearson" and unit == "group":
        seen, unit = risk.one_of_each_group(records, seed), "position"
    scores = seen.score(confidence)[:-1]
    units = risk.units(seen, risk_of, unit)

    def p_value(exits, alpha):
        if among == "all":
            return METHODS[method](units.losses(exits), alpha, delta)
        # Their risk is at most α if the mean is, where α counts as the loss of all others.
        losses = units.losses(exits, staying=alpha)
        if units.count == exits.size:  # single positions that leave are a sample of their own
            losses = losses[exits < len(scores)]
        return METHODS[method](losses, alpha, delta) if losses.size else 1.0

    passed = None
    for j, row in enumerate(rows):
        if j and (row == rows[j - 1]).all():
            continue
        exits = policies.first_exit(scores, row)
        if p_value(exits, alpha) > delta:
            break
        passed, exits_there = row, exits
    stated = {
        "method": method,
        "alpha": alpha,
        "delta": delta,
        "risk_of": risk.name_of(risk_of),
        "among": among,
        "unit": unit if seen is records else "position drawn from each group",
        "units": units.count,
        "risk": None,
        "bound": None,
    }
    if passed is None:
        passed, stated["units_needed"] = policy.thresholds, bounds.units_needed(alpha, delta)
    else:
        stated["risk"] = _risk(units, exits_there, among)
        stated["bound"] = bounds.upper(lambda alpha: p_value(exits_there, alpha), delta)
    return risk.with_evidence(policies.make(passed, confidence, **stated), records)


def _risk(units: risk.Units, exits: np.ndarray, among: str) -> float:
    if among == "all":
        return float(units.losses(exits).mean())
    wrong, with_staying = (units.losses(exits, staying=loss).mean() for loss in (0.0, 1.0))
    return float(wrong / (1 - (with_staying - wrong)))


def _check(method: str, alpha: float, delta: float, among: str) -> None:
    """Raises ValueError for an unknown method or `among`, and for α or δ outside (0, 1)."""
    for name, value, known in (("method", method, METHODS), ("among", among, AMONG)):
        if value not in known:
            raise ValueError(f"unknown {name} {value!r}; choose one of {', '.join(known)}")
    for name, value in (("alpha", alpha), ("delta", delta)):
        if not 0 < value < 1:
            raise ValueError(f"{name} is a share in (0, 1), not {value}")
