"""Rotary positions by their properties; transformers' own numbers are in the fixtures' tests."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from early_exit.backbones import rotary

LLAMA3 = rotary.Llama3(8.0, 8192, 1.0, 4.0)
YARN = rotary.Yarn(4.0, 32768, 1.2)


@functools.partial(jax.jit, static_argnames=("theta", "dim", "scaling"))
def rotated(x, positions, theta=10_000.0, dim=None, scaling=None):
    """x [d] at each of the positions, [P, d]."""
    turns = rotary.rotation(positions[None], dim or len(x), theta, scaling)
    many = jnp.broadcast_to(x[None, None, None], (1, len(positions), 1, len(x)))
    return rotary.rotate(many, turns)[0, :, 0]


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


def test_only_the_first_part_of_a_head_is_turned():
    x = np.random.default_rng(2).standard_normal(16, np.float32)
    positions = np.array([0, 5, 900])
    turned = rotated(x, positions, dim=6)
    np.testing.assert_array_equal(turned[:, 6:], np.broadcast_to(x[6:], (3, 10)))
    np.testing.assert_array_equal(turned[:, :6], rotated(x[:6], positions))


def test_linear_scaling_is_a_division_of_the_position():
    x = np.random.default_rng(3).standard_normal(16, np.float32)
    positions = np.arange(0, 40, 4)
    scaled = rotated(x, positions, scaling=rotary.Linear(4.0))
    np.testing.assert_allclose(scaled, rotated(x, positions // 4), atol=1e-5)


@pytest.mark.parametrize("scaling", [LLAMA3, YARN], ids=["llama3", "yarn"])
def test_fast_pairs_are_kept_and_slow_ones_interpolated(scaling):
    plain = rotary.frequencies(128, 500_000.0)
    ratio = rotary.frequencies(128, 500_000.0, scaling) / plain
    turns = scaling.original_context * plain / (2 * np.pi)
    fast, slow = (4, 1) if scaling is LLAMA3 else (32, 1)
    # Yarn rounds the two edges outwards to whole pairs: leave the neighbours of the edges out.
    np.testing.assert_allclose(ratio[turns > fast * 1.3], 1, rtol=1e-6)
    np.testing.assert_allclose(ratio[turns < slow / 1.3], 1 / scaling.factor, rtol=1e-6)
    between = ratio[(turns < fast / 1.3) & (turns > slow * 1.3)]
    assert len(between) > 3 and (np.diff(ratio) <= 1e-7).all()
    assert (between < 1).all() and (between > 1 / scaling.factor).all()


def test_yarn_sharpens_attention():
    x = np.random.default_rng(4).standard_normal(16, np.float32)
    length = np.linalg.norm(rotated(x, np.arange(50), scaling=YARN), axis=-1)
    np.testing.assert_allclose(length, 1.2 * np.linalg.norm(x), rtol=1e-5)
