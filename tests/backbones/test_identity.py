import dataclasses

import jax
import numpy as np
import pytest

from conftest import TINY, build
from early_exit import tree
from early_exit.backbones import base, identity, rotary
from early_exit.backbones.encoder import EncoderConfig
from early_exit.backbones.resnet import ResNetConfig

ENCODER = EncoderConfig(vocab_size=11, width=8, depth=2, heads=2, mlp_width=12, context_length=9)
RESNET = ResNetConfig.cifar(8, num_classes=2)
WEIGHTS = {"a": np.ones(3, np.float32)}


def name(config, weights=WEIGHTS):
    return str(identity.of(config, weights))


@pytest.mark.parametrize(
    ("config", "change"),
    [
        (TINY, {"norm_eps": 1e-6}),
        (TINY, {"rope_theta": 10_001.0}),
        (TINY, {"rope_scaling": rotary.Linear(2.0)}),
        (
            dataclasses.replace(TINY, rope_scaling=rotary.Linear(2.0)),
            {"rope_scaling": rotary.Linear(3.0)},
        ),
        (
            dataclasses.replace(TINY, rope_scaling=rotary.PerPair((2.0,) * 3)),
            {"rope_scaling": rotary.PerPair((2.0, 2.0, 3.0))},
        ),
        (TINY, {"window": 5}),
        (dataclasses.replace(TINY, window=5), {"full_blocks": (1,)}),
        (TINY, {"activation": "relu"}),
        (TINY, {"tied": False}),
        (TINY, {"parallel": True}),
        (ENCODER, {"pooling": "mean"}),
        (ENCODER, {"pad_position": 1}),
        (RESNET, {"early_stride": True}),
    ],
)
def test_what_changes_the_function_changes_the_name(config, change):
    assert name(dataclasses.replace(config, **change)) != name(config)


@pytest.mark.parametrize(
    "change",
    [
        {"scan": True},
        {"remat": "block"},
        {"context_length": 99},
        {"norm_eps": float(np.float32(1e-5))},
    ],
)
def test_how_it_is_run_or_written_down_does_not(change):
    """The last is what a GGUF file keeps of 1e-5."""
    assert name(dataclasses.replace(TINY, **change)) == name(TINY)
    assert name(dataclasses.replace(TINY, rope_theta=10_000)) == name(TINY)


def test_weights_change_it_and_so_does_their_type():
    assert name(TINY, {"a": WEIGHTS["a"] + 1}) != name(TINY)
    assert name(TINY, {"a": WEIGHTS["a"].astype(np.float16)}) != name(TINY)


def test_a_loop_over_stacked_blocks_is_the_same_network():
    _, params = build()
    again = base.unstack_blocks(base.stack_blocks(params["backbone"]))
    looped = dataclasses.replace(TINY, scan=True)
    assert identity.of(looped, again) == identity.of(TINY, params["backbone"])


def test_a_name_of_the_first_form_is_of_the_weights_alone():
    known = identity.of(TINY, WEIGHTS)
    old = tree.fingerprint(WEIGHTS)
    assert known.is_named(old) and known.is_named(str(known)) and str(known).startswith("2:")
    assert not known.is_named(old[:-1]) and not known.is_named(None) and not known.is_named("2:")
    assert known.known_as(old) == old and known.known_as("another") == str(known)


def test_every_weight_is_read_once():
    reads = []
    known = identity.of(TINY, build()[1]["backbone"], lambda x: reads.append(1) or np.asarray(x))
    assert len(reads) == len(jax.tree.leaves(build()[1]["backbone"]))
    assert str(known) == str(known) and known.is_named(known.weights)
