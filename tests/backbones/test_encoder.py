import dataclasses
import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from early_exit import tree
from early_exit.backbones import base
from early_exit.backbones.encoder import EncoderConfig

BERT = EncoderConfig(
    vocab_size=53,
    width=24,
    depth=3,
    heads=3,
    mlp_width=40,
    context_length=10,
    num_classes=5,
    norm_eps=1e-6,
)
ROBERTA = dataclasses.replace(BERT, token_types=1, pad_position=3)
DISTILBERT = dataclasses.replace(BERT, token_types=0, pooler="relu", activation="gelu_tanh")
CONFIGS = {"bert": BERT, "roberta": ROBERTA, "distilbert": DISTILBERT}

TOKENS = np.array([[7, 3, 52, 11, 29, 0, 0, 0], [1, 2, 3, 4, 5, 6, 7, 8]], np.int32)
MASK = np.array([[True] * 5 + [False] * 3, [True] * 8])


def params_of(config):
    """Random ones of order one, norms and biases included."""
    rng = np.random.default_rng(0)
    _, abstract = base.abstract(config.build)

    def draw(path, leaf):
        if leaf.ndim == 2:
            return rng.normal(0, 1 if path.endswith("embedding") else 0.2, leaf.shape)
        return rng.normal(path.endswith("scale"), 0.3, leaf.shape)

    flat = {path: draw(path, leaf) for path, leaf in tree.flatten(abstract).items()}
    return tree.unflatten({path: jnp.asarray(x, jnp.float32) for path, x in flat.items()})


def bind(config, params):
    definition, _ = base.abstract(config.build)
    return base.merge(definition, params)


@functools.partial(jax.jit, static_argnames="config")
def forward(config, params, inputs):
    backbone = bind(config, params)
    hidden, context = backbone.stem(inputs)
    return backbone.run_blocks(hidden, 0, config.depth, context)


def final_hidden(config, params, **inputs):
    return forward(config, params, inputs)


@pytest.fixture(params=CONFIGS)
def config(request):
    return CONFIGS[request.param]


@pytest.fixture(scope="module")
def bert():
    return params_of(BERT)


@functools.partial(jax.jit, static_argnames="config")
def states(config, params, inputs):
    """After the stem and after every block, one block at a time: [L + 1, B, T, D]."""
    backbone = bind(config, params)
    hidden, context = backbone.stem(inputs)
    found = [hidden]
    for i in range(config.depth):
        found.append(backbone.run_blocks(found[-1], i, i + 1, context))
    return jnp.stack(found)


def test_every_way_to_cut_it_is_the_full_forward_pass(config):
    params, inputs = params_of(config), {"tokens": TOKENS, "mask": MASK}

    @jax.jit
    def segments(params, stem):
        backbone = bind(config, params)
        _, context = backbone.stem(inputs)
        after = {(): stem}
        for stops in itertools.chain.from_iterable(
            itertools.combinations(range(1, config.depth + 1), n) for n in (1, 2, 3)
        ):
            start = max(stops[:-1], default=0)
            after[stops] = backbone.run_blocks(after[stops[:-1]], start, stops[-1], context)
        return {"-".join(map(str, stops)): hidden for stops, hidden in after.items()}

    whole = states(config, params, inputs)
    found = segments(params, whole[0])
    assert {"3", "1-3", "2-3", "1-2-3"} <= found.keys()
    for stops, hidden in found.items():
        last = int(stops.rpartition("-")[2] or 0)
        np.testing.assert_allclose(hidden, whole[last], atol=1e-5, err_msg=stops)


def test_all_real_tokens_see_each_other_and_nothing_else(config):
    """[T, T']: whether the final hidden state at t depends on the embedding at t'."""

    @jax.jit
    def slopes(params):
        backbone = bind(config, params)
        hidden, context = backbone.stem({"tokens": TOKENS, "mask": MASK})

        def sums(hidden):
            out = backbone.run_blocks(hidden, 0, config.depth, context)
            return (out[0] ** 2).sum(-1)

        return jax.jacobian(sums)(hidden)

    found = np.asarray(slopes(params_of(config)))  # [T, B, T, D]
    assert not found[:, 1].any(), "rows of a batch must not see each other"
    influence = np.abs(found[:, 0]).sum(-1) > 0
    np.testing.assert_array_equal(influence[:5], np.broadcast_to(MASK[0], (5, 8)))


def test_padding_changes_nothing(config):
    params = params_of(config)
    padded = final_hidden(config, params, tokens=TOKENS, mask=MASK)
    alone = final_hidden(config, params, tokens=TOKENS[:1, :5])
    np.testing.assert_allclose(padded[:1, :5], alone, atol=1e-5)
    other = np.where(MASK, TOKENS, 17)
    np.testing.assert_array_equal(
        final_hidden(config, params, tokens=other, mask=MASK)[MASK], padded[MASK]
    )


def test_without_a_mask_every_token_is_real(config):
    params = params_of(config)
    np.testing.assert_allclose(
        final_hidden(config, params, tokens=TOKENS),
        final_hidden(config, params, tokens=TOKENS, mask=np.ones_like(MASK)),
        atol=1e-5,
    )


