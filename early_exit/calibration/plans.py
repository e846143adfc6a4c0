"""Plans for a budget: which share of positions leaves where, and the thresholds that carry it out.

The one idea: what has left after each exit is never less than planned. Then what is spent is never
more than planned, whatever the plan, on the positions the thresholds come from.

EERO is Valade, Hebiri and Gay 2025, "EERO: Early Exit with Reject Option for Efficient
Classification with limited budget".
"""

import numpy as np

from early_exit import policy as policies

# Counts are compared after a product of floats: 0.3 · 10 must be 3 points, not 4.
_FUZZ = 1e-9


def eero_shares(
    risks: np.ndarray, costs: np.ndarray, budget: float, beta: float = 0.04
) -> tuple[np.ndarray, float]:
    """Shares ε̂ [E + 1] of positions to leave at each exit, and the price μ of cost.

    They minimise Σ ε·R + β·KL(ε ‖ π) under Σ ε·B ≤ B̄, with the prior π ∝ 1/B:
    ε̂ ∝ π·exp(−(R + μB)/β), and μ ≥ 0 is 0 or spends the budget to the last (found by bisection).

    Args:
      risks: float [E + 1], R, each exit's error rate over all positions.
      costs: float [E + 1], B, of leaving there; rising.
      budget: B̄, the mean cost to keep to. Above what the risks ask for it is not spent.
      beta: how far the shares may go from the prior for the sake of risk.

    Raises:
      ValueError: costs that do not rise, a budget below the first exit's cost, or a β ≤ 0.
    """
    risks, costs = np.asarray(risks, np.float64), rising(costs, budget)
    if risks.shape != costs.shape or not np.isfinite(risks).all():
        raise ValueError(f"there must be {len(costs)} risks, one per exit, not {risks}")
    if not beta > 0:
        raise ValueError(f"beta must be a positive number, not {beta}")
    unit = costs[-1]

    def shares(price):
        return _softmax(-np.log(costs) - (risks + price * costs / unit) / beta)

    def overspent(price):
        return shares(price) @ costs - budget

    if overspent(0.0) <= 0:
        return shares(0.0), 0.0
    if budget == costs[0]:
        return np.eye(len(costs))[0], np.inf
    high = 1.0
    while overspent(high) > 0:
        high *= 2
    price = _falling_root(overspent, 0.0, high)
    return shares(price), price / unit


def geometric_shares(costs: np.ndarray, budget: float) -> np.ndarray:
    """Shares [E + 1] ∝ qᵏ, with the q that spends the budget; all at the end if it allows that.

    Raises:
      ValueError: costs that do not rise, or a budget below the first exit's cost.
    """
    costs = rising(costs, budget)
    if budget == costs[0] or budget >= costs[-1]:
        return np.eye(len(costs))[0 if budget == costs[0] else -1]

    def shares(log_q):
        return _softmax(log_q * np.arange(len(costs)))

    log_q = -_falling_root(lambda x: shares(-x) @ costs - budget, -800.0, 800.0)
    return shares(log_q)


def thresholds_of_all(scores: np.ndarray, shares: np.ndarray, slack: float = 0.0) -> np.ndarray:
    """Thresholds [E] as EERO has them: leave at the first exit ℓ with F̂(score) ≥ 1 − Σ_{j≤ℓ} ε̂.

    F̂ is the empirical distribution of the exit's scores over *all* positions. The share Σ ε̂ passes
    at each exit, but some of it has left before: the more heads differ in what they find easy, the
    more have left than planned, and part of the budget stays unspent. Labels are not needed.

    The paper makes scores distinct (`with_noise`). A policy has no dice: here equal scores leave
    together, more rather than fewer, which costs less. Where heads decline (−inf) they leave last,
    if the plan demands it.

    Args:
      scores: float [E, N].
      shares: float [E + 1], summing to 1.
      slack: C, which raises every Σ ε̂ by C/√N. With C = √(ln(E/δ)/2) the mean cost of new
        positions, too, is within the budget, with probability 1 − δ (Dvoretzky–Kiefer–Wolfowitz–
        Massart); with 0 it may exceed it by O(1/√N).

    Raises:
      ValueError: no scores, NaN among them, or shares that are none.
    """
    cumulative = _cumulative(scores, shares)
    exits, positions = scores.shape
    counts = np.floor(cumulative * positions + slack * np.sqrt(positions) + _FUZZ).astype(int) + 1
    falling = -np.sort(-scores, axis=1)
    kth = falling[np.arange(exits), np.minimum(counts, positions) - 1]
    return np.where(counts > positions, policies.ALWAYS, kth).astype(scores.dtype)


