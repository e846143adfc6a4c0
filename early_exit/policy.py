"""When to leave: a score and a threshold per exit, the same in decoding and in evaluation.

The one idea: a policy is a small pytree (its thresholds are arrays, so changing them never
recompiles) and a small JSON file that says where they came from.
"""

import dataclasses
import functools
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
      decay: float32 scalar τ, or None for thresholds that stay. With it, a threshold λ falls over
        an answer: clip(0.9·λ + 0.1·exp(−τ·t/N), 0, 1) at token t of at most N (Schuster et al.
        2022, CALM, eq. 5; its published code scales λ itself by 0.9 + 0.1·exp(−τ·t/N) instead).
      budget: float32 scalar, blocks per token, or None. What a token leaves over is saved for later
        ones; a position leaves, whatever its score, where the next exit is beyond the savings.
      provenance: how the thresholds were chosen; kept in the file, not in the pytree.
    """

    thresholds: jax.Array
    confidence: str = "max_prob"
    decay: jax.Array | None = None
    budget: jax.Array | None = None
    provenance: Mapping[str, Any] = dataclasses.field(default_factory=dict, compare=False)

    def threshold(self, exit_index: int, progress: jax.Array) -> jax.Array:
        """An exit's threshold [...] at `progress` t/N in [0, 1] through the answer."""
        fixed = self.thresholds[exit_index]
        if self.decay is None:
            return jnp.broadcast_to(fixed, jnp.shape(progress))
        falling = jnp.clip(0.9 * fixed + 0.1 * jnp.exp(-self.decay * progress), 0, 1)
        return jnp.where(jnp.isfinite(fixed), falling, fixed)

    def leaves(self, exit_index: int, score: jax.Array, progress: jax.Array) -> jax.Array:
        """Whether a position with this score [...] leaves at this exit: bool [...]."""
        return score >= self.threshold(exit_index, progress)

    def overdrawn(self, account: jax.Array, next_depth: int) -> jax.Array:
        """Whether the savings [...] forbid going on to the exit after `next_depth` blocks."""
        if self.budget is None:
            return jnp.zeros(jnp.shape(account), bool)
        return account + self.budget < next_depth

    def charged(self, account: jax.Array, depth: int) -> jax.Array:
        """The savings [...] after a token that took so many blocks."""
        return account if self.budget is None else account + self.budget - depth

    def consults(self, exit_index: int) -> jax.Array:
        """Whether the head here need be evaluated for its score; not where no score leaves."""
        needed = self.confidence == "patience"  # a head left out would break the row of agreements
        return needed | (self.thresholds[exit_index] < NEVER)

    def exit_index(
        self,
        scores_EN: np.ndarray,
        exit_depths: np.ndarray,
        progress_N: np.ndarray | None = None,
    ) -> np.ndarray:
        """Where positions with these scores leave, int [N]; E is the final exit.

        Args:
          exit_depths: int [E + 1], blocks run at each exit.
          progress_N: how far through its answer each position is; 0 if not given. With a budget,
            the positions are taken as one answer, in order.
        """
        scores_EN = jnp.asarray(scores_EN)
        progress_N = jnp.zeros(scores_EN.shape[1]) if progress_N is None else progress_N
        depths = tuple(int(depth) for depth in exit_depths)
        return np.asarray(_exit_index(self, scores_EN, jnp.asarray(progress_N), depths))

    def check(self, exit_depths: np.ndarray) -> None:
        """Raises ValueError where the policy does not fit a model with exits at these depths."""
        (found,) = self.thresholds.shape
        if found != len(exit_depths) - 1:
            raise ValueError(
                f"the policy has {found} thresholds but the model has {len(exit_depths) - 1} "
                "exits; calibrate this model, or name its own policy"
            )
        if self.budget is not None and self.budget < exit_depths[0]:
            raise ValueError(
                f"a budget of {float(self.budget):g} blocks per token cannot be kept: the first "
                f"exit stands after block {exit_depths[0]}; raise it, or add an earlier exit"
            )


