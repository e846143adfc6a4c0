import dataclasses
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from conftest import TINY
from early_exit.backbones import base
from early_exit.backbones.cached_attention import CACHE_CHUNK

TOKENS = np.array([[7, 3, 52, 11, 29, 0, 60, 3], [1, 2, 3, 4, 5, 6, 7, 8]], np.int32)
DOCUMENTS = np.array([[1, 1, 1, 2, 2, 2, 3, 0], [1] * 8], np.int32)
DEFINITION, _ = base.abstract(TINY.build)


@pytest.fixture(scope="module")
def params(tiny):
    return tiny[1]["backbone"]


@jax.jit
def hidden_states(params, inputs):
    """After the stem and after every block, one block at a time: [L + 1, B, T, D]."""
    model = base.merge(DEFINITION, params)
    hidden, context = model.stem(inputs)
    states = [hidden]
    for i in range(TINY.depth):
        states.append(model.run_blocks(states[-1], i, i + 1, context))
    return jnp.stack(states)


@jax.jit
def logits_of(params, tokens):
    model = base.merge(DEFINITION, params)
    hidden, context = model.stem({"tokens": tokens})
    return model.readout(model.run_blocks(hidden, 0, TINY.depth, context))


@pytest.mark.parametrize("edges", [(0, 6), (0, 2, 4, 6), (0, 1, 5, 6), (0, 3, 3, 6)])
def test_composed_segments_are_the_full_forward_pass(params, edges):
    inputs = {"tokens": TOKENS, "documents": DOCUMENTS}
    states = hidden_states(params, inputs)

    @jax.jit
    def in_segments(params):
        model = base.merge(DEFINITION, params)
        hidden, context = model.stem(inputs)
        seen = []
        for start, stop in itertools.pairwise(edges):
            hidden = model.run_blocks(hidden, start, stop, context)
            seen.append(hidden)
        return seen

    for stop, hidden in zip(edges[1:], in_segments(params), strict=True):
        np.testing.assert_allclose(hidden, states[stop], atol=1e-5)


def influence(params, inputs, row):
    """[T, T]: whether the final hidden state at t depends on the embedding at t'."""

    @jax.jit
    def slopes(params):
        model = base.merge(DEFINITION, params)
        hidden, context = model.stem(inputs)

        def sums(hidden):
            return model.run_blocks(hidden, 0, TINY.depth, context)[row].sum(-1)

        return jax.jacobian(sums)(hidden)

    found = np.asarray(slopes(params))  # [T, B, T, D]
    assert not found[:, 1 - row].any(), "rows of a batch must not see each other"
    return np.abs(found[:, row]).sum(-1) > 0


def test_no_position_sees_a_later_one(params):
    np.testing.assert_array_equal(influence(params, {"tokens": TOKENS}, 0), np.tri(8))


def test_no_position_sees_another_segment(params):
    got = influence(params, {"tokens": TOKENS, "documents": DOCUMENTS}, 0)
    same = DOCUMENTS[0][:, None] == DOCUMENTS[0][None]
    np.testing.assert_array_equal(got, np.tri(8) * same)


def test_a_packed_segment_is_the_text_alone(params):
    """With positions that count from 0 in each document, as the data pipeline gives them."""
    positions = np.array([[0, 1, 2, 0, 1, 2, 0, 0], range(8)], np.int32)
    packed = hidden_states(
        params, {"tokens": TOKENS, "documents": DOCUMENTS, "positions": positions}
    )
    alone = hidden_states(params, {"tokens": TOKENS[:1, 3:6]})
    np.testing.assert_allclose(packed[:, :1, 3:6], alone, atol=1e-5)


def test_positions_matter_only_by_distance(params):
    shifted = {"tokens": TOKENS, "positions": np.arange(40, 48)[None].repeat(2, 0)}
    stretched = {"tokens": TOKENS, "positions": np.arange(0, 16, 2)[None].repeat(2, 0)}
    plain = hidden_states(params, {"tokens": TOKENS})
    np.testing.assert_allclose(hidden_states(params, shifted), plain, atol=1e-4)
    assert not np.allclose(hidden_states(params, stretched), plain, atol=1e-2)


