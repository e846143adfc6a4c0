"""ModernBERT from a folder; see `tests/fixtures/make_encoders.py`."""

import dataclasses
import functools
import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy

from early_exit.backbones import base
from early_exit.exits.heads import ExitConfig
from early_exit.exits.multi_exit import MultiExit
from early_exit.pretrained import families, modernbert
from early_exit.pretrained.load import load

FOLDER = pathlib.Path(__file__).parents[1] / "fixtures/tiny_modernbert"
HF = json.loads((FOLDER / "config.json").read_text()) if FOLDER.exists() else {}


@pytest.fixture(scope="module")
def case():
    """(the loaded network, what torch says)."""
    with np.load(FOLDER / "expected.npz", allow_pickle=False) as file:
        return load(str(FOLDER)), dict(file)


def inputs(expected):
    return {name: expected[name] for name in ("tokens", "mask")}


@functools.partial(jax.jit, static_argnames="config")
def run(config, params, given):
    model = base.merge(base.described(config)[0], params)
    hidden, context = model.stem(given)
    states = [hidden]
    for block in range(config.depth):
        states.append(model.run_blocks(states[-1], block, block + 1, context))
    read = model.readout(states[-1], context) if config.num_classes else None
    return jnp.stack(states), model.features(states[-1], context), read


def test_every_block_and_the_readout_equal_torch(case):
    """Of padding, nobody reads the hidden states; some of it sees no token at all."""
    pretrained, expected = case
    assert not expected["mask"].all() and pretrained.config.window == 4
    hidden, features, logits = run(pretrained.config, pretrained.params, inputs(expected))
    real = expected["mask"]
    np.testing.assert_allclose(hidden[:, real], expected["hidden"][:, real], rtol=0, atol=1e-4)
    np.testing.assert_allclose(features, expected["features"], rtol=0, atol=1e-4)
    np.testing.assert_allclose(logits, expected["logits"], rtol=0, atol=1e-4)
    assert np.isfinite(hidden).all()


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


def test_most_blocks_see_near_positions_alone_and_padding_is_seen_by_none(case):
    pretrained, expected = case
    config, params = pretrained.config, pretrained.params
    given = inputs(expected)

    @functools.partial(jax.jit, static_argnames="block")
    def slopes(params, block):
        model = base.merge(base.described(config)[0], params)
        hidden, context = model.stem(given)

        def middle(hidden):
            return jnp.square(model.run_blocks(hidden, block, block + 1, context)[:2, 6]).sum()

        return jax.grad(middle)(hidden)

    for block, reach in ((0, 13), (1, 3), (2, 3), (3, 13)):
        seen = np.abs(np.asarray(slopes(params, block))[:2]).sum(-1) > 0
        near = np.abs(np.arange(13) - 6) <= reach
        assert seen.tolist() == (near & given["mask"][:2]).tolist()


def test_rows_without_padding_need_no_mask(case):
    pretrained, expected = case
    whole = {"tokens": expected["tokens"][:1]}
    _, features, _ = run(pretrained.config, pretrained.params, whole)
    np.testing.assert_allclose(features, expected["features"][:1], rtol=0, atol=1e-4)


def test_a_whole_block_in_a_head_is_copied_from_the_last(case):
    pretrained, expected = case
    model = MultiExit(pretrained.config, ExitConfig((3,), "layer"))
    heads = model.init_exits(jax.random.key(0), pretrained.params, "copy", None)
    bound = model.bind({"backbone": pretrained.params, "exits": heads})
    _, context = bound.backbone.stem(inputs(expected))
    # With the block that it lacks, behind the third of four a head reads what the network reads.
    found, _ = bound.heads[0].features(jnp.asarray(expected["hidden"][3]), context)
    last = pretrained.config.pool(jnp.asarray(expected["hidden"][4]), context)
    np.testing.assert_allclose(found, bound.backbone.final_norm(last), rtol=0, atol=1e-4)


def test_both_ways_in_which_positions_are_written():
    old = {k: v for k, v in HF.items() if k not in ("rope_parameters", "layer_types")}
    old |= {"global_rope_theta": 500.0, "local_rope_theta": 20.0, "global_attn_every_n_layers": 2}
    found = modernbert.config(old)
    assert (found.rope_theta, found.local_rope_theta, found.full_blocks) == (500, 20, (0, 2))
    assert modernbert.config(modernbert.to_hf(found)) == found
    said = {k: v for k, v in old.items() if not k.endswith(("theta", "_n_layers"))}
    usual = modernbert.config(said)
    assert (usual.rope_theta, usual.local_rope_theta, usual.full_blocks) == (160e3, 10e3, (0, 3))


def test_a_bare_encoder_and_one_with_masked_words(tmp_path):
    tensors = safetensors.numpy.load_file(FOLDER / "model.safetensors")
    for name, prefix in (("ModernBertModel", ""), ("ModernBertForMaskedLM", "model.")):
        body = {k.removeprefix("model."): v for k, v in tensors.items() if k.startswith("model.")}
        body = {prefix + k: v for k, v in body.items()}
        if prefix:
            body |= {"decoder.bias": np.zeros(3, np.float32), "head.dense.weight": np.zeros((2, 2))}
        (tmp_path / "config.json").write_text(json.dumps(HF | {"architectures": [name]}))
        safetensors.numpy.save_file(body, tmp_path / "model.safetensors")
        pretrained = load(str(tmp_path))
        assert not pretrained.config.num_classes and "pooler" not in pretrained.params
    family, hf = families.writing(dataclasses.replace(pretrained.config, num_classes=0))
    assert family is modernbert and hf["architectures"] == ["ModernBertModel"]


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        ({"architectures": ["ModernBertForTokenClassification"]}, "architectures = 'ModernBertFor"),
        ({"hidden_activation": "mish"}, "hidden_activation = 'mish', which the encoder"),
        ({"rope_scaling": {"factor": 2}}, "rope_scaling = {'factor': 2}, which"),
        (
            {"rope_parameters": {"sliding_attention": {"rope_type": "yarn"}}},
            "rope_type of sliding_attention = 'yarn'",
        ),
        ({"layer_types": ["full_attention"] * 3}, "layer_types = .* 4 times"),
        ({"layer_types": ["full_attention"] * 3 + ["linear"]}, "layer_types = .*'linear'"),
        ({"classifier_pooling": "max", "vocab_size": None}, "lacks 'vocab_size'; classifier"),
        ({"num_attention_heads": 4}, "width=30 does not make 4 heads of an even width"),
    ],
)  # fmt: skip
def test_what_the_encoder_does_not_do_is_named(entries, message):
    with pytest.raises(ValueError, match=message):
        modernbert.config(HF | entries)


def test_rows_that_do_not_fit(case):
    pretrained, _ = case
    model = base.merge(base.described(pretrained.config)[0], pretrained.params)
    tokens = jnp.zeros((1, 25), jnp.int32)
    with pytest.raises(ValueError, match="rows of 25 tokens do not fit the encoder's 24 positions"):
        model.stem({"tokens": tokens})
    with pytest.raises(ValueError, match="no token types; leave token_types out"):
        model.stem({"tokens": tokens[:, :4], "token_types": tokens[:, :4]})
