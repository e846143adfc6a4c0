"""When to leave: a score and a threshold per exit, the same in decoding and in evaluation.

The one idea: a policy is a small pytree (its thresholds are arrays, so changing them never
recompiles) and a small JSON file that says where they came from.
"""

import dataclasses
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from early_exit import confidence as confidences

NEVER, ALWAYS = float("inf"), float("-inf")


@dataclasses.dataclass(frozen=True)
class ExitPolicy:
    """Leave at the first exit whose score reaches its threshold.

    Attributes:
      thresholds: float32 [E], in the units of the score; inf never leaves, −inf always does.
      confidence: which score (`confidence.NAMES`).
      provenance: how the thresholds were chosen; kept in the file, not in the pytree.
    """

    thresholds: jax.Array
    confidence: str = "max_prob"
    provenance: Mapping[str, Any] = dataclasses.field(default_factory=dict, compare=False)

    def leaves(self, exit_index: int, score: jax.Array) -> jax.Array:
        """Whether a position with this score [...] leaves at this exit: bool [...]."""
        return score >= self.thresholds[exit_index]

    def exit_index(self, scores_EN: np.ndarray) -> np.ndarray:
        """Where positions with these scores leave, int [N]; E is the final exit."""
        leaves = [np.asarray(self.leaves(e, score)) for e, score in enumerate(scores_EN)]
        return np.argmax([*leaves, np.ones_like(leaves[0])], axis=0)

    def check(self, exits: int) -> None:
        """Raises ValueError where the policy is not for a model with so many exits."""
        (found,) = self.thresholds.shape
        if found != exits:
            raise ValueError(
                f"the policy has {found} thresholds but the model has {exits} exits; "
                "calibrate this model, or name its own policy"
            )

    def can_leave(self, exit_index: int) -> jax.Array:
        """Whether any score leaves here; where not, the head need not be evaluated."""
        return self.thresholds[exit_index] < NEVER


jax.tree_util.register_dataclass(
    ExitPolicy, data_fields=["thresholds"], meta_fields=["confidence"], drop_fields=["provenance"]
)


def make(thresholds, confidence: str = "max_prob", **provenance) -> ExitPolicy:
    """A policy from E numbers.

    Raises:
      ValueError: unknown confidence, or a threshold that is not a number.
    """
    if confidence not in confidences.NAMES:
        known = ", ".join(confidences.NAMES)
        raise ValueError(f"unknown confidence {confidence!r}; choose one of {known}")
    thresholds = np.asarray(thresholds, np.float32)
    if thresholds.ndim != 1 or np.isnan(thresholds).any():
        raise ValueError(f"thresholds must be one number per exit, not {thresholds}")
    return ExitPolicy(jnp.asarray(thresholds), confidence, provenance)


def never(exits: int, confidence: str = "max_prob") -> ExitPolicy:
    """Runs every block for every position."""
    return make([NEVER] * exits, confidence)


def forced(exits: int, exit_index: int, confidence: str = "max_prob") -> ExitPolicy:
    """Every position leaves at one exit; the heads before it are not evaluated."""
    return make([ALWAYS if e == exit_index else NEVER for e in range(exits)], confidence)


_WORDS = {NEVER: "never", ALWAYS: "always"}


def save(policy: ExitPolicy, path: Path, *, enabled: bool = True) -> None:
    """Writes the policy as JSON, whole or not at all."""
    thresholds = [_WORDS.get(x, x) for x in np.asarray(policy.thresholds).astype(float).tolist()]
    text = json.dumps(
        {
            "enabled": enabled,
            "confidence": policy.confidence,
            "thresholds": thresholds,
            "provenance": dict(policy.provenance),
        },
        indent=2,
    )
    partial = path.with_suffix(".partial")
    partial.write_text(text + "\n")
    os.replace(partial, path)


def load(path: Path, *, exits: int) -> ExitPolicy | None:
    """Reads a policy; None where the file says `"enabled": false`.

    Raises:
      FileNotFoundError: no such file, naming the command that writes it.
      ValueError: not a policy, or one for another number of exits.
    """
    if not path.exists():
        raise FileNotFoundError(f"no exit policy at {path}; write one with `launch.calibrate`")
    try:
        fields = json.loads(path.read_text())
        words = {word: value for value, word in _WORDS.items()}
        thresholds = [float(words.get(x, x)) for x in fields["thresholds"]]
        enabled = fields["enabled"]
        policy = make(thresholds, fields["confidence"], **fields["provenance"])
    except (json.JSONDecodeError, KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{path} is not an exit policy: {error!r}") from error
    if not isinstance(enabled, bool):
        raise ValueError(f'{path}: "enabled" must be true or false, not {enabled!r}')
    try:
        policy.check(exits)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    return policy if enabled else None
