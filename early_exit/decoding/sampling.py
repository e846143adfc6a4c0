"""Choosing a token from logits: greedy, or sampled after temperature, top-k and top-p."""

import dataclasses
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp


@dataclasses.dataclass(frozen=True)
class Sampling:
    """How tokens are drawn; temperature 0 is greedy.

    Attributes:
      temperature: divides the logits.
      top_k: keep the k most probable tokens; 0 keeps all.
      top_p: keep the smallest set of tokens with at least this probability.

    Raises:
      ValueError: numbers out of range.

    Example:
      >>> ee.Sampling(temperature=0.8, top_p=0.95)
      Sampling(temperature=0.8, top_k=0, top_p=0.95)
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0

    def __post_init__(self):
        if not 0 <= self.temperature < float("inf"):
            raise ValueError(f"temperature must be a number ≥ 0, not {self.temperature}")
        if self.top_k < 0:
            raise ValueError(f"top_k must be ≥ 0, not {self.top_k}")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p must be in (0, 1], not {self.top_p}")


GREEDY = Sampling()


class RowSampling(NamedTuple):
    """How each of B rows draws: arrays, so that other numbers are no other program.

    Attributes:
      temperature, top_p: float32 [B].
      top_k: int32 [B].
    """

    temperature: jax.Array
    top_k: jax.Array
    top_p: jax.Array

    @classmethod
    def of(cls, rows: Sequence[Sampling]) -> "RowSampling":
        return cls(
            jnp.array([row.temperature for row in rows], jnp.float32),
            jnp.array([row.top_k for row in rows], jnp.int32),
            jnp.array([row.top_p for row in rows], jnp.float32),
        )


# Temperatures nearer to zero, or to infinity, are their limits in float32.
_LEAST = 2.0**-125


def filtered(logits: jax.Array, sampling: Sampling | RowSampling) -> jax.Array:
    """Logits [..., C] after temperature, then top-k, then top-p; −inf where dropped.

    They are relative to the largest, so that none overflows: near temperature 0 the largest alone
    is left, as greedy decoding has it.

    Args:
      sampling: of all, or of each distribution [...].
    """
    temperature, top_k, top_p = (
        jnp.broadcast_to(jnp.asarray(x), logits.shape[:-1])[..., None]
        for x in (sampling.temperature, sampling.top_k, sampling.top_p)
    )
    below = logits - logits.max(axis=-1, keepdims=True)
    # Beyond these, the number or its reciprocal would be flushed to zero.
    logits = below / jnp.clip(temperature.astype(jnp.float32), _LEAST, 1 / _LEAST)

    def least(logits):
        """What a token must have to stay, [..., 1]."""
        falling = jnp.flip(jnp.sort(logits, axis=-1), axis=-1)
        last = jnp.where(top_k > 0, jnp.minimum(top_k, logits.shape[-1]), logits.shape[-1]) - 1
        of_k = jnp.take_along_axis(falling, last, axis=-1)
        falling = jnp.where(falling < of_k, -jnp.inf, falling)
        probs = jax.nn.softmax(falling, axis=-1)
        # A token stays while the probability before it has not reached top_p: never zero tokens.
        stays = (jnp.cumsum(probs, axis=-1) - probs < top_p) | (top_p >= 1)
        stays &= falling > -jnp.inf
        return jnp.min(jnp.where(stays, falling, jnp.inf), axis=-1, keepdims=True)

    # Sorting takes longer than all else that decides about a token.
    nothing = jnp.full((*logits.shape[:-1], 1), -jnp.inf, logits.dtype)
    filters = ((top_k > 0) | (top_p < 1)).any()
    limit = jax.lax.cond(filters, least, lambda _: nothing, logits)
    return jnp.where(logits < limit, -jnp.inf, logits)


def choose(
    keys: jax.Array,
    logits: jax.Array,
    sampling: Sampling | RowSampling | None,
    token_ids: jax.Array | None,
    vocab_size: int,
) -> jax.Array:
    """One class per distribution, int32 [...], from logits [..., C], each with its own key [...].

    Heads over different sets of tokens draw with the same noise: with the same key, two
    distributions that are alike give the same token as often as may be (Gumbel-max coupling).

    Args:
      sampling: of all, or of each distribution [...]; greedy if None.
      token_ids: int32 [C], what the classes stand for, None for the tokens 0 … C − 1.
      vocab_size: how many tokens there are.
    """
    best = jnp.argmax(logits, axis=-1)
    if sampling is None:
        return best.astype(jnp.int32)
    temperature = jnp.asarray(sampling.temperature)

    def drawn(logits):
        draws = jax.vmap(lambda key: jax.random.gumbel(key, (vocab_size,)))
        noise = draws(keys.reshape(-1)).reshape(*logits.shape[:-1], -1)
        noise = noise if token_ids is None else noise[..., token_ids]
        choice = jnp.argmax(filtered(logits, sampling) + noise, axis=-1)
        return jnp.where(temperature > 0, choice, best)

    # Noise for every token takes longer than all else that decides about one.
    chosen = jax.lax.cond((temperature > 0).any(), drawn, lambda _: best, logits)
    return chosen.astype(jnp.int32)
