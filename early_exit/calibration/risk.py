"""What leaving early costs: the loss of each position, where it leaves, and of each unit.

The one idea: a loss in [0, 1] for every (exit, position) makes any policy's risk a mean. What is
averaged are *units*, which must be independent of each other for a guarantee to hold: whole texts,
for positions of one text have much in common, or single examples.
"""

import dataclasses
from collections.abc import Callable

import numpy as np

from early_exit.calibration.records import Records
from early_exit.policy import NEVER, ExitPolicy

# A user's own: (records, exits int [N]) → the loss in [0, 1] of every unit, in order.
UserLoss = Callable[[Records, np.ndarray], np.ndarray]


def disagreement(records: Records) -> np.ndarray:
    """The answer is not the full model's. bool [E + 1, N]."""
    return records.predictions != records.predictions[-1]


def accuracy_drop(records: Records) -> np.ndarray:
    """The full model is right and the exit is wrong. bool [E + 1, N].

    The mean is at least the drop in accuracy: what exits get right where the full model does not
    is no credit.
    """
    return records.correct[-1] & ~records.correct


RISKS = {"disagreement": disagreement, "accuracy_drop": accuracy_drop}
UNITS = ("group", "position")


@dataclasses.dataclass(frozen=True)
class Units:
    """The losses of `count` units of some records, for any exits that their positions take.

    Attributes:
      records: whose.
      risk: one of `RISKS`, or a user's function.
      of_N: int [N], the unit of each position.
      sizes: int [count], how many positions a unit has.
    """

    records: Records
    risk: str | UserLoss
    of_N: np.ndarray
    sizes: np.ndarray
    _table: np.ndarray | None

    @property
    def count(self) -> int:
        return len(self.sizes)

    def losses(self, exits_N: np.ndarray, staying: float | None = None) -> np.ndarray:
        """float64 [count], of each unit the mean over its positions, which leave at `exits_N`.

        Args:
          staying: what counts as the loss of a position that does not leave early; None for its
            own, that of the final exit.

        Raises:
          ValueError: a user's function that does not give a loss in [0, 1] for every unit, or that
            is asked for `staying`.
        """
        if self._table is None:
            if staying is not None:
                raise ValueError("the risk of leavers is for named risks; a function sees who left")
            losses = np.asarray(self.risk(self.records, exits_N), np.float64)
            if losses.shape != (self.count,) or not ((losses >= 0) & (losses <= 1)).all():
                raise ValueError(
                    f"the risk {name_of(self.risk)!r} must give {self.count} losses in [0, 1], one "
                    f"for each unit; it gave {losses.shape}: {losses}"
                )
            return losses
        losses = self._table[exits_N, np.arange(len(exits_N))].astype(np.float64)
        if staying is not None:
            losses[exits_N == len(self._table) - 1] = staying
        if self.count == len(losses):  # units are positions, in order
            return losses
        return np.bincount(self.of_N, losses, self.count) / self.sizes


def units(records: Records, risk: str | UserLoss, unit: str) -> Units:
    """The units of `records`: `group`, a whole text or example, or `position`.

    Raises:
      ValueError: unknown risk or unit, or labels that a risk needs and the records lack.
    """
    if unit not in UNITS:
        raise ValueError(f"unknown unit {unit!r}; choose one of {', '.join(UNITS)}")
    if isinstance(risk, str) and risk not in RISKS:
        raise ValueError(
            f"unknown risk {risk!r}; choose one of {', '.join(RISKS)}, or give a function"
        )
    of_N = np.arange(len(records.groups))
    if unit == "group":
        of_N = np.unique(records.groups, return_inverse=True)[1]
    table = RISKS[risk](records) if isinstance(risk, str) else None
    return Units(records, risk, of_N, np.bincount(of_N), table)


def name_of(risk: str | UserLoss) -> str:
    return risk if isinstance(risk, str) else getattr(risk, "__name__", "user's")


def one_of_each_group(records: Records, seed: int) -> Records:
    """One position of every group, drawn at random: independent, whatever the groups are.

    A group's mean loss is the chance that its drawn position has the loss 1. So the mean over what
    is drawn has the same expectation as the mean over groups, and 0–1 losses stay 0–1.
    """
    order = np.random.default_rng(seed).permutation(len(records.groups))
    _, first = np.unique(records.groups[order], return_index=True)
    return records.take(order[first])


def evidence(policy: ExitPolicy, records: Records) -> dict:
    """What a policy does on records: shares of all positions, unless said otherwise.

    Returns:
      `coverage`, leaving early; `agreement` with the full model among those (None if nobody
      leaves); `disagreement`, over all; `mean_depth`, in blocks; `mean_cost`, as a share of going
      all the way; `exit_shares` [E + 1]; `positions`, how many.
    """
    exits = policy.exit_index(records.score(policy.confidence), records.exit_depths)
    counts = np.bincount(exits, minlength=len(records.exit_depths))
    leavers = np.flatnonzero(exits < len(counts) - 1)
    differ = int(disagreement(records)[exits[leavers], leavers].sum())
    shares = counts / exits.size
    return {
        "positions": exits.size,
        "coverage": leavers.size / exits.size,
        "agreement": (leavers.size - differ) / leavers.size if leavers.size else None,
        "disagreement": differ / exits.size,
        "mean_depth": float(shares @ records.exit_depths),
        "mean_cost": float(shares @ records.costs / records.costs[-1]),
        "exit_shares": shares.tolist(),
    }


def with_evidence(policy: ExitPolicy, records: Records) -> ExitPolicy:
    """The policy, its provenance completed by `evidence`, what never leaves, and the records' own.

    Exits that are `unreachable` let nobody leave.
    """
    never = np.asarray(policy.thresholds) == NEVER
    stated = {
        **policy.provenance,
        **evidence(policy, records),
        "unreachable": records.exit_depths[:-1][never].tolist(),
        **records.metadata,
    }
    return dataclasses.replace(policy, provenance=stated)
