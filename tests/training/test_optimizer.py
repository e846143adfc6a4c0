"""What the optimizer does to each parameter: decay by path, clipping, and the rate over time."""

import dataclasses
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from conftest import TINY, build
from early_exit import tree
from early_exit.backbones import base
from early_exit.backbones.encoder import EncoderConfig
from early_exit.backbones.image_parts import STATISTICS
from early_exit.backbones.resnet import ResNetConfig
from early_exit.exits.heads import ExitConfig
from early_exit.exits.multi_exit import MultiExit
from early_exit.settings.sections import TuneSettings
from early_exit.training.optimizer import decays, learning_rate, make_optimizer

ENCODER = EncoderConfig(
    vocab_size=40, width=16, depth=3, heads=2, mlp_width=24, context_length=16, num_classes=3
)
RESNET = ResNetConfig.cifar(8, width=4, num_classes=3, channels=1)
DECODERS = {
    "llama": TINY,
    "biases": dataclasses.replace(TINY, qkv_bias=True, mlp_bias=True, attention_output_bias=True),
    "gpt2": dataclasses.replace(
        TINY, norm="layer", gated=False, activation="gelu", rotary_fraction=0.0, mlp_bias=True
    ),
    "qwen3": dataclasses.replace(TINY, qk_norm=True),
    "olmo2": dataclasses.replace(TINY, norms="after", qk_norm=True, qk_norm_whole=True),
    "gemma": dataclasses.replace(TINY, norm="rms_offset", norms="both", qk_norm=True),
}


def whole(config, **exits):
    """The parameters of a network with exits, as shapes."""
    model = MultiExit(config, ExitConfig(points=(1, 2), **exits))
    return {"backbone": base.abstract(config.build)[1], "exits": model.abstract_exits()}


def updates_of(params, steps=3, **tune):
    """What zero gradients do to parameters in so many steps."""
    optimizer = make_optimizer(TuneSettings(learning_rate=0.1, weight_decay=0.5, **tune))
    state, zero = optimizer.init(params), jax.tree.map(jnp.zeros_like, params)
    for _ in range(steps):
        updates, state = optimizer.update(zero, state, params)
        params = optax.apply_updates(params, updates)
    return params


@pytest.mark.parametrize("config", DECODERS.values(), ids=DECODERS)
def test_the_mask_of_stacked_blocks_is_the_stack_of_their_masks(config):
    _, apart = base.split(config.build(nnx.Rngs(0)))
    mask = tree.flatten(decays(base.stack_blocks(apart)))
    for path, decayed in tree.flatten(decays(apart)).items():
        if path.startswith("blocks/"):
            _, _, name = path.split("/", 2)
            path = f"blocks/{name}"
        assert mask[path] == decayed, path


@pytest.mark.parametrize(
    ("config", "exits"),
    [
        *((config, {"head": "layer", "gate": True}) for config in DECODERS.values()),
        (dataclasses.replace(TINY, scan=True), {"head": "mlp", "classes": 20}),
        (ENCODER, {"head": "layer", "cascade": True, "ensemble": True}),
        (RESNET, {"head": "grid", "gate": True, "ensemble": True}),
    ],
)
def test_matrices_decay_and_nothing_else(config, exits):
    """What is no matrix has one axis, beside that of a stack."""
    params = whole(config, **exits)
    for path, decayed in tree.flatten(decays(params)).items():
        stacked = config.scan and "/blocks/" in path
        axes = tree.flatten(params)[path].ndim - stacked
        assert decayed == (axes > 1), path


@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
@pytest.mark.parametrize("scan", [False, True])
def test_norms_stay_where_they_are_without_a_gradient(optimizer, scan):
    config = dataclasses.replace(TINY, qkv_bias=True)
    _, params = build(config)
    params = jax.tree.map(lambda x: x + 1, params)
    if scan:
        params = params | {"backbone": base.stack_blocks(params["backbone"])}
    before, after = (tree.flatten(x) for x in (params, updates_of(params, optimizer=optimizer)))
    for path in before:
        moved = np.any(np.asarray(before[path]) != np.asarray(after[path]))
        assert moved == path.endswith(("/kernel", "/embedding")), path


def test_statistics_of_a_resnet_never_decay():
    statistics = [path for path in tree.flatten(whole(RESNET)) if re.search(STATISTICS, path)]
    mask = tree.flatten(decays(whole(RESNET)))
    assert statistics and not any(mask[path] for path in statistics)


def test_decay_draws_matrices_by_rate_times_decay():
    params = {"exits": {"2": {"up": {"kernel": jnp.ones((2, 2))}}}}
    once = updates_of(params, steps=1, optimizer="adamw")
    np.testing.assert_allclose(once["exits"]["2"]["up"]["kernel"], 1 - 0.1 * 0.5, rtol=1e-6)


def test_the_rate_rises_and_falls_between_its_corners():
    rate = learning_rate(
        TuneSettings(steps=20, warmup_steps=5, learning_rate=0.4, final_fraction=0.25)
    )
    found = np.array([rate(step) for step in range(26)])
    np.testing.assert_allclose(found[:6], 0.4 * np.arange(6) / 5, rtol=1e-6)
    middle = (5 + 20) / 2  # of the cosine
    np.testing.assert_allclose(rate(middle), (0.4 + 0.1) / 2, rtol=1e-6)
    np.testing.assert_allclose(found[20:], 0.1, rtol=1e-6)
    assert (np.diff(found[5:21]) < 0).all()
    assert TuneSettings(learning_rate=0.4).warmup_steps == 0
    np.testing.assert_allclose(learning_rate(TuneSettings(learning_rate=0.4))(0), 0.4, rtol=1e-6)


@pytest.mark.parametrize("norm", [1.0, 5.0])
def test_gradients_are_scaled_down_to_the_norm_and_never_up(norm):
    params = {"exits": {"2": {"kernel": jnp.zeros((3,))}}}
    how = {"optimizer": "sgd", "learning_rate": 1.0, "b1": 0.0, "clip_norm": norm}
    optimizer = make_optimizer(TuneSettings(**how))
    state = optimizer.init(params)
    for size in (0.5, 3.0, 400.0):
        gradient = jnp.array([0.6, 0.0, 0.8]) * size
        updates, _ = optimizer.update({"exits": {"2": {"kernel": gradient}}}, state, params)
        taken = np.linalg.norm(updates["exits"]["2"]["kernel"])
        np.testing.assert_allclose(taken, min(size, norm), rtol=1e-6)
