"""What a network is made of, asked for by every program: the same as built, and built once."""

import dataclasses

import jax
import pytest

from conftest import TINY, build
from early_exit.backbones import base
from early_exit.backbones.decoder import DecoderConfig
from early_exit.backbones.encoder import EncoderConfig
from early_exit.backbones.resnet import ResNetConfig
from early_exit.cost.traffic import traffic

NETWORKS = {
    "decoder": TINY,
    "biased": dataclasses.replace(TINY, norm="layer", qkv_bias=True, qk_norm=True, tied=False),
    "learned positions": dataclasses.replace(TINY, rotary_fraction=0.0),
    "looped": dataclasses.replace(TINY, scan=True),
    "encoder": EncoderConfig(
        vocab_size=61,
        width=30,
        depth=3,
        heads=5,
        mlp_width=44,
        context_length=24,
        num_classes=4,
    ),
    "resnet": ResNetConfig.imagenet(18),
}


@pytest.mark.parametrize("config", NETWORKS.values(), ids=NETWORKS)
def test_it_is_what_would_be_built(config):
    definition, params = base.described(config)
    built, shapes = base.abstract(config.build)
    assert definition == built and hash(definition) == hash(built)
    assert jax.tree.structure(params) == jax.tree.structure(shapes)
    for x, y in zip(jax.tree.leaves(params), jax.tree.leaves(shapes), strict=True):
        assert (x.shape, x.dtype) == (y.shape, y.dtype)


def test_who_changes_what_was_told_changes_nobody_elses():
    _, params = base.described(TINY)
    params.pop("blocks")
    assert "blocks" in base.described(TINY)[1]


def test_a_network_is_built_once_for_all_programs(monkeypatch):
    """Tracing 30 blocks takes a second, and every program needs them."""
    built, own = [], DecoderConfig.build

    def counted(config, rngs):
        built.append(config)
        return own(config, rngs)

    network = dataclasses.replace(TINY, width=20, head_dim=5 + 1)
    model, params = build(network)
    base._described.cache_clear()
    monkeypatch.setattr(DecoderConfig, "build", counted)
    traffic(model, params)
    jax.eval_shape(lambda params: model.bind(params).exit_tables(), params)
    jax.eval_shape(lambda params: model.bind(params).backbone.output_table(), params)
    assert built == [network]
