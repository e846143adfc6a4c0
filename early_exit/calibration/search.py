"""The best thresholds at a budget, found by coordinate ascent.

The one idea: with all other thresholds fixed, the value and the cost of *every* threshold that one
exit could have are two running sums over the positions that reach it, sorted by score. So each
step is the best of all its kind, for a few passes over the data.

Once a budget is spent, two thresholds would have to move together. So cost first gets a price,
under which they do move one at a time, and the price is bisected until the budget is met; what is
left over is then spent by steps that keep to the budget.

The best of many sums of zeros and ones is the best by luck. `chances` take the luck out first.
"""

import functools
from collections.abc import Callable, Sequence

import numpy as np

from early_exit.policy import NEVER

_SAMPLE = 100_000  # positions that are enough to find a price
_PRICES = 14  # bisections of the price
_LOWEST = 1e-6  # of the price at which nothing is worth its cost
_SWEEPS = 3  # at each price
_SETTLED = 2  # thresholds, the best, from which steps within the budget are taken;
_LAST_SWEEPS = 30  # until nothing moves, but at most so often
_FUZZ = 1e-9


def search(
    scores: np.ndarray,
    values: np.ndarray,
    costs: np.ndarray,
    budget: float,
    starts: Sequence[np.ndarray] = (),
) -> np.ndarray:
    """Thresholds [E] of high mean value, at a mean cost of at most `budget`.

    A position leaves at the first exit whose score reaches the threshold, else at the end. Of
    equally valuable thresholds the cheaper are taken.

    Args:
      scores: float [E, N], no NaN.
      values: float [E + 1, N], of leaving there, such as the `chances` of a good answer.
      costs: float [E + 1], not falling.
      budget: at least `costs[0]`.
      starts: thresholds to begin from. The result has no lower value than any of them that keeps
        to the budget.
    """
    values, costs = np.asarray(values, np.float64), np.asarray(costs, np.float64)
    most = budget + _FUZZ * abs(budget)
    step = -(-scores.shape[1] // _SAMPLE)
    sample = _sweeper(scores[:, ::step], values[:, ::step], costs)
    sweep = sample if step == 1 else _sweeper(scores, values, costs)

    def priced(thresholds, price):
        for _ in range(_SWEEPS):
            thresholds, _, cost = sample(thresholds, lambda value, cost: value - price * cost)
        return thresholds, cost

    def within(value, cost):
        allowed = cost <= most
        return np.where(allowed, value, -np.inf) if allowed.any() else -cost

    def rank(swept):
        _, value, cost = swept
        return cost <= most, value, -cost

    thresholds, cost = priced(np.full(len(scores), NEVER, scores.dtype), 0.0)
    nearest = {cost > most: thresholds}  # below the budget and above it
    if cost > most:
        steps = np.diff(costs)
        high = np.ptp(values) / steps[steps > 0].min()  # here all leave at the first exit
        low = high * _LOWEST
        for _ in range(_PRICES):
            price = np.sqrt(low * high)
            thresholds, cost = priced(thresholds, price)
            nearest[cost > most] = thresholds
            low, high = (price, high) if cost > most else (low, price)

    found = [sweep(start, within) for start in (*starts, *nearest.values())]
    found = sorted(found, key=rank, reverse=True)[:_SETTLED]
    for i in range(len(found)):
        for _ in range(_LAST_SWEEPS):
            before, found[i] = rank(found[i]), sweep(found[i][0], within)
            if rank(found[i]) == before:
                break
    return max(found, key=rank)[0]


def chances(scores: np.ndarray, good: np.ndarray, judged: np.ndarray) -> np.ndarray:
    """The chance of a good answer at every score, by isotonic regression: float64 [E, N].

    Args:
      scores: float [E, N].
      good: bool [E, N].
      judged: bool [N], where `good` is known; the chance is given for all.
    """
    from scipy import optimize  # not at the top: most commands need it late or never

    found = []
    for score, right in zip(scores, good, strict=True):
        known, inverse, counts = np.unique(score[judged], return_inverse=True, return_counts=True)
        means = np.bincount(inverse, right[judged]) / counts
        rising = optimize.isotonic_regression(means, weights=counts).x
        found.append(rising[np.maximum(np.searchsorted(known, score, side="right") - 1, 0)])
    return np.array(found)


def _sweeper(scores: np.ndarray, values: np.ndarray, costs: np.ndarray) -> Callable:
    order = np.argsort(-scores, axis=1, kind="stable")
    return functools.partial(_sweep, scores, values, costs, order)


def _sweep(
    scores: np.ndarray,
    values: np.ndarray,
    costs: np.ndarray,
    order: np.ndarray,
    thresholds: np.ndarray,
    merit: Callable[[np.ndarray, np.ndarray], np.ndarray],
) -> tuple[np.ndarray, float, float]:
    """Gives each exit in turn, the last first, its best threshold; with mean value and cost.

    Args:
      order: int [E, N], each exit's positions by falling score.
      merit: (mean values, mean costs) of the thresholds an exit could have → what to maximise.
    """
    exits, positions = scores.shape
    thresholds = thresholds.copy()
    # What left before each exit is settled until that exit's own turn, for turns go backwards.
    staying = np.ones(positions, bool)
    reaching, taken = [], [np.zeros(2)]
    for e in range(exits):
        reaching.append(staying)
        leaving = staying & (scores[e] >= thresholds[e])
        gone = np.array([values[e][leaving].sum(), costs[e] * np.count_nonzero(leaving)])
        taken.append(taken[-1] + gone)
        staying = staying & ~leaving
    # Value and cost of every position if it went on past the exit in turn.
    later_value, later_cost = values[-1].copy(), np.full(positions, costs[-1])
    for e in reversed(range(exits)):
        falling = order[e][reaching[e][order[e]]]
        score = scores[e][falling]
        cuts = np.append(score[1:] != score[:-1], True)[: len(score)]  # ties stay together
        gained = np.cumsum(values[e][falling] - later_value[falling])[cuts]
        added = np.cumsum(costs[e] - later_cost[falling])[cuts]
        none = taken[e] + [later_value[falling].sum(), later_cost[falling].sum()]
        value = (none[0] + np.append(0.0, gained)) / positions
        cost = (none[1] + np.append(0.0, added)) / positions
        wanted = merit(value, cost)
        best = np.flatnonzero(wanted >= wanted.max() - _FUZZ)
        best = best[np.argmin(cost[best])]
        thresholds[e] = np.append(NEVER, score[cuts])[best]
        leaving = scores[e] >= thresholds[e]
        later_value = np.where(leaving, values[e], later_value)
        later_cost = np.where(leaving, costs[e], later_cost)
    return thresholds, float(value[best]), float(cost[best])
