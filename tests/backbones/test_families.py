"""What must hold for every kind of decoder: cached decoding, and what a position sees."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from early_exit.backbones import base, rotary
from early_exit.backbones.cached_attention import CACHE_CHUNK
from early_exit.backbones.decoder import DecoderConfig

LLAMA = DecoderConfig(
    vocab_size=61,
    width=24,
    depth=3,
    heads=4,
    kv_heads=2,
    head_dim=6,
    mlp_width=40,
    context_length=512,
)
BIASES = dict(qkv_bias=True, attention_output_bias=True, mlp_bias=True)
PLAIN = dict(norm="layer", gated=False, kv_heads=4, **BIASES)
KINDS = {
    "llama": {},
    "llama3": dict(rope_scaling=rotary.Llama3(4.0, 64, 1.0, 4.0), **BIASES),
    "mistral": dict(window=20),
    "qwen2": dict(
        qkv_bias=True, window=140, full_blocks=(0,), rope_scaling=rotary.Yarn(4.0, 64, 1.1)
    ),
    "qwen3": dict(qk_norm=True, tied=False),
    "gpt2": dict(rotary_fraction=0.0, activation="gelu_tanh", context_length=165, **PLAIN),
    "neox": dict(parallel=True, rotary_fraction=1 / 3, activation="gelu", tied=False, **PLAIN),
}
CONFIGS = {name: dataclasses.replace(LLAMA, **changes) for name, changes in KINDS.items()}
TOTAL, STEP, SLOTS = 160, 16, 2 * CACHE_CHUNK


def random_params(config):
    """Every part matters: scales away from 1, biases away from 0, predictions that differ."""
    _, params = base.split(config.build(nnx.Rngs(0)))
    rng = np.random.default_rng(1)

    def spread(path, leaf):
        name = path[-1].key
        if name in ("scale", "bias"):
            return jnp.asarray(rng.uniform(0.5, 1.5, leaf.shape) - (name == "bias"), leaf.dtype)
        return leaf * 8

    return jax.tree_util.tree_map_with_path(spread, params)


@pytest.fixture(scope="module", params=CONFIGS)
def case(request):
    """(config, graph definition, parameters)."""
    config = CONFIGS[request.param]
    definition, _ = base.abstract(config.build)
    return config, definition, random_params(config)


def forward(definition, params, inputs):
    model = base.merge(definition, params)
    hidden, context = model.stem(inputs)
    return model.run_blocks(hidden, 0, model.config.depth, context)


def test_decoding_in_ragged_pieces_equals_the_full_forward_pass(case):
    """Rows advance by different numbers of positions; what they run beyond is overwritten.

    Of the positions run beyond the end, some lie outside GPT-2's learned ones.
    """
    config, definition, params = case
    rng = np.random.default_rng(2)
    tokens = rng.integers(0, config.vocab_size, (2, TOTAL), np.int32)
    padded = np.pad(tokens, ((0, 0), (0, STEP)))
    want = jax.jit(lambda p, t: forward(definition, p, {"tokens": t}))(params, tokens)

    @jax.jit
    def step(params, cache, tokens, length_B):
        """(hidden states of the new positions, the cache with their keys and values, how far
        `keys_values` is from these)."""
        model = base.merge(definition, params)
        positions = length_B[:, None] + jnp.arange(STEP)[None]
        hidden, context = model.stem({"tokens": tokens, "positions": positions})
        batch = jnp.arange(2)[:, None, None]
        heads = jnp.arange(config.kv_heads)[None, :, None]
        new_cache, apart = [], 0.0
        for i, past in enumerate(cache):
            block = model.blocks[str(i)]
            only_rows = block.keys_values(hidden, context)
            hidden, rows = block(hidden, context, past, length_B)
            for ours, only in zip(rows, only_rows, strict=True):
                apart = jnp.maximum(apart, jnp.abs(ours - only).max())
            new_cache.append(
                tuple(
                    slots.at[batch, heads, positions[:, None, :]].set(new.swapaxes(1, 2))
                    for slots, new in zip(past, rows, strict=True)
                )
            )
        return hidden, new_cache, apart

    shape = (2, config.kv_heads, SLOTS, config.head_dim)
    cache = [(jnp.zeros(shape), jnp.zeros(shape)) for _ in range(config.depth)]
    length = np.zeros(2, np.int32)
    steps = 0
    while length.min() < TOTAL:
        taken = np.minimum(np.array([STEP, rng.integers(STEP // 2, STEP + 1)]), TOTAL - length)
        new = np.take_along_axis(padded, length[:, None] + np.arange(STEP)[None], axis=1)
        hidden, cache, apart = step(params, cache, new, length)
        assert apart < 1e-5
        for row in range(2):
            here = slice(length[row], length[row] + taken[row])
            np.testing.assert_allclose(
                hidden[row, : taken[row]], want[row, here], atol=1e-4, err_msg=f"{row} {here}"
            )
        length += taken
        steps += 1
    assert steps > TOTAL // STEP, "the rows must not be equally long all the time"


def test_packed_texts_are_the_texts_alone(case):
    config, definition, params = case
    rng = np.random.default_rng(3)
    lengths = (31, 44)
    texts = [rng.integers(0, config.vocab_size, (1, n), np.int32) for n in lengths]
    inputs = {
        "tokens": np.concatenate(texts, axis=1),
        "documents": np.repeat([1, 2], lengths)[None].astype(np.int32),
        "positions": np.concatenate([np.arange(n) for n in lengths])[None].astype(np.int32),
    }
    run = jax.jit(lambda p, x: forward(definition, p, x))
    packed = run(params, inputs)
    start = 0
    for text in texts:
        stop = start + text.shape[1]
        alone = run(params, {"tokens": text})
        np.testing.assert_allclose(packed[:, start:stop], alone, atol=1e-4)
        start = stop


@pytest.mark.parametrize(
    ("full_blocks", "reach"), [((), 3 * 4), ((1,), 24), ((0, 1, 2), 24)], ids=str
)
def test_a_window_bounds_what_a_position_sees(full_blocks, reach):
    """Through three blocks with a window of 5, a position is moved by the 3 · 4 before it."""
    config = dataclasses.replace(LLAMA, window=5, full_blocks=full_blocks)
    definition, _ = base.abstract(config.build)
    params = random_params(config)
    tokens = np.random.default_rng(4).integers(0, 61, (1, 24), np.int32)

    @jax.jit
    def slopes(params):
        model = base.merge(definition, params)
        hidden, context = model.stem({"tokens": tokens})

        def last(hidden):
            return model.run_blocks(hidden, 0, config.depth, context)[0, -1].sum()

        return jax.grad(last)(hidden)

    sees = np.abs(np.asarray(slopes(params))[0]).sum(-1) > 0
    assert sees.tolist() == [23 - t <= reach for t in range(24)]


def test_learned_positions_refuse_more_than_there_are():
    config = CONFIGS["gpt2"]
    definition, params = base.abstract(config.build)
    tokens = jax.ShapeDtypeStruct((1, 166), jnp.int32)
    with pytest.raises(ValueError, match="166 positions, but the model has learned 165"):
        jax.eval_shape(lambda p, t: forward(definition, p, {"tokens": t}), params, tokens)
