"""Pieces shared by the transformer backbones: rotary positions and cached attention.

The one idea: attention to earlier positions reads the cache in chunks, only as many as are
filled, and never writes it. New keys and values are returned to the caller, who stores them
once, outside any branch: what a block does not change is never copied.

Shapes: B batch, T new positions, S cache slots, H query heads, K key/value heads,
G = H / K queries per key/value head, d head width.
"""

import jax
import jax.numpy as jnp

# Positions read from the cache at a time: the grain in which cost follows the filled length.
CACHE_CHUNK = 128


def rotary_angles(positions_BT: jax.Array, head_dim: int, theta: float) -> jax.Array:
    """Angles [B, T, head_dim // 2] in float32 (Su et al. 2021, RoFormer, eq. 15)."""
    frequency = theta ** (-jnp.arange(0, head_dim, 2, dtype=jnp.float32) / head_dim)
    return positions_BT[..., None].astype(jnp.float32) * frequency[None, None]


def rotate(x_BTNd: jax.Array, angles_BTa: jax.Array) -> jax.Array:
    """Rotates the two halves of each head against each other ("half rotation")."""
    cos, sin = jnp.cos(angles_BTa)[:, :, None], jnp.sin(angles_BTa)[:, :, None]
    first, second = jnp.split(x_BTNd.astype(jnp.float32), 2, axis=-1)
    rotated = jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
    return rotated.astype(x_BTNd.dtype)


def causal_mask(segments_BT: jax.Array | None, length: int) -> jax.Array:
    """[B or 1, 1, T, T], true where a position may look: not ahead, not into another segment."""
    mask = jnp.tril(jnp.ones((1, 1, length, length), bool))
    if segments_BT is not None:
        mask &= (segments_BT[:, :, None] == segments_BT[:, None, :])[:, None]
    return mask


def attend(
    query_BTHd: jax.Array,
    key_BTKd: jax.Array,
    value_BTKd: jax.Array,
    mask: jax.Array,
    past: tuple[jax.Array, jax.Array] | None = None,
    past_length_B: jax.Array | None = None,
) -> jax.Array:
    """Softmax attention of T new positions over themselves and over the filled cache.

    Args:
      mask: [B or 1, 1, T, T], true where a new position may look at another new one.
      past: keys and values of earlier positions, each [B, K, S, d], read only;
        S is a multiple of `CACHE_CHUNK`.
      past_length_B: int32, how many slots of each row are filled.

    Returns:
      [B, T, H, d] in the query's dtype; scores and sums are float32.
    """
    if past is None:
        return jax.nn.dot_product_attention(query_BTHd, key_BTKd, value_BTKd, mask=mask)

    batch, length, heads, head_dim = query_BTHd.shape
    kv_heads = key_BTKd.shape[2]
    group = heads // kv_heads
    # [B, K, T·G, d]: the queries that share a key/value head are rows of one matrix.
    query = query_BTHd.reshape(batch, length, kv_heads, group, head_dim)
    query = (query.transpose(0, 2, 1, 3, 4) * head_dim**-0.5).reshape(
        batch, kv_heads, length * group, head_dim
    )

    def scores_and_values(key_BKsd, value_BKsd, allowed, carry):
        """Folds one chunk into a running softmax (Milakov & Gimelshein 2018, alg. 3)."""
        peak, total, mixed = carry
        scores = jnp.einsum("bkqd,bksd->bkqs", query, key_BKsd, preferred_element_type=jnp.float32)
        scores = jnp.where(allowed, scores, -jnp.inf)
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
        jnp.repeat(mask, group, axis=2),
        carry,
    )

    past_key, past_value = past

    def past_chunk(index, carry):
        start = index * CACHE_CHUNK
        key, value = (
            jax.lax.dynamic_slice_in_dim(x, start, CACHE_CHUNK, axis=2)
            for x in (past_key, past_value)
        )
        filled = (start + jnp.arange(CACHE_CHUNK))[None] < past_length_B[:, None]
        return scores_and_values(key, value, filled[:, None, None, :], carry)

    chunks = (past_length_B.max() + CACHE_CHUNK - 1) // CACHE_CHUNK
    _, total, mixed = jax.lax.fori_loop(0, chunks, past_chunk, carry)
    out = (mixed / total[..., None]).astype(query_BTHd.dtype)
    out = out.reshape(batch, kv_heads, length, group, head_dim).transpose(0, 2, 1, 3, 4)
    return out.reshape(batch, length, heads, head_dim)