def test_a_block_with_a_cache_goes_on_where_it_stopped(params):
    """Rows of different lengths, several new positions, keys and values by both calls."""
    states = hidden_states(params, {"tokens": TOKENS})

    @jax.jit
    def cached(params, hidden):
        model = base.merge(DEFINITION, params)
        _, context = model.stem({"tokens": TOKENS})
        block = model.blocks["2"]
        _, rows = block(hidden, context)
        lengths = jnp.array([3, 5])
        cache = tuple(
            jnp.pad(x.swapaxes(1, 2), ((0, 0), (0, 0), (0, CACHE_CHUNK - 8), (0, 0))) for x in rows
        )
        # Beyond its length a row's cache holds what must not be looked at: the later positions.
        new = lengths[:, None] + jnp.arange(3)[None]
        _, new_context = model.stem(
            {"tokens": jnp.take_along_axis(jnp.asarray(TOKENS), new, axis=1), "positions": new}
        )
        new_hidden = jnp.take_along_axis(hidden, new[..., None], axis=1)
        out, new_rows = block(new_hidden, new_context, cache, lengths)
        return new, rows, out, new_rows, block.keys_values(new_hidden, new_context)

    new, rows, out, new_rows, only_rows = cached(params, states[2])

    def pick(x):
        """Of what all positions have, that of the new ones."""
        return np.take_along_axis(
            np.asarray(x), np.asarray(new).reshape(2, 3, *[1] * (x.ndim - 2)), axis=1
        )

    np.testing.assert_allclose(out, pick(states[3]), atol=1e-5)
    for a, b, c in zip(rows, new_rows, only_rows, strict=True):
        np.testing.assert_allclose(b, pick(a), atol=1e-5)
        np.testing.assert_allclose(c, b, atol=1e-6)


def test_the_readout_is_the_norm_and_the_output_matrix(params):
    got = logits_of(params, TOKENS)
    hidden = np.asarray(hidden_states(params, {"tokens": TOKENS})[-1], np.float64)
    normed = hidden / np.sqrt((hidden**2).mean(-1, keepdims=True) + TINY.norm_eps)
    normed = normed * np.asarray(params["final_norm"]["scale"], np.float64)
    want = normed @ np.asarray(params["embedding"]["embedding"], np.float64).T
    np.testing.assert_allclose(got, want, atol=1e-3, rtol=1e-5)


def test_only_untied_models_have_an_output_matrix():
    _, tied = base.abstract(TINY.build)
    _, untied = base.abstract(dataclasses.replace(TINY, tied=False).build)
    assert untied.pop("output")["embedding"].shape == (TINY.vocab_size, TINY.width)
    assert jax.tree.structure(untied) == jax.tree.structure(tied)


def test_half_precision_weights_give_float32_logits(params):
    half = jax.tree.map(lambda x: x.astype(jnp.bfloat16), params)
    got = logits_of(half, TOKENS)
    assert got.dtype == jnp.float32 and jnp.isfinite(got).all()


def test_split_and_merge_are_inverse(params):
    definition, again = base.split(base.merge(DEFINITION, params))
    assert definition == DEFINITION and hash(definition) == hash(DEFINITION)
    assert jax.tree.structure(again) == jax.tree.structure(params)
    for a, b in zip(jax.tree.leaves(again), jax.tree.leaves(params), strict=True):
        assert a is b


def test_parameters_are_all_there_is():
    """No stored RNG, cache or running statistics."""
    model = nnx.eval_shape(lambda: TINY.build(nnx.Rngs(0)))
    assert {type(v) for _, v in nnx.to_flat_state(nnx.state(model))} == {nnx.Param}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"kv_heads": 3}, "heads=4 is not a multiple of kv_heads=3"),
        ({"head_dim": 5}, "an even number of dimensions, not 5"),
        ({"rotary_fraction": 0.5}, r"not 3 \(head_dim=6, fraction 0.5\)"),
        ({"rotary_fraction": 0.1}, "even number of dimensions, not 0"),
        ({"rotary_fraction": 1.5}, "rotary_fraction must lie in 0…1, not 1.5"),
        ({"norm": "batch"}, "unknown norm 'batch'; choose one of rms, layer"),
        ({"activation": "tanh"}, "unknown activation 'tanh'; choose one of silu"),
        ({"window": 0}, "window must be at least 1 position, not 0"),
        ({"full_blocks": (1,)}, r"full_blocks=\(1,\) must name blocks .* with a window"),
        ({"window": 4, "full_blocks": (6,)}, r"full_blocks=\(6,\) must name blocks from 0 to 5"),
    ],
)
def test_configs_that_make_no_decoder(changes, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(TINY, **changes)
