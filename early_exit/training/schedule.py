"""What each exit weighs in the loss as training goes on, and which blocks are left out.

The one idea: all of it is a function of the step number, so a run that is resumed weighs, leaves
out and runs what it would have. An exit whose weight is zero at a step is not computed at it.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

PATHS = ("linear", "cosine")
CURRICULA = ("all", "rotational", "gradual")


@dataclasses.dataclass(frozen=True)
class ExitWeights:
    """Weights that move from one value to another, of exits that may take turns.

    Attributes:
      weights: one per exit, E in all.
      start: those of the first step, if they are others.
      steps: after how many steps they have become `weights`.
      path: how: `linear`, w0 + r · (w − w0) with r the share of the steps, or `cosine`,
        w0 + ½ · (1 − cos πr) · (w − w0); both are EE-LLM's (Chen et al. 2024).
      curriculum: `all` exits at every step; `rotational`, every `period`-th, and the next ones at
        the next step; `gradual`, the last exit first and one more every `period` steps, so that
        all have joined after (E − 1) · `period`. The last two are LayerSkip's (Elhoushi et al.
        2024).
      period: see `curriculum`.

    Raises:
      ValueError: unknown names, numbers of weights that differ, or a period below 1.

    Example:
      >>> rising = ee.ExitWeights((1.0, 0.5), start=(0.0, 0.0), steps=10)
      >>> rising(5).tolist()
      [0.5, 0.25]
    """

    weights: tuple[float, ...]
    start: tuple[float, ...] = ()
    steps: int = 0
    path: str = "linear"
    curriculum: str = "all"
    period: int = 1

    def __post_init__(self):
        for name, value, known in (
            ("weight_path", self.path, PATHS),
            ("curriculum", self.curriculum, CURRICULA),
        ):
            if value not in known:
                raise ValueError(f"unknown tune.{name} {value!r}; choose one of {', '.join(known)}")
        if self.start and len(self.start) != len(self.weights):
            raise ValueError(
                f"tune.start_weights has {len(self.start)} values for {len(self.weights)} exits; "
                "give one per exit, or none for weights that stay"
            )
        if bool(self.start) != (self.steps > 0):
            raise ValueError("tune.start_weights and tune.weight_steps belong together; set both")
        if self.period < 1:
            raise ValueError(f"tune.curriculum_period must be at least 1, not {self.period}")

    @property
    def groups(self) -> tuple[tuple[int, ...], ...]:
        """Exits (from 0) that are always computed at the same steps."""
        exits = range(len(self.weights))
        if self.curriculum == "all":
            return (tuple(exits),)
        if self.curriculum == "gradual":
            return tuple((e,) for e in exits)
        turns = (tuple(exits[turn :: self.period]) for turn in range(self.period))
        return tuple(filter(None, turns))

    def __call__(self, step: jax.Array) -> jax.Array:
        """Weights at a step (int32 scalar, from 0), float32 [E]; 0 for exits that are left out."""
        weights, exits = jnp.array(self.weights, jnp.float32), np.arange(len(self.weights))
        if self.steps:
            done = jnp.minimum(step / self.steps, 1.0)
            if self.path == "cosine":
                done = (1 - jnp.cos(jnp.pi * done)) / 2
            start = jnp.array(self.start, jnp.float32)
            weights = start + done * (weights - start)
        if self.curriculum == "rotational":
            weights *= exits % self.period == step % self.period
        if self.curriculum == "gradual":
            weights *= exits[::-1] * self.period <= step
        return weights


def layerskip_weights(points: tuple[int, ...], depth: int, scale: float) -> tuple[float, ...]:
    """LayerSkip's weights of exits, relative to the final exit's (Elhoushi et al. 2024).

    With e(l) = scale · Σ_{i ≤ l} i for an exit after block l (both counted from 0 there), and
    e(L − 1) = L − 1 + scale · Σ_{i ≤ L − 2} i for the final exit.
    """

    def up_to(last: int) -> float:
        return scale * last * (last + 1) / 2

    final = depth - 1 + up_to(depth - 2)
    return tuple(up_to(point - 1) / final for point in points)


def drop_rates(depth: int, most: float) -> np.ndarray:
    """How often LayerSkip leaves each block out, float [L]: rising from 0 to `most`.

    most · (e^{l · ln 2 / (L − 1)} − 1) for block l from 0 (Elhoushi et al. 2024).

    Raises:
      ValueError: `most` is not in [0, 1).
    """
    if not 0 <= most < 1:
        raise ValueError(f"tune.layer_dropout must lie in [0, 1), not {most}")
    return most * (2 ** (np.arange(depth) / max(depth - 1, 1)) - 1)
