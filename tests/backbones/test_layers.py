"""Cached attention and rotary positions against float64 numpy."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from early_exit.backbones import layers

HEADS, KV_HEADS, WIDTH, SLOTS = 4, 2, 6, 256
# Empty, one, either side of a chunk's edge, and full but for what is new.
LENGTHS = np.array([0, 1, 127, 128, 129, 250], np.int32)


def plain_attention(query, keys, values, mask):
    """Softmax attention, [T, H, d] over [S, K, d], in float64; `mask` [T, S]."""
    query, keys, values = (np.asarray(x, np.float64) for x in (query, keys, values))
    out = np.empty_like(query)
    for head in range(query.shape[1]):
        shared = head // (query.shape[1] // keys.shape[1])
        scores = query[:, head] @ keys[:, shared].T / np.sqrt(query.shape[2])
        scores = np.where(mask, scores, -np.inf)
        weights = np.exp(scores - scores.max(-1, keepdims=True))
        out[:, head] = weights / weights.sum(-1, keepdims=True) @ values[:, shared]
    return out


def case(new, kv_heads=KV_HEADS, lengths=LENGTHS):
    """(query, key, value) of the new positions and a cache with every slot drawn."""
    rng = np.random.default_rng(new)

    def draw(*shape):
        return jnp.asarray(rng.standard_normal(shape) * 2, jnp.float32)

    batch = len(lengths)
    rows = [draw(batch, new, heads, WIDTH) for heads in (HEADS, kv_heads, kv_heads)]
    past = draw(batch, kv_heads, SLOTS, WIDTH), draw(batch, kv_heads, SLOTS, WIDTH)
    return rows, past


attend = jax.jit(layers.attend)


@pytest.mark.parametrize(("new", "kv_heads"), [(1, 2), (5, 2), (3, 1), (2, HEADS)])
def test_cached_attention_equals_plain_attention(new, kv_heads):
    (query, key, value), past = case(new, kv_heads)
    mask = layers.causal_mask(None, new)
    got = attend(query, key, value, mask, past, jnp.asarray(LENGTHS))
    for b, length in enumerate(LENGTHS):
        keys, values = (
            np.concatenate([old[b, :, :length].swapaxes(0, 1), rows[b]])
            for old, rows in zip(past, (key, value), strict=True)
        )
        seen = np.concatenate([np.ones((new, length), bool), mask[0, 0]], axis=1)
        np.testing.assert_allclose(got[b], plain_attention(query[b], keys, values, seen), atol=1e-5)


def test_rows_of_a_batch_equal_rows_alone():
    (query, key, value), past = case(2)
    mask = layers.causal_mask(None, 2)
    whole = attend(query, key, value, mask, past, jnp.asarray(LENGTHS))
    for b in range(len(LENGTHS)):
        one = slice(b, b + 1)
        alone = attend(
            query[one],
            key[one],
            value[one],
            mask,
            tuple(x[one] for x in past),
            jnp.asarray(LENGTHS[one]),
        )
        np.testing.assert_allclose(alone, whole[one], atol=1e-6)


def test_without_a_cache_it_is_plain_attention():
    (query, key, value), _ = case(7)
    segments = jnp.asarray(np.repeat([[1, 1, 1, 2, 2, 3, 0]], len(LENGTHS), axis=0))
    mask = layers.causal_mask(segments, 7)
    got = attend(query, key, value, mask)
    for b in range(len(LENGTHS)):
        want = plain_attention(query[b], key[b], value[b], np.asarray(mask[b, 0]))
        np.testing.assert_allclose(got[b], want, atol=1e-5)


def test_an_empty_cache_changes_nothing():
    (query, key, value), past = case(5)
    mask = layers.causal_mask(None, 5)
    empty = jnp.zeros_like(jnp.asarray(LENGTHS))
    np.testing.assert_allclose(
        attend(query, key, value, mask, past, empty),
        attend(query, key, value, mask),
        atol=1e-5,
    )


@pytest.mark.parametrize("garbage", [-3e38, 3e38])
def test_unfilled_slots_have_no_influence(garbage):
    """Bit for bit, whatever finite numbers they hold; caches start as zeros and stay finite."""
    (query, key, value), past = case(2)
    mask = layers.causal_mask(None, 2)
    unfilled = (np.arange(SLOTS)[None] >= LENGTHS[:, None])[:, None, :, None]
    lengths = jnp.asarray(LENGTHS)
    want = attend(query, key, value, mask, past, lengths)
    dirty = tuple(jnp.where(unfilled, garbage, x) for x in past)
    np.testing.assert_array_equal(attend(query, key, value, mask, dirty, lengths), want)
    # Chunks that no row has reached are not even read: there, NaN does no harm either.
    short = jnp.minimum(lengths, layers.CACHE_CHUNK)
    want = attend(query, key, value, mask, past, short)
    unread = (np.arange(SLOTS) >= layers.CACHE_CHUNK)[None, None, :, None]
    broken = tuple(jnp.where(unread, jnp.nan, x) for x in past)
    np.testing.assert_array_equal(attend(query, key, value, mask, broken, short), want)


def test_large_scores_do_not_overflow():
    (query, key, value), past = case(2)
    out = attend(query * 1e3, key, value, layers.causal_mask(None, 2), past, jnp.asarray(LENGTHS))
    assert jnp.isfinite(out).all()


def test_half_precision_keeps_its_dtype_and_sums_in_float32():
    (query, key, value), past = case(2)
    arrays = [x.astype(jnp.bfloat16) for x in (query, key, value, *past)]
    mask, lengths = layers.causal_mask(None, 2), jnp.asarray(LENGTHS)
    got = attend(*arrays[:3], mask, tuple(arrays[3:]), lengths)
    exact = [x.astype(jnp.float32) for x in arrays]
    want = attend(*exact[:3], mask, tuple(exact[3:]), lengths)
    assert got.dtype == jnp.bfloat16
    # bfloat16 keeps 8 bits: of the query, the weights and the result.
    np.testing.assert_allclose(got.astype(jnp.float32), want, atol=0.05, rtol=0.02)


def test_causal_mask():
    np.testing.assert_array_equal(layers.causal_mask(None, 4)[0, 0], np.tri(4, dtype=bool))
    got = layers.causal_mask(jnp.array([[1, 1, 2, 2], [1, 2, 3, 3]]), 4)
    assert got.shape == (2, 1, 4, 4)
    assert got[0, 0].astype(int).tolist() == [
        [1, 0, 0, 0],
        [1, 1, 0, 0],
        [0, 0, 1, 0],
        [0, 0, 1, 1],
    ]
    assert got[1, 0].astype(int).tolist() == [
        [1, 0, 0, 0],
        [0, 1, 0, 0],
        [0, 0, 1, 0],
        [0, 0, 1, 1],
    ]


@functools.partial(jax.jit, static_argnames="theta")
def rotated(x, positions, theta=10_000.0):
    """x [d] at each of the positions, [P, d]."""
    angles = layers.rotary_angles(positions[None], len(x), theta)
    many = jnp.broadcast_to(x[None, None, None], (1, len(positions), 1, len(x)))
    return layers.rotate(many, angles)[0, :, 0]


def test_rotary_scores_depend_only_on_the_distance():
    query, key = np.random.default_rng(0).standard_normal((2, 16), np.float32)
    positions = np.arange(0, 100, 7)
    by_distance = []
    for distance in (0, 1, 5, 90):
        scores = (rotated(query, positions + distance) * rotated(key, positions)).sum(-1)
        np.testing.assert_allclose(scores, scores[0], atol=1e-4)
        by_distance.append(scores[0])
    assert np.std(by_distance) > 0.1, "the distance must matter"


def test_rotation_keeps_lengths_and_starts_at_the_identity():
    x = np.random.default_rng(1).standard_normal(16, np.float32)
    turned = np.asarray(rotated(x, np.array([0, 1, 1000])))
    np.testing.assert_array_equal(turned[0], x)
    np.testing.assert_allclose(np.linalg.norm(turned, axis=-1), np.linalg.norm(x), rtol=1e-5)


def test_pairs_turn_at_falling_speeds():
    """Element i of the first half turns with element i of the second, by position · θ^(−2i/d)."""
    theta, dim = 500.0, 8
    for i in range(4):
        unit = np.eye(dim, dtype=np.float32)[i]
        angle = 3 * theta ** (-2 * i / dim)
        want = np.zeros(dim)
        want[i], want[i + 4] = np.cos(angle), np.sin(angle)
        np.testing.assert_allclose(rotated(unit, np.array([3]), theta)[0], want, atol=1e-6)
