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
# Temperatures nearer to zero, or to infinity, are their limits in float32.
_LEAST = 2.0**-125


def filtered(logits: jax.Array, sampling: Sampling) -> jax.Array:
    """Logits [..., C] after temperature, then top-k, then top-p; −inf where dropped.

    They are relative to the largest, so that none overflows: near temperature 0 the largest alone
    is left, as greedy decoding has it.
    """
    below = logits - logits.max(axis=-1, keepdims=True)
    # Beyond these, the number or its reciprocal would be flushed to zero.
    logits = below / min(max(sampling.temperature, _LEAST), 1 / _LEAST)
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


def choose(
    keys: jax.Array,
    logits: jax.Array,
    sampling: Sampling,
    token_ids: jax.Array | None,
    vocab_size: int,
) -> jax.Array:
    """One class per distribution, int32 [...], from logits [..., C], each with its own key [...].

    Heads over different sets of tokens draw with the same noise: with the same key, two
    distributions that are alike give the same token as often as may be (Gumbel-max coupling).

    Args:
      token_ids: int32 [C], what the classes stand for, None for the tokens 0 … C − 1.
      vocab_size: how many tokens there are.
    """
    if sampling.temperature > 0:
        draws = jax.vmap(lambda key: jax.random.gumbel(key, (vocab_size,)))
        noise = draws(keys.reshape(-1)).reshape(*logits.shape[:-1], -1)
        noise = noise if token_ids is None else noise[..., token_ids]
        logits = filtered(logits, sampling) + noise
    return jnp.argmax(logits, axis=-1).astype(jnp.int32)
