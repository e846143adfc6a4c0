"""Cached attention against float64 numpy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from early_exit.backbones import cached_attention, layers
from early_exit.backbones.scoring import USUAL, Scoring
from early_exit.backbones.visibility import Visibility

HEADS, KV_HEADS, WIDTH, SLOTS = 4, 2, 6, 256
# Of which so little is seen that it is read chunk by chunk, not at once.
MANY = 16 * cached_attention.CACHE_CHUNK
# Empty, one, either side of a chunk's edge, and full but for what is new.
LENGTHS = np.array([0, 1, 127, 128, 129, 250], np.int32)


def plain_attention(query, keys, values, mask, scale=None, cap=None):
    """Softmax attention, [T, H, d] over [S, K, d], in float64; `mask` [T, S]."""
    query, keys, values = (np.asarray(x, np.float64) for x in (query, keys, values))
    out = np.empty_like(query)
    for head in range(query.shape[1]):
        shared = head // (query.shape[1] // keys.shape[1])
        scores = query[:, head] @ keys[:, shared].T * (scale or query.shape[2] ** -0.5)
        if cap is not None:
            scores = cap * np.tanh(scores / cap)
        scores = np.where(mask, scores, -np.inf)
        weights = np.exp(scores - scores.max(-1, keepdims=True))
        out[:, head] = weights / weights.sum(-1, keepdims=True) @ values[:, shared]
    return out


def case(new, kv_heads=KV_HEADS, lengths=LENGTHS, slots=SLOTS):
    """(query, key, value) of the new positions and a cache with every slot drawn."""
    rng = np.random.default_rng(new)

    def draw(*shape):
        return jnp.asarray(rng.standard_normal(shape) * 2, jnp.float32)

    batch = len(lengths)
    rows = [draw(batch, new, heads, WIDTH) for heads in (HEADS, kv_heads, kv_heads)]
    past = draw(batch, kv_heads, slots, WIDTH), draw(batch, kv_heads, slots, WIDTH)
    return rows, past


attend = jax.jit(layers.attend, static_argnames="scoring")
BACKWARDS = Visibility(causal=True)


@pytest.mark.parametrize("slots", [SLOTS, MANY], ids=["at once", "by chunk"])
@pytest.mark.parametrize(
    ("new", "kv_heads", "window"),
    [
        (9, 2, None),
        (1, 2, None),
        (5, 2, None),
        (3, 1, None),
        (2, HEADS, None),
        (1, 2, 1),
        (5, 2, 3),
        (5, 1, 100),
        (3, 2, 128),
        (3, 2, 129),
        (3, 2, 1000),
    ],
)
@pytest.mark.parametrize("scoring", [USUAL, Scoring(0.7), Scoring(0.2, cap=1.5)], ids=str)
def test_cached_attention_equals_plain_attention(new, kv_heads, window, slots, scoring):
    (query, key, value), past = case(new, kv_heads, slots=slots)
    visibility = Visibility(causal=True, window=window)
    got = attend(query, key, value, visibility, past, jnp.asarray(LENGTHS), scoring=scoring)
    rule = scoring.scale, scoring.cap
    for b, length in enumerate(LENGTHS):
        keys, values = (
            np.concatenate([old[b, :, :length].swapaxes(0, 1), rows[b]])
            for old, rows in zip(past, (key, value), strict=True)
        )
        distance = length + np.arange(new)[:, None] - np.arange(length + new)[None]
        seen = (distance >= 0) & (distance < (window or 2 * MANY))
        want = plain_attention(query[b], keys, values, seen, *rule)
        np.testing.assert_allclose(got[b], want, atol=1e-5)


def test_rows_of_a_batch_equal_rows_alone():
    (query, key, value), past = case(2)
    whole = attend(query, key, value, BACKWARDS, past, jnp.asarray(LENGTHS))
    for b in range(len(LENGTHS)):
        one = slice(b, b + 1)
        alone = attend(
            query[one],
            key[one],
            value[one],
            BACKWARDS,
            tuple(x[one] for x in past),
            jnp.asarray(LENGTHS[one]),
        )
        np.testing.assert_allclose(alone, whole[one], atol=1e-6)


def test_without_a_cache_it_is_plain_attention():
    (query, key, value), _ = case(7)
    segments = jnp.asarray(np.repeat([[1, 1, 1, 2, 2, 3, 0]], len(LENGTHS), axis=0))
    got = attend(query, key, value, Visibility(causal=True, documents=segments))
    for b in range(len(LENGTHS)):
        seen = np.tri(7, dtype=bool) & (segments[b][:, None] == segments[b][None])
        want = plain_attention(query[b], key[b], value[b], seen)
        np.testing.assert_allclose(got[b], want, atol=1e-5)


def test_an_empty_cache_changes_nothing():
    (query, key, value), past = case(5)
    empty = jnp.zeros_like(jnp.asarray(LENGTHS))
    np.testing.assert_allclose(
        attend(query, key, value, BACKWARDS, past, empty),
        attend(query, key, value, BACKWARDS),
        atol=1e-5,
    )


@pytest.mark.parametrize("garbage", [-3e38, 3e38])
def test_unfilled_slots_have_no_influence(garbage):
    """Bit for bit, whatever finite numbers they hold; caches start as zeros and stay finite."""
    (query, key, value), past = case(2)
    unfilled = (np.arange(SLOTS)[None] >= LENGTHS[:, None])[:, None, :, None]
    lengths = jnp.asarray(LENGTHS)
    want = attend(query, key, value, BACKWARDS, past, lengths)
    dirty = tuple(jnp.where(unfilled, garbage, x) for x in past)
    np.testing.assert_array_equal(attend(query, key, value, BACKWARDS, dirty, lengths), want)
    # Where little is filled, other chunks are not even read: there, NaN does no harm either.
    (query, key, value), past = case(2, slots=MANY)
    short = jnp.minimum(lengths, cached_attention.CACHE_CHUNK)
    want = attend(query, key, value, BACKWARDS, past, short)
    unread = (np.arange(MANY) >= cached_attention.CACHE_CHUNK)[None, None, :, None]
    broken = tuple(jnp.where(unread, jnp.nan, x) for x in past)
    np.testing.assert_array_equal(attend(query, key, value, BACKWARDS, broken, short), want)


def test_chunks_out_of_every_window_are_not_read():
    """Cost follows the window: what is too far back may be NaN."""
    (query, key, value), past = case(2, lengths=np.array([200, 250]), slots=MANY)
    lengths = jnp.array([200, 250])
    broken = tuple(x.at[:, :, : cached_attention.CACHE_CHUNK].set(jnp.nan) for x in past)
    for window, reaches in ((72, False), (74, True)):  # 200 − 73 = 127, the first chunk's last
        visibility = Visibility(causal=True, window=window)
        clean = attend(query, key, value, visibility, past, lengths)
        got = attend(query, key, value, visibility, broken, lengths)
        assert jnp.isnan(got).any() == reaches
        if not reaches:
            np.testing.assert_array_equal(got, clean)


def test_large_scores_do_not_overflow():
    (query, key, value), past = case(2)
    out = attend(query * 1e3, key, value, BACKWARDS, past, jnp.asarray(LENGTHS))
    assert jnp.isfinite(out).all()


@pytest.mark.parametrize("width", [32, 128])  # whose roots are no powers of two
def test_half_precision_is_as_near_with_a_cache_as_without(width):
    """All that is rounded is the weights and the result; the query is not scaled beforehand."""
    rng, filled, new = np.random.default_rng(width), 120, 8
    rows = [
        jnp.asarray(rng.standard_normal((1, filled + new, heads, width)) * 2, jnp.bfloat16)
        for heads in (4, 2, 2)
    ]
    want = np.asarray(attend(*(x.astype(jnp.float32) for x in rows), BACKWARDS))
    past = [
        jnp.pad(x[:, :filled].swapaxes(1, 2), ((0, 0), (0, 0), (0, SLOTS - filled), (0, 0)))
        for x in rows[1:]
    ]
    late = [x[:, filled:] for x in rows]
    cached = attend(*late, BACKWARDS, tuple(past), jnp.array([filled]))
    whole = attend(*rows, BACKWARDS)

    def error(got):
        return np.abs(np.asarray(got, np.float32)[:, -new:] - want[:, -new:])

    assert error(cached).mean() <= error(whole).mean()
    assert error(cached).max() <= error(whole).max()


def test_half_precision_keeps_its_dtype_and_sums_in_float32():
    (query, key, value), past = case(2)
    arrays = [x.astype(jnp.bfloat16) for x in (query, key, value, *past)]
    lengths = jnp.asarray(LENGTHS)
    got = attend(*arrays[:3], BACKWARDS, tuple(arrays[3:]), lengths)
    exact = [x.astype(jnp.float32) for x in arrays]
    want = attend(*exact[:3], BACKWARDS, tuple(exact[3:]), lengths)
    assert got.dtype == jnp.bfloat16
    # bfloat16 keeps 8 bits: of the query, the weights and the result.
    np.testing.assert_allclose(got.astype(jnp.float32), want, atol=0.05, rtol=0.02)
