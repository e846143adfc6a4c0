"""What the transformer backbones share: activations and attention.

The one idea: attention goes through one function, which chooses how. Attention to earlier
positions reads the cache in chunks, only as many as are filled, and never writes it. New keys and
values are returned to the caller, who stores them once, outside any branch: what a block does not
change is never copied.

Shapes: B batch, T new positions, S cache slots, H query heads, K key/value heads,
G = H / K queries per key/value head, d head width.
"""

import functools

import jax
import jax.numpy as jnp

from early_exit.backbones import fused_attention
from early_exit.backbones.chunked_attention import CHUNK, chunked
from early_exit.backbones.visibility import Visibility

ACTIVATIONS = {
    "silu": jax.nn.silu,
    "relu": jax.nn.relu,
    "gelu": functools.partial(jax.nn.gelu, approximate=False),
    "gelu_tanh": functools.partial(jax.nn.gelu, approximate=True),
}
# Positions read from the cache at a time: the grain in which cost follows the filled length.
CACHE_CHUNK = 128


def attend(
    query_BTHd: jax.Array,
    key_BTKd: jax.Array,
    value_BTKd: jax.Array,
    visibility: Visibility,
    past: tuple[jax.Array, jax.Array] | None = None,
    past_length_B: jax.Array | None = None,
) -> jax.Array:
    """Softmax attention of T new positions over themselves and over the filled cache.

    Up to `CHUNK` positions are one product. For more, no array is T × T: a kernel of the platform
    does it where there is one for the case, and a loop over chunks everywhere else.

    Args:
      visibility: what the new positions may look at. Its window counts the cache's positions too;
        chunks of the cache that no row's window reaches are not read.
      past: keys and values of earlier positions, each [B, K, S, d], read only;
        S is a multiple of `CACHE_CHUNK`.
      past_length_B: int32, how many slots of each row are filled; new position t of row b is the
        one that slot past_length[b] + t will hold.

    Returns:
      [B, T, H, d] in the query's dtype; scores and sums are float32. What a position gets that may
      look at nothing is finite.
    """
    new = query_BTHd, key_BTKd, value_BTKd
    if past is not None:
        return _attend_cached(*new, visibility, past, past_length_B)
    length = query_BTHd.shape[1]
    if length <= CHUNK:
        return jax.nn.dot_product_attention(*new, mask=visibility.mask(length))
    fused = fused_attention.kernels(query_BTHd, key_BTKd, visibility)
    if not fused:
        return chunked(*new, visibility)
    return jax.lax.platform_dependent(*new, visibility, default=chunked, **fused)


def _attend_cached(query_BTHd, key_BTKd, value_BTKd, visibility, past, past_length_B) -> jax.Array:
    window = visibility.window
    batch, length, heads, head_dim = query_BTHd.shape
    kv_heads = key_BTKd.shape[2]
    group = heads // kv_heads
    # [B, K, T·G, d]: the queries that share a key/value head are rows of one matrix.
    query = query_BTHd.reshape(batch, length, kv_heads, group, head_dim)
    query = query.transpose(0, 2, 1, 3, 4).reshape(batch, kv_heads, length * group, head_dim)

    def scores_and_values(key_BKsd, value_BKsd, allowed, carry):
        """Folds one chunk into a running softmax (Milakov & Gimelshein 2018, alg. 3)."""
        peak, total, mixed = carry
        scores = jnp.einsum("bkqd,bksd->bkqs", query, key_BKsd, preferred_element_type=jnp.float32)
        # Not the query: in half precision it would be rounded once more.
        scores = jnp.where(allowed, scores * head_dim**-0.5, -jnp.inf)
        new_peak = jnp.maximum(peak, scores.max(-1))
        scale = jnp.exp(peak - new_peak)
        weights = jnp.exp(scores - new_peak[..., None])
        mixed = mixed * scale[..., None] + jnp.einsum(
            "bkqs,bksd->bkqd",
            weights.astype(value_BKsd.dtype),
            value_BKsd,
            preferred_element_type=jnp.float32,
        )
        return new_peak, total * scale + weights.sum(-1), mixed

    # The new positions go first: each sees itself, so the running maximum is finite from here on.
    shape = (batch, kv_heads, length * group)
    carry = (
        jnp.full(shape, jnp.finfo(jnp.float32).min),
        jnp.zeros(shape, jnp.float32),
        jnp.zeros((*shape, head_dim), jnp.float32),
    )
    carry = scores_and_values(
        key_BTKd.swapaxes(1, 2),
        value_BTKd.swapaxes(1, 2),
        jnp.repeat(visibility.mask(length), group, axis=2),
        carry,
    )

    past_key, past_value = past

    def past_chunk(index, carry):
        start = index * CACHE_CHUNK
        key, value = (
            jax.lax.dynamic_slice_in_dim(x, start, CACHE_CHUNK, axis=2)
            for x in (past_key, past_value)
        )
        slots = start + jnp.arange(CACHE_CHUNK)
        allowed = (slots[None] < past_length_B[:, None])[:, None, None, :]
        if window is not None:
            allowed &= slots[None, None, None] >= first_seen[:, None, :, None]
        return scores_and_values(key, value, allowed, carry)

    first_chunk = 0
    if window is not None:
        own_slot = past_length_B[:, None] + jnp.repeat(jnp.arange(length), group)[None]
        first_seen = jnp.maximum(own_slot - (window - 1), 0)  # [B, T·G]
        first_chunk = first_seen.min() // CACHE_CHUNK
    chunks = (past_length_B.max() + CACHE_CHUNK - 1) // CACHE_CHUNK
    _, total, mixed = jax.lax.fori_loop(first_chunk, chunks, past_chunk, carry)
    out = (mixed / total[..., None]).astype(query_BTHd.dtype)
    out = out.reshape(batch, kv_heads, length, group, head_dim).transpose(0, 2, 1, 3, 4)
    return out.reshape(batch, length, heads, head_dim)
