"""Encoder–decoders: what transformers computes, in one pass and in pieces against a cache."""

import dataclasses
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from early_exit.backbones import base
from early_exit.backbones.t5 import T5Config, _bucket_of
from early_exit.pretrained.load import load

FIXTURES = pathlib.Path(__file__).parents[1] / "fixtures"
SLOTS = 64


@pytest.fixture(scope="module", params=["tiny_t5", "tiny_t5_gated"])
def case(request):
    """(network, its modules' definition, what torch says)."""
    folder = FIXTURES / request.param
    found = load(str(folder))
    return found, base.described(found.config)[0], np.load(folder / "expected.npz")


def inputs(said):
    return {"tokens": said["tokens"], "prompt": said["prompt"], "prompt_real": said["mask"]}


def test_every_block_and_the_logits_are_torch_s(case):
    found, definition, said = case

    @jax.jit
    def run(params):
        network = base.merge(definition, params)
        hidden, context = network.stem(inputs(said))
        states = [hidden]
        for block in range(found.config.depth):
            states.append(network.run_blocks(states[-1], block, block + 1, context))
        at_once = network.run_blocks(hidden, 0, found.config.depth, context)
        return jnp.stack(states), at_once, network.readout(states[-1], context)

    states, at_once, logits = run(found.params)
    np.testing.assert_allclose(states, said["hidden"], atol=1e-4)
    np.testing.assert_allclose(at_once, states[-1], atol=1e-5)
    np.testing.assert_allclose(logits, said["logits"], atol=1e-4)
    assert np.abs(said["logits"]).max() > 1


def test_in_ragged_pieces_against_a_cache_it_is_the_same(case):
    """Prompts that were read once; rows advance by different numbers of positions."""
    found, definition, said = case
    tokens, total, step = said["tokens"], said["tokens"].shape[1], 4
    rows = len(tokens)
    padded = np.pad(tokens, ((0, 0), (0, step)))

    @jax.jit
    def read(params):
        return base.merge(definition, params).remember(said["prompt"], said["mask"])

    @jax.jit
    def advance(params, memory, cache, tokens, length_B):
        network = base.merge(definition, params)
        places = length_B[:, None] + jnp.arange(step)[None]
        hidden, context = network.stem({"tokens": tokens, "positions": places, "memory": memory})
        new, apart, row = [], 0.0, jnp.arange(rows)[:, None]
        for i, past in enumerate(cache):
            block = network.cached_block(i)
            alone = block.keys_values(hidden, context)
            hidden, made = block(hidden, context, past, length_B)
            apart += sum(jnp.abs(x - y).max() for x, y in zip(made, alone, strict=True))
            # In front of the heads' axis goes that of places.
            new.append(
                tuple(kept.at[row, :, places].set(x) for kept, x in zip(past, made, strict=True))
            )
        return hidden, new, apart

    memory, config = read(found.params), found.config
    shape = (rows, config.heads, SLOTS, config.head_dim)
    cache = [(jnp.zeros(shape), jnp.zeros(shape)) for _ in range(config.depth)]
    length, rng, steps = np.zeros(rows, np.int32), np.random.default_rng(0), 0
    while length.min() < total:
        taken = np.minimum(rng.integers(1, step + 1, rows), total - length)
        new = np.take_along_axis(padded, length[:, None] + np.arange(step)[None], axis=1)
        hidden, cache, apart = advance(found.params, memory, cache, new, length)
        assert apart < 1e-5
        for row in range(rows):
            want = said["hidden"][-1, row, length[row] : length[row] + taken[row]]
            np.testing.assert_allclose(hidden[row, : taken[row]], want, atol=1e-4)
        length, steps = length + taken, steps + 1
    assert steps > -(-total // step), "the rows must not be equally long all the time"


def test_padding_behind_a_prompt_changes_nothing(case):
    found, definition, said = case
    run = jax.jit(
        lambda params, x: base.merge(definition, params).run_blocks(
            *(stem := base.merge(definition, params).stem(x))[:1], 0, found.config.depth, stem[1]
        )
    )
    row = {name: x[1:2] for name, x in inputs(said).items()}
    real = int(row["prompt_real"].sum())
    alone = row | {name: row[name][:, :real] for name in ("prompt", "prompt_real")}
    other = row | {"prompt": np.where(row["prompt_real"], row["prompt"], 7)}
    want = run(found.params, alone)
    np.testing.assert_allclose(run(found.params, row), want, atol=1e-5)
    np.testing.assert_allclose(run(found.params, other), want, atol=1e-5)


def test_packed_answers_do_not_see_each_other():
    """Two answers to one prompt in a row, positions from 0 in each."""
    found = load(str(FIXTURES / "tiny_t5"))
    definition, _ = base.described(found.config)
    said = np.load(FIXTURES / "tiny_t5/expected.npz")
    prompt = {name: inputs(said)[name][:1] for name in ("prompt", "prompt_real")}
    first, second = said["tokens"][:1, :9], said["tokens"][1:2, :6]
    places = np.concatenate([np.arange(9), np.arange(6)])[None]
    packed = {
        "tokens": np.concatenate([first, second], axis=1),
        "documents": np.repeat([1, 2], [9, 6])[None],
        "positions": places,
        **prompt,
    }

    @jax.jit
    def run(params, x):
        network = base.merge(definition, params)
        hidden, context = network.stem(x)
        return network.run_blocks(hidden, 0, found.config.depth, context)

    got = run(found.params, packed)
    for tokens, part in ((first, slice(0, 9)), (second, slice(9, 15))):
        want = run(found.params, {"tokens": tokens, **prompt})
        np.testing.assert_allclose(got[:, part], want, atol=1e-5)


def test_distances_share_rows_as_they_grow():
    """T5's own, each way: exact ones first, then a logarithm, the last row for all beyond."""
    rows = _bucket_of(32, 128)
    assert rows[:16].tolist() == list(range(16))
    assert (np.diff(rows) >= 0).all() and rows[-1] == 31
    assert rows[[16, 20, 50, 127]].tolist() == [16, 17, 24, 31]


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"activation": "tanh"}, "unknown activation 'tanh'"),
        ({"buckets": 30}, "buckets=30 must be a multiple of 4"),
        ({"max_distance": 16}, "less than twice max_distance=16"),
        ({"start_id": 61}, "start_id=61 is no token of 61"),
    ],
)
def test_sizes_that_make_no_network_are_refused(wrong, said):
    right = T5Config(61, 24, depth=2, encoder_depth=2, heads=2, head_dim=4, mlp_width=8)
    with pytest.raises(ValueError, match=said):
        dataclasses.replace(right, **wrong)