def with_noise(scores: np.ndarray, seed: int) -> np.ndarray:
    """Scores + U[0, 1e-5], float64: EERO's way to break ties, for old and new positions alike."""
    noise = np.random.default_rng(seed).uniform(0, 1e-5, np.shape(scores))
    return np.asarray(scores, np.float64) + noise


def thresholds_of_survivors(scores: np.ndarray, shares: np.ndarray) -> np.ndarray:
    """Thresholds [E] whose leavers, exit by exit, are the planned share of the positions.

    Each is a quantile over the positions that no earlier exit took, so the whole plan is carried
    out, and the whole budget spent. Where equal scores take more along, the next exits take fewer.

    Args:
      scores: float [E, N]; −inf where a head declines, which leaves last.
      shares: float [E + 1], summing to 1.

    Raises:
      ValueError: no scores, NaN among them, or shares that are none.
    """
    cumulative = _cumulative(scores, shares)
    positions = scores.shape[1]
    due = np.ceil(cumulative * positions - _FUZZ).astype(int)
    thresholds = np.full(len(scores), policies.NEVER, scores.dtype)
    staying = np.ones(positions, bool)
    for e, score in enumerate(scores):
        found = np.count_nonzero(staying)
        leaving = due[e] - (positions - found)
        if cumulative[e] >= 1 - _FUZZ:
            thresholds[e] = policies.ALWAYS
        elif leaving > 0:
            thresholds[e] = np.partition(score[staying], found - leaving)[found - leaving]
        staying &= score < thresholds[e]
    return thresholds


def rising(costs: np.ndarray, budget: float) -> np.ndarray:
    """Costs as float64 [E + 1].

    Raises:
      ValueError: they are not positive and rising, or the budget is below the first.
    """
    costs = np.asarray(costs, np.float64)
    if costs.ndim != 1 or not costs.size or not (costs[0] > 0 and (np.diff(costs) > 0).all()):
        raise ValueError(f"costs must be positive and rise from exit to exit, not {costs}")
    if not budget >= costs[0]:
        raise ValueError(
            f"a budget of {budget:g} cannot be kept: leaving at the first exit costs {costs[0]:g}; "
            "raise it, or add an earlier exit"
        )
    return costs


def _cumulative(scores: np.ndarray, shares: np.ndarray) -> np.ndarray:
    """The share [E] that should have left after each early exit."""
    shares = np.asarray(shares, np.float64)
    if scores.ndim != 2 or not scores.size or np.isnan(scores).any():
        raise ValueError("a quantile needs at least one score per exit, and no NaN among them")
    if shares.shape != (len(scores) + 1,) or (shares < 0).any() or abs(shares.sum() - 1) > 1e-6:
        raise ValueError(f"shares must be {len(scores) + 1} numbers that sum to 1, not {shares}")
    return np.cumsum(shares)[:-1]


def _softmax(logits: np.ndarray) -> np.ndarray:
    weights = np.exp(logits - logits.max())
    return weights / weights.sum()


def _falling_root(function, low: float, high: float) -> float:
    """Where a falling function crosses 0, to the last bit, by bisection."""
    while low < (middle := (low + high) / 2) < high:
        low, high = (middle, high) if function(middle) > 0 else (low, middle)
    return high
