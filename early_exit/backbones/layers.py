"""What the transformer backbones share: activations and attention.

The one idea: attention goes through one function, which chooses how. Attention to earlier
positions reads the cache in chunks, only as many as are filled, and never writes it. New keys and
values are returned to the caller, who stores them once, outside any branch: what a block does not
change is never copied.

Shapes: B batch, T new positions, S cache slots, H query heads, K key/value heads, d head width.
"""

import functools

import jax

from early_exit.backbones import cached_attention, fused_attention
from early_exit.backbones.chunked_attention import CHUNK, chunked
from early_exit.backbones.scoring import USUAL, Scoring
from early_exit.backbones.visibility import Visibility

ACTIVATIONS = {
    "silu": jax.nn.silu,
    "relu": jax.nn.relu,
    "gelu": functools.partial(jax.nn.gelu, approximate=False),
    "gelu_tanh": functools.partial(jax.nn.gelu, approximate=True),
}


def attend(
    query_BTHd: jax.Array,
    key_BTKd: jax.Array,
    value_BTKd: jax.Array,
    visibility: Visibility,
    past: tuple[jax.Array, jax.Array] | None = None,
    past_length_B: jax.Array | None = None,
    scoring: Scoring = USUAL,
) -> jax.Array:
    """Softmax attention of T new positions over themselves and over the filled cache.

    Up to `CHUNK` positions are one product. For more, no array is T × T: a kernel of the platform
    does it where there is one for the case, and a loop over chunks everywhere else.

    Args:
      visibility: what the new positions may look at. Its window counts the cache's positions too;
        chunks of the cache that no row's window reaches are not read.
      past: keys and values of earlier positions, each [B, K, S, d], read only;
        S is a multiple of `cached_attention.CACHE_CHUNK`.
      past_length_B: int32, how many slots of each row are filled; new position t of row b is the
        one that slot past_length[b] + t will hold.
      scoring: how products of queries and keys become scores.

    Returns:
      [B, T, H, d] in the query's dtype; scores and sums are float32. What a position gets that may
      look at nothing is finite.
    """
    new = query_BTHd, key_BTKd, value_BTKd
    if past is not None:
        return cached_attention.cached(*new, visibility, past, past_length_B, scoring)
    length, in_chunks = query_BTHd.shape[1], functools.partial(chunked, scoring=scoring)
    if length <= CHUNK:
        if scoring.cap is not None:
            return in_chunks(*new, visibility)
        mask, scale = visibility.mask(length), scoring.scale
        return jax.nn.dot_product_attention(*new, mask=mask, scale=scale)
    fused = fused_attention.kernels(query_BTHd, key_BTKd, visibility, scoring)
    if not fused:
        return in_chunks(*new, visibility)
    return jax.lax.platform_dependent(*new, visibility, default=in_chunks, **fused)
