"""What must hold for every kind of decoder: cached decoding, and what a position sees."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from decoder_kinds import CONFIGS, LLAMA, random_params

from early_exit.backbones import base, rotary
from early_exit.backbones.cached_attention import CACHE_CHUNK

TOTAL, STEP, SLOTS = 160, 16, 2 * CACHE_CHUNK


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


@pytest.mark.parametrize("kind", ["granite", "gemma2"])
def test_features_and_the_rule_for_logits_are_the_readout(kind):
    """And the rule matters: products alone are other logits."""
    config = CONFIGS[kind]
    model = base.merge(base.abstract(config.build)[0], random_params(config))
    hidden = jnp.asarray(np.random.default_rng(5).normal(size=(2, 24)), jnp.float32)
    products = np.asarray(model.features(hidden), np.float64) @ np.asarray(model.output_table()).T
    want = products / config.logit_divisor
    if config.logit_cap:
        want = config.logit_cap * np.tanh(want / config.logit_cap)
    got = model.readout(hidden)
    np.testing.assert_allclose(got, want, atol=1e-4)
    assert np.abs(got - products).max() > 0.2


def test_blocks_turn_by_their_own_frequencies_or_not_at_all():
    """Keys of the same hidden states, which nothing else sets apart."""
    config = dataclasses.replace(CONFIGS["gemma3"], unturned_blocks=(1,), full_blocks=(1, 2))
    model = base.merge(base.abstract(config.build)[0], random_params(config))
    hidden, context = model.stem({"tokens": np.arange(8, dtype=np.int32)[None]})
    attention, by_place = model.blocks["0"].attention, []
    for block in range(3):
        attention.place = config.place(block)
        by_place.append(np.asarray(attention.keys_values(hidden, context)[0]))
    # At position 0 nothing is turned.
    for other in by_place[1:]:
        np.testing.assert_allclose(other[:, 0], by_place[0][:, 0], atol=1e-6)
        assert np.abs(other[:, 1:] - by_place[0][:, 1:]).max() > 0.1
    assert np.abs(by_place[1][:, 1:] - by_place[2][:, 1:]).max() > 0.1


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"norms": "around"}, "unknown norms 'around'; choose one of before, after, both"),
        ({"attention_cap": 0.0}, "attention_cap must be positive, not 0.0"),
        ({"logit_divisor": -1.0}, "logit_divisor must be positive, not -1.0"),
        ({"unturned_blocks": (3,)}, r"unturned_blocks=\(3,\) must name blocks from 0 to 2"),
        ({"unturned_blocks": (0,), "scan": True}, "cannot be one stack; use scan=False"),
        ({"unturned_blocks": (0,), "rotary_fraction": 0.0}, "of a model with rotary positions"),
        (
            {"rope_scaling": rotary.LongRope((1.0,) * 3, 1.0, 8, (1.0,) * 2, 16)},
            "2 divisors of rotary frequencies for 3 pairs",
        ),
    ],
)
def test_what_makes_no_decoder_is_named(changes, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(LLAMA, **changes)