@pytest.mark.parametrize(("config", "same"), [(ROBERTA, True), (BERT, False)])
def test_only_roberta_counts_real_tokens(config, same):
    """Padding on the left moves BERT's positions, not RoBERTa's."""
    params = params_of(config)
    right = final_hidden(config, params, tokens=TOKENS, mask=MASK)[0, :5]
    moved = {"tokens": np.roll(TOKENS[:1], 3, 1), "mask": np.roll(MASK[:1], 3, 1)}
    left = final_hidden(config, params, **moved)[0, 3:]
    assert np.allclose(left, right, atol=1e-5) == same


def test_token_types_matter_and_are_zero_by_default(bert):
    zeros, ones = np.zeros_like(TOKENS), np.ones_like(TOKENS)
    default = final_hidden(BERT, bert, tokens=TOKENS)
    np.testing.assert_array_equal(
        final_hidden(BERT, bert, tokens=TOKENS, token_types=zeros), default
    )
    assert not np.allclose(final_hidden(BERT, bert, tokens=TOKENS, token_types=ones), default)


def test_hidden_states_after_any_block_are_normalised(bert):
    """Post-norm: what a head reads after block 1 has the scale that it has after the last."""
    after = np.asarray(states(BERT, bert, {"tokens": TOKENS, "mask": MASK})[1:])
    for i, hidden in enumerate(after):
        norm = jax.tree.map(np.asarray, bert["blocks"][str(i)]["mlp_norm"])
        plain = (hidden - norm["bias"]) / norm["scale"]
        np.testing.assert_allclose(plain.mean(-1), 0, atol=1e-4)
        np.testing.assert_allclose(plain.var(-1), 1, atol=1e-3)


@pytest.mark.parametrize(
    ("pooler", "activation"),
    [("tanh", np.tanh), ("relu", lambda x: np.maximum(x, 0)), ("none", None)],
)
def test_the_readout_is_the_pooler_the_output_matrix_and_its_bias(pooler, activation):
    config = dataclasses.replace(BERT, pooler=pooler)
    params = params_of(config)
    hidden = np.random.default_rng(0).normal(size=(2, 8, 24)).astype(np.float32)
    want, given = hidden[:, 0], jax.tree.map(np.asarray, params)
    if activation:
        want = activation(want @ given["pooler"]["kernel"] + given["pooler"]["bias"])
    backbone = bind(config, params)
    np.testing.assert_allclose(backbone.features(hidden), want, atol=1e-5)
    want = want @ given["output"]["embedding"].T + given["output"]["bias"]
    np.testing.assert_allclose(backbone.readout(hidden), want, atol=1e-4)


@pytest.mark.parametrize("call", ["output_table", "output_bias", "readout"])
def test_a_bare_encoder_has_features_but_no_logits(bert, call):
    params = {name: part for name, part in bert.items() if name != "output"}
    backbone = bind(dataclasses.replace(BERT, num_classes=0), params)
    hidden = jnp.ones((2, 8, 24))
    assert backbone.features(hidden).shape == (2, 24)
    with pytest.raises(ValueError, match="no classifier .*gives features, not logits"):
        getattr(backbone, call)(*[hidden] if call == "readout" else [])


def test_parts_for_heads_fit_any_blocks_hidden_states(config):
    @jax.jit
    def parts(params, hidden):
        _, context = bind(config, params).stem({"tokens": TOKENS, "mask": MASK})
        builds = (config.build_norm, config.build_mlp, config.build_block)
        norm, mlp, block = (build(nnx.Rngs(0)) for build in builds)
        return norm(hidden), mlp(hidden), block(hidden, context)

    params = params_of(config)
    for hidden in states(config, params, {"tokens": TOKENS, "mask": MASK}):
        for out in parts(params, hidden):
            assert out.shape == hidden.shape and jnp.isfinite(out).all()


def test_half_precision_weights_give_float32_logits(config):
    half = jax.tree.map(lambda x: x.astype(jnp.bfloat16), params_of(config))
    hidden = final_hidden(config, half, tokens=TOKENS, mask=MASK)
    logits = bind(config, half).readout(hidden)
    assert hidden.dtype == jnp.bfloat16 and logits.dtype == jnp.float32
    assert jnp.isfinite(logits).all()


def test_parameters_are_all_there_is(config):
    """No stored RNG, cache or running statistics."""
    model = nnx.eval_shape(lambda: config.build(nnx.Rngs(0)))
    assert {type(v) for _, v in nnx.to_flat_state(nnx.state(model))} == {nnx.Param}


@pytest.mark.parametrize("config", [BERT, ROBERTA])
def test_a_row_longer_than_the_position_table_is_refused(config):
    params = params_of(config)
    assert jnp.isfinite(final_hidden(config, params, tokens=np.zeros((1, 10), np.int32))).all()
    with pytest.raises(ValueError, match="rows of 11 tokens do not fit .* 10 positions"):
        final_hidden(config, params, tokens=np.zeros((1, 11), np.int32))


def test_token_types_for_an_encoder_without_them_are_refused():
    inputs = {"tokens": TOKENS, "token_types": np.zeros_like(TOKENS)}
    with pytest.raises(ValueError, match="no token types; leave token_types out"):
        final_hidden(DISTILBERT, params_of(DISTILBERT), **inputs)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"heads": 5}, "width=24 is not a multiple of heads=5"),
        ({"activation": "mish"}, "unknown activation 'mish'; choose one of silu, "),
        ({"pooler": "mean"}, "unknown pooler 'mean'; choose one of tanh, relu, gelu, none"),
    ],
)
def test_configs_that_make_no_encoder(changes, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(BERT, **changes)
