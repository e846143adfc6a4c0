"""ε-accuracy thresholds: leave where predictions this sure were right often enough.

Valade 2024 ("Accelerating Large Language Model Inference with Self-Supervised Early Exits"), §3:
with calibration points sorted by falling score and Acc(k) the accuracy of the k surest,
τ = score of point k*, k* = max{k : Acc(k) ≥ ε}.
"""

import numpy as np

from early_exit import policy as policies
from early_exit.calibration.records import Records

# Levels that the heads may share: the same for every ε, or thresholds would not rise with it.
LEVELS = np.arange(1, 401) / 400


def epsilon_accuracy(scores: np.ndarray, correct: np.ndarray, epsilon: float) -> float:
    """The lowest threshold whose leavers reach accuracy ε; inf where none does.

    Points with equal scores leave together, so only whole groups of ties count, and −inf ("no
    prediction") never leaves. The threshold does not fall as ε rises.

    Args:
      scores: float [N].
      correct: bool [N].
      epsilon: accuracy to reach, in (0, 1].

    Raises:
      ValueError: ε outside (0, 1], no points, or NaN among the scores.
    """
    _check_epsilon(epsilon)
    if not scores.size or np.isnan(scores).any():
        raise ValueError("calibration needs at least one score, and no NaN among them")
    order = np.argsort(-scores, kind="stable")
    falling = scores[order]
    counts = np.arange(1, len(falling) + 1)
    # Compared as counts: a running mean would make 0.95 of 20 points a matter of rounding.
    reached = np.cumsum(correct[order]) >= epsilon * counts - 1e-9
    ends_group = np.append(falling[1:] != falling[:-1], True)
    candidates = np.flatnonzero(reached & ends_group & (falling > -np.inf))
    return float(falling[candidates[-1]]) if candidates.size else policies.NEVER


def _check_epsilon(epsilon: float) -> None:
    if not 0 < epsilon <= 1:
        raise ValueError(f"epsilon is an accuracy in (0, 1], not {epsilon}")


def coverage_at(scores: np.ndarray, correct: np.ndarray, accuracy: float) -> float:
    """Largest share of points that can leave together at this accuracy, in [0, 1]."""
    return float(np.mean(scores >= epsilon_accuracy(scores, correct, accuracy)))


def fit(records: Records, confidence: str, epsilon: float) -> policies.ExitPolicy:
    """A policy whose leavers, all exits together, agree with the full model at a rate ≥ ε.

    Thresholds fitted head by head promise less than ε in use: the positions that reach a deep
    exit are those that earlier exits found hard. So the heads share a level ≥ ε, each threshold
    being the head's own ε-accuracy threshold for that level, and the level is the lowest at which
    the positions that leave, where they leave, reach ε. Both steps are monotone in ε, hence so is
    every threshold.

    The provenance states the level, the `agreement` reached, the `coverage` (share of positions
    that leave early) and the exits that are `unreachable`, which never leave.

    Raises:
      ValueError: unknown confidence or ε outside (0, 1].
    """
    if confidence not in records.scores:
        known = ", ".join(records.scores)
        raise ValueError(f"unknown confidence {confidence!r}; the records have {known}")
    scores = records.scores[confidence]
    _check_epsilon(epsilon)
    for level in LEVELS[epsilon <= LEVELS]:
        policy = policies.make(
            [epsilon_accuracy(*pair, level) for pair in zip(scores, records.agrees, strict=True)],
            confidence,
        )
        exits = policy.exit_index(scores, records.exit_depths)
        leavers = np.flatnonzero(exits < len(scores))
        agreeing = records.agrees[exits[leavers], leavers].sum()
        if agreeing >= epsilon * len(leavers) - 1e-9:
            break
    thresholds = np.asarray(policy.thresholds)
    return policies.make(
        thresholds,
        confidence,
        method="epsilon_accuracy",
        epsilon=epsilon,
        level=float(level),
        agreement=float(agreeing / len(leavers)) if leavers.size else None,
        coverage=float(leavers.size / exits.size),
        positions=exits.size,
        unreachable=records.exit_depths[:-1][thresholds == policies.NEVER].tolist(),
        **records.metadata,
    )
