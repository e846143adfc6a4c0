"""What a model did on held-out text, position by position: all that calibration needs.

The one idea: thresholds are fitted and compared on this file alone, so trying another method
never runs the model again.
"""

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np

from early_exit import confidence as confidences

_ARRAYS = ("exit_depths", "agrees", "correct", "losses")


@dataclasses.dataclass(frozen=True)
class Records:
    """Scores and outcomes of E exits (and the final one) at N positions.

    Attributes:
      exit_depths: int [E + 1], blocks run at each exit, the final one last.
      scores: confidence name → float32 [E, N]; −inf where a head declines to predict.
      agrees: bool [E, N], the head's prediction is the final exit's.
      correct: bool [E + 1, N], the prediction is the text's next token.
      losses: float32 [E + 1, N], cross-entropy of the next token in nats (for a reduced head, of
        its class, all tokens it cannot predict being one class).
      metadata: where the records come from.
    """

    exit_depths: np.ndarray
    scores: dict[str, np.ndarray]
    agrees: np.ndarray
    correct: np.ndarray
    losses: np.ndarray
    metadata: dict[str, Any] = dataclasses.field(default_factory=dict)

    def __post_init__(self):
        exits, positions = self.agrees.shape
        if not positions:
            raise ValueError("records hold no position; give more held-out text")
        for name, score in self.scores.items():
            if score.shape != (exits, positions):
                raise ValueError(
                    f"scores {name!r} have the shape {score.shape}, not {(exits, positions)}"
                )
            if np.isnan(score).any():
                raise ValueError(f"scores {name!r} hold NaN; the model or its heads are broken")

    def save(self, path: Path) -> None:
        """Writes one `.npz`."""
        arrays = {name: getattr(self, name) for name in _ARRAYS}
        arrays |= {f"score_{name}": score for name, score in self.scores.items()}
        np.savez_compressed(path, metadata=np.array(json.dumps(self.metadata)), **arrays)

    @classmethod
    def load(cls, path: Path) -> "Records":
        """Raises FileNotFoundError where there is none, naming the command that writes it."""
        if not path.exists():
            raise FileNotFoundError(f"no records at {path}; write them with `launch.calibrate`")
        with np.load(path, allow_pickle=False) as file:
            return cls(
                scores={name: file[f"score_{name}"] for name in confidences.NAMES},
                metadata=json.loads(str(file["metadata"])),
                **{name: file[name] for name in _ARRAYS},
            )
