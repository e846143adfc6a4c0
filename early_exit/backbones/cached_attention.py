"""Attention to a cache of earlier positions: read as far as it is filled, never written.

The one idea: a softmax can be kept up as its scores come (Milakov & Gimelshein 2018, algorithm 3).
So new positions begin with themselves, which are few, and fold in what the cache has of them: one
chunk at a time, or all at once where most of it is filled and few ask.

Shapes: B batch, T new positions, S cache slots, H query heads, K key/value heads,
G = H / K queries per key/value head, d head width.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from early_exit.backbones import base
from early_exit.backbones.scoring import USUAL, Scoring
from early_exit.backbones.visibility import Visibility

# Positions read from the cache at a time: the grain in which cost follows the filled length.
CACHE_CHUNK = 128
# A chunk is copied before it is read. So where at least this part of the chunks is seen, by at most
# so many new positions, with at most so many scores at a time, the cache is read as it is.
_SEEN_PART, _FEW, _SCORES = 1 / 4, 8, 1 << 24


class _Softmax(NamedTuple):
    """Of the scores so far: their maximum and sum [B, K, T, G], and the values mixed by them."""

    peak: jax.Array
    total: jax.Array
    mixed: jax.Array

    @classmethod
    def nothing(cls, query_BKTGd: jax.Array) -> "_Softmax":
        shape = query_BKTGd.shape[:-1]
        return cls(
            jnp.full(shape, jnp.finfo(jnp.float32).min),
            jnp.zeros(shape, jnp.float32),
            jnp.zeros(query_BKTGd.shape, jnp.float32),
        )

    def fold(self, scores_BKTGs, allowed, value, spec: str) -> "_Softmax":
        """With more scores, float32, of which those `allowed` count.

        Args:
          value, spec: what they mix, and how: the equation of `jnp.einsum`.
        """
        scores = jnp.where(allowed, scores_BKTGs, -jnp.inf)
        peak = jnp.maximum(self.peak, scores.max(-1))
        scale = jnp.exp(self.peak - peak)
        weights = jnp.exp(scores - peak[..., None])
        mixed = jnp.einsum(
            spec, weights.astype(value.dtype), value, preferred_element_type=jnp.float32
        )
        return _Softmax(
            peak, self.total * scale + weights.sum(-1), self.mixed * scale[..., None] + mixed
        )


def cached(
    query_BTHd: jax.Array,
    key_BTKd: jax.Array,
    value_BTKd: jax.Array,
    visibility: Visibility,
    past: base.Rows,
    past_length_B: jax.Array,
    scoring: Scoring = USUAL,
) -> jax.Array:
    """New positions see the filled cache, and each other by `visibility`; see `layers.attend`."""
    query, length, window = _by_group(query_BTHd, key_BTKd), query_BTHd.shape[1], visibility.window
    # The new positions go first: each sees itself, so the running maximum is finite from here on.
    softmax = _Softmax.nothing(query).fold(
        _scores("bktgd,bskd->bktgs", query, key_BTKd, scoring),
        visibility.mask(length)[:, :, :, None],
        value_BTKd,
        "bktgs,bskd->bktgd",
    )
    length_BT = jnp.broadcast_to(past_length_B[:, None], query_BTHd.shape[:2])
    first_BT = jnp.zeros_like(length_BT)
    if window is not None:
        first_BT = jnp.maximum(length_BT + jnp.arange(length)[None] - (window - 1), 0)
    softmax = _with_past(softmax, query, past, first_BT, length_BT, scoring)
    return _finished(softmax, query_BTHd)


def chained(
    query_BTHd: jax.Array,
    key_BTKd: jax.Array,
    value_BTKd: jax.Array,
    chain: base.Chain,
    window: int | None = None,
    scoring: Scoring = USUAL,
) -> jax.Array:
    """New positions see the chain, each its own part of it, and itself, but not each other.

    Returns:
      [B, T, H, d] in the query's dtype; scores and sums are float32.
    """
    query = _by_group(query_BTHd, key_BTKd)
    own = jnp.ones((*chain.counts_BTJ.shape[:2], 1), bool)
    counts_BTJ = jnp.concatenate([chain.counts_BTJ, own], axis=-1)
    behind = jnp.flip(jnp.cumsum(jnp.flip(counts_BTJ, -1), -1), -1) - 1
    first_BT = chain.first_BT
    if window is not None:
        counts_BTJ &= behind < window
        slot_BT = chain.length_BT + chain.counts_BTJ.sum(-1)
        first_BT = jnp.maximum(first_BT, slot_BT - (window - 1))
    key, value = (
        jnp.concatenate([before, new[:, :, None]], axis=2)
        for before, new in zip(chain.drafted, (key_BTKd, value_BTKd), strict=True)
    )
    softmax = _Softmax.nothing(query).fold(
        _scores("bktgd,btjkd->bktgj", query, key, scoring),
        counts_BTJ[:, None, :, None],
        value,
        "bktgj,btjkd->bktgd",
    )

    if not chain.learns:
        softmax = _with_past(softmax, query, chain.past, first_BT, chain.length_BT, scoring)
        return _finished(softmax, query_BTHd)

    def fold(found, i):
        found = _with_chunk(found, query, chain.past, first_BT, chain.length_BT, i, scoring)
        return found, None

    # A loop of known length, whose chunks the backward pass makes anew.
    chunks = jnp.arange(chain.past[0].shape[2] // CACHE_CHUNK)
    softmax, _ = jax.lax.scan(jax.checkpoint(fold), softmax, chunks)
    return _finished(softmax, query_BTHd)


def _by_group(query_BTHd, key_BTKd) -> jax.Array:
    """[B, K, T, G, d]: the queries that share a key/value head stand together."""
    batch, length, heads, width = query_BTHd.shape
    kv_heads = key_BTKd.shape[2]
    query = query_BTHd.reshape(batch, length, kv_heads, heads // kv_heads, width)
    return query.transpose(0, 2, 1, 3, 4)


def _scores(spec: str, query, key, scoring: Scoring) -> jax.Array:
    """Queries and keys in whatever order `spec` says; both have the head width last."""
    products = jnp.einsum(spec, query, key, preferred_element_type=jnp.float32)
    # Not the query is scaled: in half precision it would be rounded once more.
    return scoring(products, query.shape[-1])


def _with_past(
    softmax: _Softmax, query, past: base.Rows, first_BT, length_BT, scoring: Scoring
) -> _Softmax:
    """With the cache, in which each position sees slots from its first to its length."""
    # The least of a batch, of what any position sees.
    first, last = first_BT.min() // CACHE_CHUNK, -(-length_BT.max() // CACHE_CHUNK)

    def by_chunk(softmax):
        return jax.lax.fori_loop(
            first,
            last,
            lambda i, found: _with_chunk(found, query, past, first_BT, length_BT, i, scoring),
            softmax,
        )

    batch, kv_heads, length, group, _ = query.shape
    slots = past[0].shape[2]
    if length > _FEW or batch * kv_heads * length * group * slots > _SCORES:
        return by_chunk(softmax)
    return jax.lax.cond(
        last - first >= _SEEN_PART * (slots // CACHE_CHUNK),
        lambda softmax: _with_all(softmax, query, past, first_BT, length_BT, scoring),
        by_chunk,
        softmax,
    )


def _with_all(
    softmax: _Softmax, query, past: base.Rows, first_BT, length_BT, scoring: Scoring
) -> _Softmax:
    key, value = past
    slots = jnp.arange(key.shape[2])[None, None]
    seen = (slots >= first_BT[:, :, None]) & (slots < length_BT[:, :, None])
    # The keys come first and the scores are turned afterwards, behind a barrier: else XLA turns the
    # keys on a CPU, which takes ten times as long as what it is for.
    scores = jax.lax.optimization_barrier(_scores("bksd,bktgd->bkstg", key, query, scoring))
    scores = jnp.moveaxis(scores, 2, -1)
    return softmax.fold(scores, seen[:, None, :, None], value, "bktgs,bksd->bktgd")


def _with_chunk(
    softmax: _Softmax, query, past: base.Rows, first_BT, length_BT, i, scoring: Scoring
) -> _Softmax:
    """With chunk i of the cache, in which each position sees slots from its first to its length."""
    start = i * CACHE_CHUNK
    key, value = (jax.lax.dynamic_slice_in_dim(x, start, CACHE_CHUNK, axis=2) for x in past)
    slots = (start + jnp.arange(CACHE_CHUNK))[None, None]
    seen = (slots >= first_BT[:, :, None]) & (slots < length_BT[:, :, None])
    return softmax.fold(
        _scores("bktgd,bksd->bktgs", query, key, scoring),
        seen[:, None, :, None],
        value,
        "bktgs,bksd->bktgd",
    )


def _finished(softmax: _Softmax, query_BTHd) -> jax.Array:
    out = (softmax.mixed / softmax.total[..., None]).astype(query_BTHd.dtype)
    return out.transpose(0, 2, 1, 3, 4).reshape(query_BTHd.shape)
