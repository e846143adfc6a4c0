"""Blocks in a loop over stacked parameters: the same numbers, and no copy of the stack."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from decoder_kinds import CONFIGS, random_params

from conftest import TINY, build
from early_exit import tree
from early_exit.backbones import base
from early_exit.backbones.decoder import REMAT

BATCH = {
    "tokens": jax.random.randint(jax.random.key(5), (2, 7), 0, TINY.vocab_size),
    "documents": jnp.array([[1] * 7, [1] * 3 + [2] * 4]),
}

# Few blocks: each is compiled on its own where they are apart.
DEPTH, EDGES = 4, (0, 2, 3, 4)


@functools.partial(jax.jit, static_argnames=("config", "edges", "training"))
def states(params, *, config, edges, training=False):
    """Hidden states at the edges of segments."""
    definition, _ = base.abstract(config.build)
    network = base.merge(definition, params)
    hidden, context = network.stem(BATCH)
    found = []
    for start, stop in zip(edges[:-1], edges[1:], strict=True):
        if training:
            hidden, moments = network.run_blocks_training(hidden, start, stop, context)
            assert moments == {}
        else:
            hidden = network.run_blocks(hidden, start, stop, context)
        found.append(hidden)
    return found


@functools.partial(jax.jit, static_argnames=("config", "training"))
def gradient(params, *, config, training):
    def loss(params):
        found = states(params, config=config, edges=EDGES, training=training)
        return sum((x**2).mean() for x in found)

    return jax.grad(loss)(params)


def close(got, want, scale=1e-5):
    for path, leaf in tree.flatten(want).items():
        limit = scale * max(np.abs(leaf).max(), 1e-3)
        np.testing.assert_allclose(tree.flatten(got)[path], leaf, atol=limit, err_msg=path)


@pytest.fixture(scope="module")
def twins():
    """(config, parameters) apart, and stacked."""
    config = dataclasses.replace(
        TINY, depth=DEPTH, window=3, qk_norm=True, qkv_bias=True, norm="layer"
    )
    _, params = build(config, points=(2,))
    looped = dataclasses.replace(config, scan=True)
    return (config, params["backbone"]), (looped, base.stack_blocks(params["backbone"]))


def test_stacking_is_undone_and_is_what_the_looped_network_has(twins):
    (_, apart), (looped, stacked) = twins
    _, abstract = base.abstract(looped.build)
    assert tree.shapes(stacked) == tree.shapes(abstract)
    again = base.unstack_blocks(stacked)
    assert tree.fingerprint(again) == tree.fingerprint(apart)


@pytest.mark.parametrize("training", [False, True])
def test_segments_of_the_loop_are_segments_of_the_blocks(twins, training):
    (config, apart), (looped, stacked) = twins
    want = states(apart, config=config, edges=EDGES)
    got = states(stacked, config=looped, edges=EDGES, training=training)
    for a, b in zip(got, want, strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5 * np.abs(b).max())


def test_gradients_agree_whatever_is_kept_for_them(twins):
    (config, apart), (looped, stacked) = twins
    want = gradient(apart, config=config, training=False)
    assert all(np.abs(leaf).max() > 0 for leaf in jax.tree.leaves(want["blocks"]))
    found = [gradient(stacked, config=looped, training=False)]
    for remat in REMAT:
        network = dataclasses.replace(looped, remat=remat)
        found.append(gradient(stacked, config=network, training=True))
    for stack in found:
        close(base.unstack_blocks(stack), want)
    apart_again = dataclasses.replace(config, remat="block")
    close(gradient(apart, config=apart_again, training=True), want)


@pytest.mark.parametrize("kind", ["olmo2", "granite", "phi3", "mixtral"])
def test_newer_kinds_whose_blocks_are_alike_are_one_stack(kind):
    config = CONFIGS[kind]
    apart = random_params(config)
    looped, stacked = dataclasses.replace(config, scan=True), base.stack_blocks(apart)
    edges = (0, 1, config.depth)
    want = states(apart, config=config, edges=edges)
    for training in (False, True):
        got = states(stacked, config=looped, edges=edges, training=training)
        for a, b in zip(got, want, strict=True):
            np.testing.assert_allclose(a, b, atol=1e-5 * np.abs(b).max())


def deep(config, length):
    """The config, shapes of its parameters, and tokens."""
    _, params = base.abstract(config.build)
    return params, {"tokens": jax.ShapeDtypeStruct((1, length), jnp.int32)}


def temporaries(function, *args):
    return jax.jit(function).lower(*args).compile().memory_analysis().temp_size_in_bytes


@pytest.mark.production
def test_the_stack_is_not_copied():
    """Temporary memory of a frozen pass is of a block's order, not of all blocks'."""
    config = dataclasses.replace(TINY, width=64, mlp_width=256, depth=32, scan=True)
    definition, _ = base.abstract(config.build)

    def forward(params, inputs):
        network = base.merge(definition, params)
        hidden, context = network.stem(inputs)
        for start in range(0, 32, 8):
            hidden = network.run_blocks(hidden, start, start + 8, context)
        return hidden

    params, inputs = deep(config, 4)
    block = tree.size_in_bytes(params["blocks"]) // 32
    assert temporaries(forward, params, inputs) < 4 * block


@pytest.mark.production
def test_keeping_less_for_the_backward_pass_takes_less_memory():
    config = dataclasses.replace(TINY, depth=16, scan=True)

    def used(remat):
        network = dataclasses.replace(config, remat=remat)
        definition, _ = base.abstract(network.build)

        def loss(params, inputs):
            bound = base.merge(definition, params)
            hidden, context = bound.stem(inputs)
            return bound.run_blocks_training(hidden, 0, 16, context)[0].sum()

        return temporaries(jax.grad(loss), *deep(network, 256))

    everything, some, inputs_only = map(used, ("none", "attention", "block"))
    assert inputs_only < some < everything


def test_refusals():
    with pytest.raises(ValueError, match="unknown remat 'all'; choose one of none, attention"):
        dataclasses.replace(TINY, remat="all")
    with pytest.raises(ValueError, match="cannot be one stack; use scan=False"):
        dataclasses.replace(TINY, window=3, full_blocks=(1,), scan=True)
