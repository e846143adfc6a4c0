"""Withholding answers: which ones, at what rate, and with what promise about the rest.

The one idea: a policy orders positions. What leaves early is answered whatever happens, the rest is
answered by the final exit in the order of its scores; so every tool for one scored predictor works
for the whole. (EERO's "reject" only means going deeper, which is simply not leaving.)
"""

import dataclasses
from collections.abc import Sequence

import jax.numpy as jnp
import numpy as np

from early_exit.calibration import bounds
from early_exit.calibration import budget as budgets
from early_exit.calibration.records import Records
from early_exit.calibration.risk import one_of_each_group, with_evidence
from early_exit.calibration.search import chances, search
from early_exit.policy import ALWAYS, NEVER, ExitPolicy, make

# What withholding may be worth, where a right answer is worth 1 and a wrong one 0.
_WORTHS = (0.5, 0.7, 0.8, 0.9, 0.95)
_FUZZ = 1e-9


def risk_coverage(
    scores: np.ndarray, correct: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The curve of answering only what reaches a threshold, from the highest threshold down.

    Args:
      scores: float [N].
      correct: bool [N].

    Returns:
      (coverage, share of points answered; risk, share of those that are wrong; threshold), each
      float [K] for the K different scores.

    Raises:
      ValueError: no points, or NaN among the scores.
    """
    if not scores.size or np.isnan(scores).any():
        raise ValueError("rejection needs at least one score, and no NaN among them")
    order = np.argsort(-scores, kind="stable")
    falling = scores[order]
    ends = np.flatnonzero(np.append(falling[1:] != falling[:-1], True))
    answered = ends + 1
    return answered / len(scores), np.cumsum(~correct[order])[ends] / answered, falling[ends]


def aurc(scores: np.ndarray, correct: np.ndarray) -> float:
    """Area under the risk–coverage curve: the mean risk of answering the surest 1, 2, … N points.

    Points of equal score come in random order; this is the expectation.
    """
    coverage, risk, _ = risk_coverage(scores, correct)
    counts = np.arange(1, len(scores) + 1)
    answered = coverage * len(scores)
    wrong = np.interp(counts, np.append(0, answered), np.append(0, risk * answered))
    return float(np.mean(wrong / counts))


def excess_aurc(scores: np.ndarray, correct: np.ndarray) -> float:
    """AURC above that of the best order there is, all right answers first (Geifman et al. 2019)."""
    return aurc(scores, correct) - aurc(correct.astype(np.float32), correct)


@dataclasses.dataclass(frozen=True)
class Selection:
    """Answer what reaches `threshold`; with probability 1 − δ, at most `bound` of it is wrong.

    Attributes:
      coverage, risk: as found on the calibration points; risk is None where nothing is answered.
    """

    threshold: float
    coverage: float
    risk: float | None
    bound: float | None


def select(scores: np.ndarray, correct: np.ndarray, risk: float, delta: float) -> Selection:
    """A low threshold whose answers are wrong at a rate ≤ `risk`, with probability 1 − δ.

    "Selection with guaranteed risk" (Geifman and El-Yaniv 2017, algorithm 1): a binary search over
    the ranks of the scores, with an exact binomial bound at δ / ⌈log₂ N⌉ in each step. The promise
    holds for independent points, where the true risk grows with coverage: then the ranks at which
    the search can go wrong are settled before it sees the data. Where nothing passes, the threshold
    is inf and the coverage 0.

    Raises:
      ValueError: no points, NaN among the scores, or a risk or δ outside (0, 1).
    """
    for name, value in (("risk", risk), ("delta", delta)):
        if not 0 < value < 1:
            raise ValueError(f"{name} is a share in (0, 1), not {value}")
    from scipy import special  # not at the top: most commands need it late or never

    coverages, risks, thresholds = risk_coverage(scores, correct)
    count = len(scores)
    steps = max(1, int(np.ceil(np.log2(count))))
    passed, failed = 0, count + 1
    found = None
    for _ in range(steps):
        rank = (passed + failed) // 2
        if rank == passed:
            break
        at = np.searchsorted(coverages * count, rank - _FUZZ)  # with all that score the same
        answered, wrong = np.rint(count * coverages[at] * np.array([1, risks[at]])).astype(int)

        def chance(rate, answered=answered, wrong=wrong):
            """That so few of the answers are wrong, if each is at this rate."""
            return special.bdtr(wrong, answered, rate)

        if chance(risk) <= delta / steps:
            passed = answered
            found = at, bounds.upper(chance, delta / steps)
        else:
            failed = rank
    if found is None:
        return Selection(NEVER, 0.0, None, None)
    at, bound = found
    return Selection(float(thresholds[at]), float(coverages[at]), float(risks[at]), bound)


def fit(
    records: Records,
    policy: ExitPolicy,
    *,
    abstain: float | None = None,
    risk: float | None = None,
    delta: float = 0.1,
    seed: int = 0,
) -> ExitPolicy:
    """The policy with a threshold for the final exit's score below which it gives no answer.

    Give one of:
      abstain: the share of all positions that may stay without an answer; on the records no more.
      risk: the share of wrong answers (by the label) among those given, at most, with probability
        1 − δ over the records (`select`), if they are not those that the policy was fitted on.
        Positions of one group depend on each other, so one of each, drawn by `seed`, is counted.
        Where that cannot be had, the policy never exits early, never answers, and says so.

    The provenance states under `rejection` what was asked, and what is `answered` and `wrong`.

    Raises:
      ValueError: neither or both given, a share outside [0, 1], no labels, or a gate, which the
        final exit does not have.
    """
    _check(policy.confidence, abstain, risk)
    if abstain is not None:
        scores, _ = _answers(records, policy)
        waiting = np.sort(scores[scores < NEVER])
        withheld = int(abstain * len(scores) + _FUZZ)
        reject = ALWAYS if not withheld else NEVER
        if 0 < withheld < len(waiting):
            reject = waiting[withheld]
        asked = {"abstain": abstain}
    else:
        drawn = one_of_each_group(_judged(records), seed)
        found = select(*_answers(drawn, policy), risk, delta)
        reject = found.threshold
        if not found.coverage:
            policy = _never(policy, records)
        asked = {"risk": risk, "delta": delta, "bound": found.bound, "groups": drawn.labels.size}
        asked["unreachable"] = not found.coverage
    policy = dataclasses.replace(policy, reject=jnp.float32(reject))
    stated = {"rejection": {**asked, **assess(policy, records)}}
    return dataclasses.replace(policy, provenance={**policy.provenance, **stated})


def fit_exits(
    records: Records,
    confidence: str,
    budget: float,
    *,
    abstain: float | None = None,
    risk: float | None = None,
    costs: str | Sequence[float] = "multiply_adds",
) -> ExitPolicy:
    """When to leave, at a mean cost within the budget, if `fit` is to reject by this rate or risk.

    Withholding an answer is the last of the exits: it costs what the final exit does, and is worth
    some share of a right answer (Chow 1970). For several such worths the best thresholds of exits
    and rejection together are searched; those are kept whose answers are least often wrong at the
    rate, or are most at the risk. For a promised risk, `fit` must then see other groups.

    Args and errors are those of `fit` here and in `calibration.budget`; labels judge the answers.
    """
    _check(confidence, abstain, risk)
    scores, known = records.score(confidence), budgets.judged(records, "label")
    expected = chances(scores, budgets.goodness(records, "label"), known)
    each = budgets.costs_of(records, costs)

    def merit(thresholds):
        policy = make(thresholds, confidence)
        if risk is None:
            return -(assess(fit(records, policy, abstain=abstain), records)["wrong"] or 0.0)
        coverages, risks, _ = risk_coverage(*_answers(_judged(records), policy))
        return coverages[risks <= risk].max(initial=0.0)

    alone = budgets.fit(records, confidence, budget, costs=costs, against="label")
    found = [np.append(alone.thresholds, np.float32(ALWAYS))]
    for worth in _WORTHS:
        values = np.vstack([expected, np.full(len(known), worth)])
        found.append(search(scores, values, np.append(each, each[-1]), budget, found[-1:]))
    best = max((thresholds[:-1] for thresholds in found), key=merit)
    return budgets.described(best, records, confidence, "joint", budget, costs, "label")


def assess(policy: ExitPolicy, records: Records) -> dict:
    """What a policy with rejection does on records.

    Returns:
      `answered`, the share of positions with an answer; `wrong`, the share of these whose answer
      is not their label, None where none has one.
    """
    scores, right = _answers(records, policy)
    given = ~np.asarray(policy.abstains(jnp.asarray(scores)))
    judged = given & (records.labels >= 0)
    wrong = float(1 - right[judged].mean()) if judged.any() else None
    return {"answered": float(given.mean()), "wrong": wrong}


def least_probability(policy: ExitPolicy | None) -> float:
    """The probability below which the final exit withholds a generated token; 0 if it never does.

    Raises:
      ValueError: the policy rejects by something other than the token's probability.
    """
    if policy is None or policy.reject is None:
        return 0.0
    if policy.confidence != "max_prob" or policy.temperatures is not None:
        at = "" if policy.temperatures is None else " at temperatures of its own"
        raise ValueError(
            f"the policy rejects by {policy.confidence}{at}, which is not kept for generated "
            "tokens; calibrate with max_prob and without temperatures"
        )
    return float(policy.reject)


def _check(confidence: str, abstain: float | None, risk: float | None) -> None:
    if confidence == "gate":
        raise ValueError("the final exit has no gate to reject by; use another confidence")
    if (abstain is None) == (risk is None):
        raise ValueError("give either abstain, a share of positions, or risk, a share of answers")
    if abstain is not None and not 0 <= abstain <= 1:
        raise ValueError(f"abstain is a share in [0, 1], not {abstain}")


def _answers(records: Records, policy: ExitPolicy) -> tuple[np.ndarray, np.ndarray]:
    """(scores [N], inf for what leaves early; whether the answer where it leaves is right [N])."""
    all_scores = records.score(policy.confidence)
    exits = policy.exit_index(all_scores, records.exit_depths)
    scores = np.where(exits < len(policy.thresholds), np.float32(NEVER), all_scores[-1])
    return scores, budgets.goodness(records, "label")[exits, np.arange(len(exits))]


def _never(policy: ExitPolicy, records: Records) -> ExitPolicy:
    """The policy without any early exit; what it had spent and bought no longer holds."""
    kept = {k: v for k, v in policy.provenance.items() if k not in ("spent", "quality")}
    thresholds = jnp.full_like(policy.thresholds, NEVER)
    return with_evidence(
        dataclasses.replace(policy, thresholds=thresholds, provenance=kept), records
    )


def _judged(records: Records) -> Records:
    return records.take(budgets.judged(records, "label"))
