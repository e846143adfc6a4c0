"""Attention in memory that grows with T, not T², forwards and backwards, on any device.

The one idea: queries and keys are cut into chunks, and a loop goes over the pairs of chunks that
can see each other. The others (ahead, or beyond the window) are never computed. The softmax is kept
up as the loop runs (Milakov & Gimelshein 2018, algorithm 3). The backward pass computes the
weights again from each query's log-sum-exp (Dao et al. 2022, FlashAttention, algorithm 4).

Shapes: n chunks of C positions, B batch, K key/value heads, G queries per key/value head, d head
width; i is a chunk of queries, j one of keys.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from early_exit.backbones.scoring import USUAL, Scoring
from early_exit.backbones.visibility import Visibility

# Positions in a chunk at most: products large enough for the matrix units, scores small enough.
CHUNK = 512
_LOWEST = float(np.finfo(np.float32).min)


def chunked(
    query_BTHd: jax.Array,
    key_BTKd: jax.Array,
    value_BTKd: jax.Array,
    visibility: Visibility,
    scoring: Scoring = USUAL,
) -> jax.Array:
    """Softmax attention, [B, T, H, d] in the query's dtype; scores and sums are float32.

    A query that sees nothing gets zeros.
    """
    batch, length, heads, width = query_BTHd.shape
    kv_heads = key_BTKd.shape[2]
    count = -(-length // CHUNK)
    size = -(-length // count)

    def cut(x):
        """[B, T, K, …, d] → [n, B, K, …, C, d]."""
        x = jnp.pad(x, [(0, 0), (0, count * size - length)] + [(0, 0)] * (x.ndim - 2))
        x = x.reshape(batch, count, size, *x.shape[2:])
        return jnp.moveaxis(jnp.moveaxis(x, 1, 0), 2, -2)

    query = cut(query_BTHd.reshape(batch, length, kv_heads, heads // kv_heads, width))
    visibility = visibility.padded(length, count * size)
    mixed = _attention(scoring, query, cut(key_BTKd), cut(value_BTKd), visibility)
    mixed = mixed.transpose(1, 0, 4, 2, 3, 5).reshape(batch, count * size, heads, width)
    return mixed[:, :length]


def visible_pairs(visibility: Visibility, count: int, size: int) -> tuple[np.ndarray, np.ndarray]:
    """(chunks of queries, chunks of keys), int32: the pairs in which somebody may see somebody."""
    pairs = []
    for i in range(count):
        first, last = 0, i if visibility.causal else count - 1
        if visibility.window is not None:
            reach = visibility.window - 1
            first = max(0, i * size - reach) // size
            last = min(last, (i * size + size - 1 + reach) // size)
        pairs += [(i, j) for j in range(first, last + 1)]
    return tuple(np.array(pairs, np.int32).T)


def _loop(body, carry, visibility: Visibility, query):
    """`body(carry, pair)` over all visible pairs of the chunks of queries."""
    pairs = visible_pairs(visibility, len(query), query.shape[-2])
    # In a loop over blocks, what depends on the pairs alone would be computed once, in front of it,
    # and kept for all pairs: T × T truths. So it is made to depend on the queries, too.
    pairs, _ = jax.lax.optimization_barrier((pairs, query))
    return jax.lax.scan(lambda carry, pair: (body(carry, pair), None), carry, pairs)[0]


def _at(tree, chunk):
    return jax.tree.map(lambda x: jax.lax.dynamic_index_in_dim(x, chunk, 0, keepdims=False), tree)


def _put(tree, new, chunk):
    return jax.tree.map(lambda x, y: jax.lax.dynamic_update_index_in_dim(x, y, chunk, 0), tree, new)


def _product(spec: str, x: jax.Array, y: jax.Array) -> jax.Array:
    """In the type of the second, summed in float32."""
    return jnp.einsum(spec, x.astype(y.dtype), y, preferred_element_type=jnp.float32)


def _scores(scoring: Scoring, query, key, visibility, i, j) -> tuple[jax.Array, jax.Array]:
    """(float32 scores [B, K, G, C, C] of two chunks, which of them count)."""
    size, width = query.shape[-2:]
    scores = scoring(_product("bkgqd,bksd->bkgqs", query, key), width)
    return scores, visibility.between(i * size, j * size, size)[:, None, None]


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attention(scoring: Scoring, query, key, value, visibility):
    """Chunks [n, B, K, G, C, d], and [n, B, K, C, d] twice → like the queries."""
    return _forward(scoring, query, key, value, visibility)[0]


def _forward(scoring: Scoring, query, key, value, visibility):
    def fold(carry, pair):
        i, j = pair
        peak, total, mixed = _at(carry, i)
        scores, seen = _scores(scoring, _at(query, i), _at(key, j), visibility, i, j)
        new_peak = jnp.maximum(peak, jnp.where(seen, scores, _LOWEST).max(-1))
        weights = jnp.exp(jnp.where(seen, scores - new_peak[..., None], -jnp.inf))
        scale = jnp.exp(peak - new_peak)
        total = total * scale + weights.sum(-1)
        mixed = mixed * scale[..., None] + _product("bkgqs,bksd->bkgqd", weights, _at(value, j))
        return _put(carry, (new_peak, total, mixed), i)

    *shape, _ = query.shape
    carry = (
        jnp.full(shape, _LOWEST),
        jnp.zeros(shape, jnp.float32),
        jnp.zeros(query.shape, jnp.float32),
    )
    peak, total, mixed = _loop(fold, carry, visibility, query)
    total = jnp.where(total > 0, total, 1)
    out = (mixed / total[..., None]).astype(query.dtype)
    return out, (query, key, value, visibility, out, peak + jnp.log(total))


def _backward(scoring: Scoring, kept, gradient):
    query, key, value, visibility, out, log_total = kept
    # Σ_s weight · d(loss)/d(weight), without the weights: FlashAttention, eq. 4.
    drift = (gradient.astype(jnp.float32) * out.astype(jnp.float32)).sum(-1)

    def add(carry, pair):
        i, j = pair
        to_query, to_key, to_value = carry
        query_i, gradient_i, key_j, value_j = *_at((query, gradient), i), *_at((key, value), j)
        scores, seen = _scores(scoring, query_i, key_j, visibility, i, j)
        weights = jnp.exp(jnp.where(seen, scores - _at(log_total, i)[..., None], -jnp.inf))
        by_weight = _product("bkgqd,bksd->bkgqs", gradient_i, value_j)
        by_product = weights * (by_weight - _at(drift, i)[..., None])
        by_product *= scoring.slope(scores, query.shape[-1])

        def plus(total, chunk, more):
            return _put(total, _at(total, chunk) + more, chunk)

        return (
            plus(to_query, i, _product("bkgqs,bksd->bkgqd", by_product, key_j)),
            plus(to_key, j, _product("bkgqs,bkgqd->bksd", by_product, query_i)),
            plus(to_value, j, _product("bkgqs,bkgqd->bksd", weights, gradient_i)),
        )

    zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, jnp.float32), (query, key, value))
    gradients = _loop(add, zeros, visibility, query)
    found = jax.tree.map(lambda x, y: x.astype(y.dtype), gradients, (query, key, value))
    return *found, None


_attention.defvjp(_forward, _backward)
