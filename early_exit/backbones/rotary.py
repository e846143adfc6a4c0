"""Rotary positions (Su et al. 2021, RoFormer) and how they are stretched to longer contexts.

The one idea: every variant is only another table of frequencies, made once in numpy: position p
turns pair i of a head by p · frequency[i], and pairs beyond the table stay as they are.

Shapes: B batch, T positions, N heads, d head width, r = 2 · pairs that turn (r ≤ d).
"""

import dataclasses
import math
from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np

# Cosines and sines of every position, each [B, T, r/2] in float32.
Rotation = tuple[jax.Array, jax.Array]


@dataclasses.dataclass(frozen=True)
class Linear:
    """Every position counts as 1/`factor` (Chen et al. 2023, position interpolation)."""

    factor: float

    def __call__(self, frequency: np.ndarray, theta: float) -> np.ndarray:
        return frequency / self.factor


@dataclasses.dataclass(frozen=True)
class Llama3:
    """Slow pairs are interpolated, fast ones kept, those between mixed (Llama 3.1).

    Attributes:
      factor: by which the slow pairs are interpolated.
      original_context: positions in pretraining. Pairs that turn less than `low_frequency` times
        in it are slow, those that turn more than `high_frequency` times fast.
    """

    factor: float
    original_context: int
    low_frequency: float
    high_frequency: float

    def __call__(self, frequency: np.ndarray, theta: float) -> np.ndarray:
        turns = self.original_context * frequency / (2 * math.pi)
        kept = (turns - self.low_frequency) / (self.high_frequency - self.low_frequency)
        kept = np.clip(kept, 0, 1)
        return (1 - kept) * frequency / self.factor + kept * frequency


@dataclasses.dataclass(frozen=True)
class Yarn:
    """As `Llama3`, mixed linearly in the pair's index, with sharper attention (Peng et al. 2023).

    Attributes:
      factor: by which the slow pairs are interpolated.
      original_context: positions in pretraining.
      attention_factor: cosines and sines are multiplied by it, so scores by its square.
      beta_fast, beta_slow: turns in the original context of the last pair that is kept and of the
        first that is interpolated.
      truncate: round the indices of these two pairs outwards.
    """

    factor: float
    original_context: int
    attention_factor: float
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    truncate: bool = True

    def __call__(self, frequency: np.ndarray, theta: float) -> np.ndarray:
        pairs = len(frequency)

        def index_of(turns):
            return pairs * math.log(self.original_context / (turns * 2 * math.pi)) / math.log(theta)

        first, last = index_of(self.beta_fast), index_of(self.beta_slow)
        if self.truncate:
            first, last = math.floor(first), math.ceil(last)
        first, last = max(first, 0), min(last, 2 * pairs - 1)
        if first == last:
            last += 1e-3
        interpolated = np.clip((np.arange(pairs) - first) / (last - first), 0, 1)
        return frequency / self.factor * interpolated + frequency * (1 - interpolated)


@dataclasses.dataclass(frozen=True)
class PerPair:
    """Each pair has a divisor of its own, whatever it was computed from (Ding et al. 2024)."""

    divisors: tuple[float, ...]

    def __call__(self, frequency: np.ndarray, theta: float) -> np.ndarray:
        return frequency / np.array(self.divisors)


@dataclasses.dataclass(frozen=True)
class LongRope:
    """A divisor of each pair up to the original context, another one for longer texts (Ding et al.
    2024, LongRoPE).

    Which table holds is decided by a text's whole length, for all its positions. Whoever decodes
    with a cache has turned the first keys before the length is known. So only texts of the original
    context are taken, for which the first table is exact; the second is kept for export.

    Attributes:
      divisors: of each pair, in the original context.
      attention_factor: cosines and sines are multiplied by it, so scores by its square.
      original_context: positions in pretraining.
      long_divisors, long_context: of longer texts, and how long they may be.
    """

    divisors: tuple[float, ...]
    attention_factor: float
    original_context: int
    long_divisors: tuple[float, ...]
    long_context: int

    incidental: ClassVar[tuple[str, ...]] = ("long_divisors", "long_context")

    def __call__(self, frequency: np.ndarray, theta: float) -> np.ndarray:
        return frequency / np.array(self.divisors)


Scaling = Linear | Llama3 | Yarn | PerPair | LongRope


def frequencies(dim: int, theta: float, scaling: Scaling | None = None) -> np.ndarray:
    """float32 [dim / 2]: radians per position, θ^(−2i / dim) if not scaled (eq. 15)."""
    frequency = theta ** (-np.arange(0, dim, 2) / dim)
    if scaling is not None:
        frequency = scaling(frequency, theta)
    return frequency.astype(np.float32)


def rotation(
    positions_BT: jax.Array, dim: int, theta: float, scaling: Scaling | None = None
) -> Rotation:
    """How the first `dim` numbers of a head are turned at each position."""
    frequency = frequencies(dim, theta, scaling)
    angles = positions_BT[..., None].astype(jnp.float32) * frequency[None, None]
    cos, sin = jnp.cos(angles), jnp.sin(angles)
    if isinstance(scaling, Yarn | LongRope):
        return cos * scaling.attention_factor, sin * scaling.attention_factor
    return cos, sin


def rotate(x_BTNd: jax.Array, rotation: Rotation) -> jax.Array:
    """Turns the two halves of the first r numbers of each head against each other."""
    cos, sin = (part[:, :, None] for part in rotation)
    turned = 2 * cos.shape[-1]
    first, second = jnp.split(x_BTNd[..., :turned].astype(jnp.float32), 2, axis=-1)
    rotated = jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
    rotated = rotated.astype(x_BTNd.dtype)
    if turned == x_BTNd.shape[-1]:
        return rotated
    return jnp.concatenate([rotated, x_BTNd[..., turned:]], axis=-1)
