"""Does live data look like what the policy was calibrated on?

The one idea: a guarantee is about data like the calibration's. Where answers leave, and how sure
they are there, needs no label, is known in use, and moves when the data does. Both are kept as one
small histogram in the policy's file, and compared by the population stability index,
Σ (p − q)·ln(p / q), of which credit scoring takes more than 0.25 for a changed population
(Siddiqi 2006, "Credit Risk Scorecards").
"""

from collections.abc import Mapping
from typing import Any

import numpy as np

from early_exit.policy import ExitPolicy

BINS = 5  # at each exit
LIMIT = 0.25
FEWEST = 500  # answers; of fewer nothing is said


def histogram(exits: np.ndarray, top: np.ndarray, count: int) -> dict[str, Any]:
    """Shares of positions by the exit taken and the probability of its answer; for JSON.

    Args:
      exits: int [N], where each leaves.
      top: float [N], the probability that its exit gives its answer (−inf: it would rather not).
      count: E + 1, how many exits there are.

    Returns:
      edges [E + 1][bins − 1], inner edges of each exit's bins, which hold equal shares but for
      ties; shares [E + 1][bins]; positions.
    """
    edges = []
    for e in range(count):
        there = top[exits == e]
        inner = (
            np.quantile(np.maximum(there, 0), np.arange(1, BINS) / BINS, method="lower")
            if there.size
            else []
        )
        edges.append(np.unique(inner).astype(float).tolist())
    return {
        "edges": edges,
        "shares": [row.tolist() for row in _shares(edges, exits, top)],
        "positions": exits.size,
    }


def _shares(edges, exits: np.ndarray, top: np.ndarray) -> list[np.ndarray]:
    by_exit = [np.maximum(top[exits == e], 0) for e in range(len(edges))]
    counts = [
        np.bincount(np.searchsorted(inner, there, "right"), minlength=len(inner) + 1)
        for inner, there in zip(edges, by_exit, strict=True)
    ]
    return [row / exits.size for row in counts]


def stability(kept: Mapping[str, Any], exits: np.ndarray, top: np.ndarray) -> float:
    """The population stability index of live answers, less what chance alone makes of it.

    Args:
      kept: what `histogram` gave.
      exits: int [n], where answers left.
      top: float [n], the probability that their exit gave them.
    """
    live, positions = len(exits), kept["positions"]
    before = np.concatenate([np.array(row) for row in kept["shares"]])
    now = np.concatenate(_shares(kept["edges"], np.asarray(exits), np.asarray(top)))
    before = (before * positions + 0.5) / (positions + 0.5 * len(before))  # no share is nothing
    now = (now * live + 0.5) / (live + 0.5 * len(now))
    by_chance = (len(before) - 1) * (1 / live + 1 / positions)
    return float(np.sum((now - before) * np.log(now / before)) - by_chance)


def warning(policy: ExitPolicy, exits: np.ndarray, top: np.ndarray) -> str | None:
    """A sentence if live answers differ from the calibration's; None if not, or too few to tell."""
    kept = policy.provenance.get("drift")
    if kept is None or len(exits) < FEWEST:
        return None
    found = stability(kept, exits, top)
    if found <= LIMIT:
        return None
    shares = [np.array([sum(row) for row in kept["shares"]])]
    shares.append(np.bincount(exits, minlength=len(shares[0])) / len(exits))
    was, now = (", ".join(f"{share:.0%}" for share in row) for row in shares)
    return (
        f"these answers are unlike what the policy was calibrated on (stability index {found:.2f}, "
        f"above {LIMIT}; left at each exit: {now}, in calibration {was}): what it promises may not "
        "hold; calibrate on data like these"
    )