jax.tree_util.register_dataclass(
    ExitPolicy,
    data_fields=["thresholds", "decay", "budget"],
    meta_fields=["confidence"],
    drop_fields=["provenance"],
)


@functools.partial(jax.jit, static_argnames="depths")
def _exit_index(policy: ExitPolicy, scores_EN, progress_N, depths: tuple[int, ...]) -> jax.Array:
    leaves_EN = [policy.leaves(e, score, progress_N) for e, score in enumerate(scores_EN)]
    leaves_EN = jnp.stack([*leaves_EN, jnp.ones_like(leaves_EN[0])])
    if policy.budget is None:
        return jnp.argmax(leaves_EN, axis=0)

    def one(account, leaves_E):
        must = [policy.overdrawn(account, depth) for depth in depths[1:]]
        exit_index = jnp.argmax(leaves_E | jnp.stack([*must, True]))
        return policy.charged(account, jnp.array(depths)[exit_index]), exit_index

    return jax.lax.scan(one, jnp.float32(0), leaves_EN.T)[1]


def make(
    thresholds,
    confidence: str = "max_prob",
    *,
    decay: float | None = None,
    budget: float | None = None,
    **provenance,
) -> ExitPolicy:
    """A policy from E numbers.

    Raises:
      ValueError: unknown confidence, a threshold that is not a number, a decay or budget that is
        not positive, or a decay of scores that are no probabilities.
    """
    if confidence not in confidences.NAMES:
        known = ", ".join(confidences.NAMES)
        raise ValueError(f"unknown confidence {confidence!r}; choose one of {known}")
    thresholds = np.asarray(thresholds, np.float32)
    if thresholds.ndim != 1 or np.isnan(thresholds).any():
        raise ValueError(f"thresholds must be one number per exit, not {thresholds}")
    for name, value in (("decay", decay), ("budget", budget)):
        if value is not None and not 0 < value < NEVER:
            raise ValueError(f"{name} must be a positive number, not {value}")
    if decay is not None and confidence == "patience":
        raise ValueError("patience counts heads; a decay is for scores between 0 and 1")
    return ExitPolicy(
        jnp.asarray(thresholds),
        confidence,
        None if decay is None else jnp.float32(decay),
        None if budget is None else jnp.float32(budget),
        provenance,
    )


def never(exits: int, confidence: str = "max_prob") -> ExitPolicy:
    """Runs every block for every position."""
    return make([NEVER] * exits, confidence)


def forced(exits: int, exit_index: int, confidence: str = "max_prob") -> ExitPolicy:
    """Every position leaves at one exit; the heads before it are not evaluated."""
    return make([ALWAYS if e == exit_index else NEVER for e in range(exits)], confidence)


def patient(exits: int, patience: int) -> ExitPolicy:
    """Leave where `patience` heads in a row, before this one, predicted the same (PABEE)."""
    return make([patience] * exits, "patience")


_WORDS = {NEVER: "never", ALWAYS: "always"}


def save(policy: ExitPolicy, path: Path, *, enabled: bool = True) -> None:
    """Writes the policy as JSON, whole or not at all."""
    thresholds = [_WORDS.get(x, x) for x in np.asarray(policy.thresholds).astype(float).tolist()]
    text = json.dumps(
        {
            "enabled": enabled,
            "confidence": policy.confidence,
            "thresholds": thresholds,
            "decay": None if policy.decay is None else float(policy.decay),
            "budget": None if policy.budget is None else float(policy.budget),
            "provenance": dict(policy.provenance),
        },
        indent=2,
    )
    partial = path.with_suffix(".partial")
    partial.write_text(text + "\n")
    os.replace(partial, path)


def load(path: Path, *, exit_depths: np.ndarray) -> ExitPolicy | None:
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
        policy = make(
            thresholds,
            fields["confidence"],
            decay=fields["decay"],
            budget=fields["budget"],
            **fields["provenance"],
        )
    except (json.JSONDecodeError, KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{path} is not an exit policy: {error!r}") from error
    if not isinstance(enabled, bool):
        raise ValueError(f'{path}: "enabled" must be true or false, not {enabled!r}')
    try:
        policy.check(exit_depths)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    return policy if enabled else None
