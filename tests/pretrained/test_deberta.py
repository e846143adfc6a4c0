"""DeBERTa-v3 from a folder; see `tests/fixtures/make_encoders.py`."""

import functools
import json
import math
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from early_exit.backbones import base, deberta
from early_exit.pretrained import deberta as family
from early_exit.pretrained.load import load

FOLDER = pathlib.Path(__file__).parents[1] / "fixtures/tiny_deberta"
HF = json.loads((FOLDER / "config.json").read_text()) if FOLDER.exists() else {}


@pytest.fixture(scope="module")
def case():
    """(the loaded network, what torch says)."""
    with np.load(FOLDER / "expected.npz", allow_pickle=False) as file:
        return load(str(FOLDER)), dict(file)


@functools.partial(jax.jit, static_argnames="config")
def run(config, params, given):
    model = base.merge(base.described(config)[0], params)
    hidden, context = model.stem(given)
    states = [hidden]
    for block in range(config.depth):
        states.append(model.run_blocks(states[-1], block, block + 1, context))
    return jnp.stack(states), model.features(states[-1], context), model.readout(states[-1])


def test_every_block_and_the_readout_equal_torch(case):
    pretrained, expected = case
    given = {name: expected[name] for name in ("tokens", "mask")}
    hidden, features, logits = run(pretrained.config, pretrained.params, given)
    mask = given["mask"]
    assert not mask.all() and mask.shape[1] > 2 * pretrained.config.buckets
    np.testing.assert_allclose(hidden, expected["hidden"], rtol=0, atol=1e-4)
    np.testing.assert_allclose(features, expected["features"], rtol=0, atol=1e-4)
    np.testing.assert_allclose(logits, expected["logits"], rtol=0, atol=1e-4)
    # And whole rows need no mask.
    whole = run(pretrained.config, pretrained.params, {"tokens": expected["tokens"][:1]})[2]
    np.testing.assert_allclose(whole, expected["logits"][:1], rtol=0, atol=1e-4)


def test_composed_segments_are_the_full_forward_pass(case):
    """Operation by operation, so that no compiler sees what follows."""
    pretrained, expected = case
    config, params = pretrained.config, pretrained.params
    given = {name: expected[name] for name in ("tokens", "mask")}
    states = run(config, params, given)[0]
    model = base.merge(base.described(config)[0], params)
    _, context = model.stem(given)
    for split in range(1, config.depth):
        for start, stop in ((0, split), (split, config.depth)):
            after = model.run_blocks(states[start], start, stop, context)
            np.testing.assert_allclose(after, states[stop], rtol=0, atol=1e-5, err_msg=split)


@pytest.mark.parametrize(("buckets", "furthest"), [(256, 512), (6, 24), (8, 20)])
def test_near_distances_have_a_row_each_and_far_ones_share(buckets, furthest):
    """He et al. 2021, eq. of `make_log_bucket_position`: in exact arithmetic, one by one."""
    rows = deberta._rows_of_distances(furthest + 9, buckets, furthest)
    assert rows.min() >= 0 and rows.max() < 2 * buckets
    for apart in range(-furthest - 8, furthest + 9):
        size, middle = abs(apart), buckets // 2
        if size > middle:
            share = math.log(size / middle) / math.log((furthest - 1) / middle)
            size = min(math.ceil(share * (middle - 1) - 1e-6) + middle, buckets)
        row = buckets + int(math.copysign(size, apart))
        query, key = max(apart, 0), max(-apart, 0)
        assert rows[query, key] == min(row, 2 * buckets - 1), apart


def test_both_directions_of_distance_count(case):
    """A query looks at the table by its own place, a key by its own; neither is the other."""
    pretrained, expected = case
    tokens = expected["tokens"][:1]
    _, there, _ = run(pretrained.config, pretrained.params, {"tokens": tokens})
    flat = pretrained.params | {
        "distances": {"embedding": pretrained.params["distances"]["embedding"][::-1]}
    }
    _, back, _ = run(pretrained.config, flat, {"tokens": tokens})
    assert np.abs(there - back).max() > 1e-2


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        (
            {"relative_attention": False, "norm_rel_ebd": "none"},
            "relative_attention = False.*norm_r",
        ),
        ({"conv_kernel_size": 3}, "conv_kernel_size = 3, which the encoder does not do"),
        ({"share_att_key": False}, "share_att_key = False"),
        ({"position_biased_input": True}, "position_biased_input = True"),
        ({"pos_att_type": "c2p"}, "pos_att_type = 'c2p'"),
        ({"embedding_size": 12}, "embedding_size = 12"),
        ({"position_buckets": None}, "lacks 'position_buckets'"),
        ({"architectures": ["DebertaV2ForQuestionAnswering"]}, "architectures = 'DebertaV2ForQ"),
        ({"position_buckets": 60}, "buckets=60 must lie in 4…48"),
    ],
)
def test_what_the_encoder_does_not_do_is_named(entries, message):
    with pytest.raises(ValueError, match=message):
        family.config(HF | entries)


def test_what_published_ones_say():
    """As in microsoft/deberta-v3-base, whose config names no architecture."""
    said = {
        "model_type": "deberta-v2", "attention_probs_dropout_prob": 0.1, "hidden_act": "gelu",
        "hidden_dropout_prob": 0.1, "hidden_size": 768, "initializer_range": 0.02,
        "intermediate_size": 3072, "max_position_embeddings": 512, "relative_attention": True,
        "position_buckets": 256, "norm_rel_ebd": "layer_norm", "share_att_key": True,
        "pos_att_type": "p2c|c2p", "layer_norm_eps": 1e-7, "max_relative_positions": -1,
        "position_biased_input": False, "num_attention_heads": 12, "num_hidden_layers": 12,
        "type_vocab_size": 0, "vocab_size": 128100,
    }  # fmt: skip
    found = family.config(said)
    assert (found.buckets, found.furthest, found.num_classes) == (256, 512, 0)
    assert family.config(family.to_hf(found)) == found
