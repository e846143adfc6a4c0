"""Choosing a token from logits: greedy, or sampled after temperature, top-k and top-p."""

import dataclasses

import jax
import jax.numpy as jnp


@dataclasses.dataclass(frozen=True)
class Sampling:
    """How tokens are drawn; temperature 0 is greedy.

    Attributes:
      temperature: divides the logits.
      top_k: keep the k most probable tokens; 0 keeps all.
      top_p: keep the smallest set of tokens with at least this probability.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0

    def __post_init__(self):
        if self.temperature < 0:
            raise ValueError(f"temperature must be ≥ 0, not {self.temperature}")
        if self.top_k < 0:
            raise ValueError(f"top_k must be ≥ 0, not {self.top_k}")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p must be in (0, 1], not {self.top_p}")


GREEDY = Sampling()


def filtered(logits: jax.Array, sampling: Sampling) -> jax.Array:
    """Logits [..., C] after temperature, then top-k, then top-p; −inf where dropped."""
    logits = logits / sampling.temperature
    if 0 < sampling.top_k < logits.shape[-1]:
        least = jax.lax.top_k(logits, sampling.top_k)[0][..., -1:]
        logits = jnp.where(logits < least, -jnp.inf, logits)
    if sampling.top_p < 1:
        falling = jnp.flip(jnp.sort(logits, axis=-1), axis=-1)
        probs = jax.nn.softmax(falling, axis=-1)
        # A token stays while the probability before it has not reached top_p: never zero tokens.
        stays = jnp.cumsum(probs, axis=-1) - probs < sampling.top_p
        least = jnp.min(jnp.where(stays, falling, jnp.inf), axis=-1, keepdims=True)
        logits = jnp.where(logits < least, -jnp.inf, logits)
    return logits


def choose(keys_B: jax.Array, logits_BC: jax.Array, sampling: Sampling) -> jax.Array:
    """One class per row, int32 [B]; each row draws with its own key."""
    if sampling.temperature == 0:
        return jnp.argmax(logits_BC, axis=-1).astype(jnp.int32)
    draw = jax.vmap(jax.random.categorical)
    return draw(keys_B, filtered(logits_BC, sampling)).astype(jnp.int32)
