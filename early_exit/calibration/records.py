"""What a model did on held-out text, position by position: all that calibration needs.

The one idea: thresholds are fitted and compared on this file alone, so trying another method
never runs the model again.
"""

import dataclasses
import json
import os
import zipfile
from pathlib import Path
from typing import Any

import numpy as np

_ARRAYS = ("exit_depths", "agrees", "correct", "losses")
_SCORE = "score_"


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
        wanted = [
            ("exit_depths", self.exit_depths, (exits + 1,)),
            ("correct", self.correct, (exits + 1, positions)),
            ("losses", self.losses, (exits + 1, positions)),
            *[(f"scores {name!r}", x, (exits, positions)) for name, x in self.scores.items()],
        ]
        for name, array, shape in wanted:
            if array.shape != shape:
                raise ValueError(f"{name} have the shape {array.shape}, not {shape}")
        for name, score in self.scores.items():
            if np.isnan(score).any():
                raise ValueError(f"scores {name!r} hold NaN; the model or its heads are broken")

    def save(self, path: Path) -> None:
        """Writes one `.npz`, whole or not at all."""
        arrays = {name: getattr(self, name) for name in _ARRAYS}
        arrays |= {f"{_SCORE}{name}": score for name, score in self.scores.items()}
        partial = path.with_suffix(".partial")
        with partial.open("wb") as file:  # a name would get `.npz` appended
            np.savez_compressed(file, metadata=np.array(json.dumps(self.metadata)), **arrays)
        os.replace(partial, path)

    @classmethod
    def load(cls, path: Path) -> "Records":
        """Reads what `save` wrote.

        Raises:
          FileNotFoundError: no such file, naming the command that writes it.
          ValueError: a damaged file, or not one of records.
        """
        if not path.exists():
            raise FileNotFoundError(f"no records at {path}; write them with `launch.calibrate`")
        try:
            with path.open("rb") as raw, np.load(raw, allow_pickle=False) as file:
                return cls(
                    scores={
                        name.removeprefix(_SCORE): file[name]
                        for name in file.files
                        if name.startswith(_SCORE)
                    },
                    metadata=json.loads(str(file["metadata"])),
                    **{name: file[name] for name in _ARRAYS},
                )
        except (zipfile.BadZipFile, EOFError, KeyError, ValueError) as error:
            raise ValueError(
                f"{path} holds no records ({error!r}); delete it, and `launch.calibrate` will "
                "write it again"
            ) from error
