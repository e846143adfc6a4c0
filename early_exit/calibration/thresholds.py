"""ε-accuracy thresholds: leave where predictions this sure were right often enough.

Valade 2024 ("Accelerating Large Language Model Inference with Self-Supervised Early Exits"), §3:
with calibration points sorted by falling score and Acc(k) the accuracy of the k surest,
τ = score of point k*, k* = max{k : Acc(k) ≥ ε}.

The one idea: the accuracy is a common scale for all heads. A *level* on it gives every head its own
threshold, so policies of several exits form one path, from never leaving to always leaving.
"""

from collections.abc import Sequence

import numpy as np

from early_exit import policy as policies
from early_exit.calibration import risk
from early_exit.calibration.records import Records

# Levels that the heads may share: the same for every ε, or thresholds would not rise with it.
LEVELS = np.arange(1, 1001) / 1000


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
    return float(at_levels(scores, correct, np.array([epsilon]))[0])


def _check_epsilon(epsilon: float) -> None:
    if not 0 < epsilon <= 1:
        raise ValueError(f"epsilon is an accuracy in (0, 1], not {epsilon}")


def at_levels(scores: np.ndarray, correct: np.ndarray, levels: np.ndarray) -> np.ndarray:
    """`epsilon_accuracy` at every level: float [J]; the points are sorted once."""
    if not scores.size or np.isnan(scores).any():
        raise ValueError("calibration needs at least one score, and no NaN among them")
    order = np.argsort(-scores, kind="stable")
    falling = scores[order]
    ends = np.flatnonzero(np.append(falling[1:] != falling[:-1], True) & (falling > -np.inf))
    accuracy = np.cumsum(correct[order])[ends] / (ends + 1)
    # The best accuracy from here on falls, and has the same last point at which ε is reached.
    best = np.maximum.accumulate(accuracy[::-1])[::-1]
    reached = np.searchsorted(-best, -levels, side="right")
    return np.append(policies.NEVER, falling[ends])[reached]


def coverage_at(scores: np.ndarray, correct: np.ndarray, accuracy: float) -> float:
    """Largest share of points that can leave together at this accuracy, in [0, 1]."""
    return float(np.mean(scores >= epsilon_accuracy(scores, correct, accuracy)))


def path(records: Records, confidence: str, levels: np.ndarray = LEVELS) -> np.ndarray:
    """Thresholds of all exits, float32 [len(levels), E], at each level of agreement.

    None rises from one level to the next lower one.
    """
    scores = records.score(confidence)[:-1]
    each = [at_levels(*pair, levels) for pair in zip(scores, records.agrees, strict=True)]
    return np.stack(each, axis=1).astype(np.float32)


def fit(records: Records, confidence: str, epsilon: float) -> policies.ExitPolicy:
    """A policy whose leavers, all exits together, agree with the full model at a rate ≥ ε.

    That is so on these records; on others there is no guarantee (see `certify` for methods that
    have one).

    Thresholds fitted head by head promise less than ε in use: the positions that reach a deep
    exit are those that earlier exits found hard. So the heads share a level ≥ ε, each threshold
    being the head's own ε-accuracy threshold for that level, and the level is the lowest at which
    the positions that leave, where they leave, reach ε. Both steps are monotone in ε, hence so is
    every threshold.

    The provenance states the level and what is reached (`risk.evidence`).

    Raises:
      ValueError: unknown confidence or ε outside (0, 1].
    """
    _check_epsilon(epsilon)
    levels = LEVELS[epsilon <= LEVELS]
    rows = zip(levels.tolist(), path(records, confidence, levels), strict=True)
    reached = ((*pair, _agreement(records, confidence, pair[1])) for pair in rows)
    # At the level 1, all agree.
    level, row = next((level, row) for level, row, share in reached if share >= epsilon)
    policy = policies.make(row, confidence, method="epsilon", epsilon=epsilon, level=level)
    return risk.with_evidence(policy, records)


def ladder(records: Records, confidence: str, epsilons: Sequence[float]) -> np.ndarray:
    """The thresholds of `fit` for each ε, float32 [K, E], at the price of a few.

    Raises:
      ValueError: unknown confidence or an ε outside (0, 1].
    """
    for epsilon in epsilons:
        _check_epsilon(epsilon)
    levels = LEVELS[min(epsilons) <= LEVELS]
    rows = path(records, confidence, levels)
    reached = np.array([_agreement(records, confidence, row) for row in rows])
    first = [np.flatnonzero((epsilon <= levels) & (epsilon <= reached))[0] for epsilon in epsilons]
    return rows[first]


def _agreement(records: Records, confidence: str, row: np.ndarray) -> float:
    """The share that agrees of those who leave by some thresholds; 1 where nobody does."""
    scores, agrees = records.score(confidence)[:-1], records.agrees
    exits = policies.first_exit(scores, row)
    leavers = np.flatnonzero(exits < len(scores))
    agreeing = np.count_nonzero(agrees[exits[leavers], leavers])
    return agreeing / leavers.size if leavers.size else 1.0
