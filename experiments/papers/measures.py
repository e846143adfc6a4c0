"""What papers' tables are made of, on records."""

import numpy as np

from early_exit import policy as policies
from early_exit.calibration.records import Records


def one_threshold(scores_EN: np.ndarray, costs: np.ndarray, limit: float) -> float:
    """The highest threshold, the same for all exits, at which no more than `limit` is spent.

    As BranchyNet and CALM have it. Where even the lowest spends more, the lowest.

    Args:
      scores_EN: float [E, N]; −inf where a head declines.
      costs: float [E + 1], of leaving at each exit; rising.
      limit: on average.
    """

    def spent(threshold):
        return costs[policies.first_exit(scores_EN, [threshold] * len(scores_EN))].mean()

    steps = np.append(np.unique(scores_EN), policies.NEVER)
    low, high = 0, len(steps)  # costs rise with the threshold
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if spent(steps[middle]) <= limit else (low, middle)
    return float(steps[low])


def of_leavers(records: Records, exits: np.ndarray) -> tuple[float, float, float]:
    """What comes of positions that leave at these exits [N].

    Returns:
      How often those who leave early agree with the full model, NaN where nobody does; which share
      leaves early; mean depth as a share of all blocks.
    """
    left = np.flatnonzero(exits < len(records.exit_depths) - 1)
    agree = records.agrees[exits[left], left].mean() if left.size else np.nan
    depth = records.exit_depths[exits].mean() / records.exit_depths[-1]
    return float(agree), left.size / len(exits), float(depth)


def same(records: Records) -> np.ndarray:
    """bool [E + 1, N], an exit says what the full model says; the full model does."""
    return records.predictions == records.predictions[-1]


def oracle_depth(records: Records) -> float:
    """Mean depth, as a share of all blocks, if each leaves at the first exit that agrees."""
    return float(records.exit_depths[same(records).argmax(0)].mean() / records.exit_depths[-1])
