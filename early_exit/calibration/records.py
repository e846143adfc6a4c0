"""What a model did on held-out data, position by position: all that calibration needs.

The one idea: thresholds are fitted and compared on this file alone, so trying another method
never runs the model again.
"""

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np

from early_exit.storage import files

_ARRAYS = ("exit_depths", "costs", "predictions", "labels", "losses", "groups")
_SCORE, _SOFTENED = "score_", "softened_"


@dataclasses.dataclass(frozen=True)
class Softened:
    """What the scores would be had the logits been divided by a temperature.

    Attributes:
      temperatures: float [K], those that can be had; 1 is among them.
      log_normalizers: float32 [K, E + 1, N], log Σ exp((logits − top) / T), with the top of the
        prediction.
      second: float32 [E + 1, N], how far below that the runner-up's logit is.
    """

    temperatures: np.ndarray
    log_normalizers: np.ndarray
    second: np.ndarray


@dataclasses.dataclass(frozen=True)
class Records:
    """Scores and outcomes of E exits and the final one, last, at N positions.

    A position is one of a text, or a classified example.

    Attributes:
      exit_depths: int [E + 1], blocks run at each exit.
      costs: float64 [E + 1], multiply-adds of everything run for a position that leaves there:
        blocks, and the heads consulted on the way.
      scores: confidence name → float32 [E + 1, N]; −inf where a head declines to predict.
      predictions: int32 [E + 1, N], the class or token that each exit answers.
      labels: int32 [N], the right answer (of a text, its next token); −1 if unknown.
      losses: float32 [E + 1, N], cross-entropy of the label in nats (for a reduced head, of its
        class, all tokens it cannot predict being one class).
      groups: int32 [N], which text or example a position belongs to. Positions of one text depend
        on each other; groups do not.
      softened: what temperatures are fitted on, if it was recorded.
      metadata: where the records come from.

    Raises:
      ValueError: no position, arrays that do not fit each other, or scores that are NaN.

    Example:
      >>> first, rest = records.split(0.5, seed=0)  # with no text in common
      >>> records.exit_depths.shape[0] == records.predictions.shape[0]
      True
    """

    exit_depths: np.ndarray
    costs: np.ndarray
    scores: dict[str, np.ndarray]
    predictions: np.ndarray
    labels: np.ndarray
    losses: np.ndarray
    groups: np.ndarray
    softened: Softened | None = None
    metadata: dict[str, Any] = dataclasses.field(default_factory=dict)

    def __post_init__(self):
        exits, positions = self.predictions.shape
        if not positions:
            raise ValueError("records hold no position; give more held-out data")
        wanted = [
            ("exit_depths", self.exit_depths, (exits,)),
            ("costs", self.costs, (exits,)),
            ("labels", self.labels, (positions,)),
            ("losses", self.losses, (exits, positions)),
            ("groups", self.groups, (positions,)),
            *[(f"scores {name!r}", x, (exits, positions)) for name, x in self.scores.items()],
        ]
        if self.softened:
            count = len(self.softened.temperatures)
            normalizers, second = self.softened.log_normalizers, self.softened.second
            wanted += [
                ("softened log-normalizers", normalizers, (count, exits, positions)),
                ("softened seconds", second, (exits, positions)),
            ]
        for name, array, shape in wanted:
            if array.shape != shape:
                raise ValueError(f"{name} have the shape {array.shape}, not {shape}")
        for name, score in self.scores.items():
            if np.isnan(score).any():
                raise ValueError(f"scores {name!r} hold NaN; the model or its heads are broken")

    @property
    def agrees(self) -> np.ndarray:
        """bool [E, N], an early exit answers what the final one does."""
        return self.predictions[:-1] == self.predictions[-1]

    @property
    def correct(self) -> np.ndarray:
        """bool [E + 1, N], an exit's answer is the label.

        Raises:
          ValueError: labels are unknown.
        """
        unknown = np.count_nonzero(self.labels < 0)
        if unknown:
            raise ValueError(
                f"{unknown} of {len(self.labels)} positions have no label to be correct about; "
                "record labelled data, or calibrate for agreement with the full model"
            )
        return self.predictions == self.labels

    def score(self, confidence: str) -> np.ndarray:
        """float32 [E + 1, N].

        Raises:
          ValueError: a confidence that was not recorded.
        """
        if confidence not in self.scores:
            known = ", ".join(self.scores)
            raise ValueError(f"unknown confidence {confidence!r}; the records have {known}")
        return self.scores[confidence]

    def take(self, positions: np.ndarray) -> "Records":
        """The records of some positions, given by index or by a mask."""
        softened = self.softened and Softened(
            self.softened.temperatures,
            self.softened.log_normalizers[:, :, positions],
            self.softened.second[:, positions],
        )
        return dataclasses.replace(
            self,
            softened=softened,
            scores={name: score[:, positions] for name, score in self.scores.items()},
            predictions=self.predictions[:, positions],
            labels=self.labels[positions],
            losses=self.losses[:, positions],
            groups=self.groups[positions],
        )

    def split(self, share: float, seed: int) -> tuple["Records", "Records"]:
        """Two parts with no group in common, the first with this share of the groups, at random.

        Raises:
          ValueError: a share that leaves one of the parts without any group.
        """
        chosen = chosen_groups(self.groups, share, seed)
        return self.take(chosen), self.take(~chosen)

    def save(self, path: Path) -> None:
        """Writes one `.npz`, whole or not at all."""
        arrays = {name: getattr(self, name) for name in _ARRAYS}
        arrays |= {f"{_SCORE}{name}": score for name, score in self.scores.items()}
        if self.softened:
            fields = dataclasses.asdict(self.softened)
            arrays |= {f"{_SOFTENED}{name}": array for name, array in fields.items()}
        files.write_records(path, arrays, self.metadata)

    @classmethod
    def load(cls, path: Path) -> "Records":
        """Reads what `save` wrote.

        Raises:
          FileNotFoundError: no such file, naming the command that writes it.
          ValueError: a damaged file, or not one of records.
        """
        with files.opened_records(path) as (arrays, metadata):
            softened = files.beginning(arrays, _SOFTENED)
            return cls(
                scores=files.beginning(arrays, _SCORE),
                softened=Softened(**softened) if softened else None,
                metadata=metadata,
                **{name: arrays[name] for name in _ARRAYS},
            )


def chosen_groups(groups: np.ndarray, share: float, seed: int) -> np.ndarray:
    """Which positions are of a random share of the groups, bool [N].

    Args:
      groups: int [N].

    Raises:
      ValueError: a share that leaves no group, or leaves none out.
    """
    names, of_N = np.unique(groups, return_inverse=True)
    count = round(share * len(names)) if np.isfinite(share) else 0
    if not 0 < count < len(names):
        raise ValueError(
            f"a share of {share:g} of {len(names)} groups leaves one part of the records "
            "empty; record more texts or examples"
        )
    first = np.random.default_rng(seed).permutation(len(names))[:count]
    return np.isin(of_N, first)
