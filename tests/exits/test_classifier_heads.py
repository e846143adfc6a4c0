"""Heads of networks that tell classes apart: what they pool, and what they take from each other."""

import dataclasses
import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from early_exit import tree
from early_exit.backbones import base
from early_exit.backbones.encoder import EncoderConfig
from early_exit.backbones.resnet import ResNetConfig
from early_exit.exits import edit
from early_exit.exits.heads import ExitConfig
from early_exit.exits.multi_exit import MultiExit

C = 5
RESNET = ResNetConfig(
    (2, 2), (4, 8), C, stem="cifar", stem_width=4, channels=1
)  # width 4 up to block 2, then 8
ENCODER = EncoderConfig(
    vocab_size=40, width=12, depth=4, heads=2, mlp_width=16, context_length=16, num_classes=C
)
ENCODER_MEAN = EncoderConfig(
    vocab_size=40, width=12, depth=4, heads=2, mlp_width=16, context_length=16, num_classes=C,
    pooler="none", pooling="mean",
)  # fmt: skip
IMAGES = {"images": jax.random.normal(jax.random.key(7), (3, 8, 8, 1))}
MASK = jnp.arange(6)[None] < jnp.array([[6], [4], [1]])
TEXTS = {"tokens": jax.random.randint(jax.random.key(8), (3, 6), 0, 40), "mask": MASK}


def build(config, points=(1, 3), **exits):
    model = MultiExit(config, ExitConfig(points, **{"head": "linear"} | exits))
    _, backbone = base.split(config.build(nnx.Rngs(0)))
    params = {"backbone": backbone}
    params["exits"] = model.init_exits(jax.random.key(1), backbone, "random", None)
    # As drawn, ensembles and output biases are uniform; what reads them could not be told apart.
    leaves, structure = jax.tree.flatten(params["exits"])
    keys = jax.random.split(jax.random.key(2), len(leaves))
    moved = [x + jax.random.normal(k, x.shape) for x, k in zip(leaves, keys, strict=True)]
    return model, params | {"exits": jax.tree.unflatten(structure, moved)}


def run(model, params, inputs):
    """(hidden states at the exits, context, each head's logits, each exit's answer)."""
    bound = model.bind(params)
    hidden, context = bound.backbone.stem(inputs)
    states = list(bound.hidden_at_exits(hidden, context, model.exits.points))
    logits, answers = [], []
    for e, state in enumerate(states):
        logits.append(bound.exit_logits(e, state, context, logits))
        answers.append(bound.answer(logits))
    return states, context, logits, answers


@pytest.mark.parametrize(
    ("config", "inputs"), [(RESNET, IMAGES), (ENCODER, TEXTS), (ENCODER_MEAN, TEXTS)]
)
def test_a_linear_head_reads_what_is_pooled_and_nothing_else(config, inputs):
    model, params = build(config)
    states, _, logits, answers = run(model, params, inputs)
    for e, point in enumerate(model.exits.points):
        state = np.asarray(states[e], np.float64)
        if config is RESNET:
            pooled = state.reshape(3, -1, state.shape[-1]).mean(1)
        elif config is ENCODER:
            pooled = state[:, 0]
        else:
            pooled = np.stack([row[m].mean(0) for row, m in zip(state, MASK, strict=True)])
        own = params["exits"][str(point)]["output"]
        want = pooled @ np.asarray(own["embedding"]).T + np.asarray(own["bias"])
        np.testing.assert_allclose(logits[e], want, atol=1e-5)
        assert answers[e] is logits[e]


@pytest.mark.parametrize(
    ("config", "inputs", "kind"),
    [(RESNET, IMAGES, kind) for kind in RESNET.head_kinds]
    + [(ENCODER_MEAN, TEXTS, kind) for kind in ENCODER.head_kinds],
)
def test_every_kind_treats_rows_apart(config, inputs, kind):
    model, params = build(config, head=kind, gate=True, cascade=True, ensemble=True)
    _, _, _, whole = run(model, params, inputs)
    for row in range(3):
        _, _, _, alone = run(model, params, {k: v[row : row + 1] for k, v in inputs.items()})
        for together, single in zip(whole, alone, strict=True):
            assert together.shape == (3, C) and together.dtype == jnp.float32
            np.testing.assert_allclose(together[row], single[0], rtol=2e-6, atol=2e-5)


def test_a_grid_head_doubles_channels_once_more_than_the_network():
    deep = dataclasses.replace(RESNET, depths=(1, 1, 1), widths=(4, 8, 16))
    _, params = build(deep, points=(1, 2), head="grid")
    for point, widths in (("1", (4, 8, 16, 32)), ("2", (8, 16, 32))):
        grid = params["exits"][point]["grid"]
        shapes = {i: conv["kernel"].shape for i, conv in grid["convs"].items()}
        assert shapes == {
            str(i): (3, 3, *pair) for i, pair in enumerate(itertools.pairwise(widths))
        }


@pytest.mark.parametrize("side", [28, 17, 5])
def test_a_grid_head_reads_each_place_by_itself(side):
    """Against a loop over the places, which averages and normalises one after the other."""
    network = ResNetConfig((1, 1), (4, 8), C, stem="cifar", stem_width=4, channels=1)
    head = network.build_grid(1, nnx.Rngs(3))
    hidden = jax.random.normal(jax.random.key(0), (2, side, side, 4))
    seen = hidden
    for i in range(2):
        seen = np.maximum(head.convs[str(i)](seen), 0)
    size = seen.shape[1]
    assert size == -(-side // 4)
    found = np.asarray(head(hidden)).reshape(2, 4, 4, 16)
    assert head(hidden).shape == (2, network.grid_width)
    for row, down, right in itertools.product(range(2), range(4), range(4)):
        rows, columns = (
            slice(math.floor(i * size / 4), math.ceil((i + 1) * size / 4)) for i in (down, right)
        )
        mean = np.float64(seen[row, rows, columns]).mean((0, 1))
        want = (mean - mean.mean()) / np.sqrt(mean.var() + 1e-5)
        np.testing.assert_allclose(found[row, down, right], want, atol=1e-3)


def test_padding_says_nothing_to_pooled_means():
    model, params = build(ENCODER_MEAN)
    other = TEXTS | {"tokens": jnp.where(MASK, TEXTS["tokens"], 39)}
    for a, b in zip(run(model, params, TEXTS)[3], run(model, params, other)[3], strict=True):
        np.testing.assert_allclose(a, b, atol=1e-6)


def test_a_cascade_adds_a_map_of_the_logits_before_and_sends_no_gradient_back():
    model, params = build(RESNET, points=(1, 2, 3), cascade=True)
    plain = {p: {k: v for k, v in h.items() if k != "cascade"} for p, h in params["exits"].items()}
    without = MultiExit(RESNET, ExitConfig((1, 2, 3), "linear"))
    _, _, own, _ = run(without, params | {"exits": plain}, IMAGES)
    _, _, logits, _ = run(model, params, IMAGES)
    assert "cascade" not in params["exits"]["1"]
    np.testing.assert_array_equal(logits[0], own[0])
    for e, point in ((1, "2"), (2, "3")):
        kernel = params["exits"][point]["cascade"]["kernel"]
        np.testing.assert_allclose(logits[e], own[e] + logits[e - 1] @ kernel, atol=1e-5)

    def last(exits):
        return run(model, params | {"exits": exits}, IMAGES)[2][-1].sum()

    gradient = jax.grad(last)(params["exits"])
    assert all((leaf == 0).all() for p in ("1", "2") for leaf in jax.tree.leaves(gradient[p]))
    assert all((leaf != 0).any() for leaf in jax.tree.leaves(gradient["3"]))


def test_an_ensemble_is_a_weighted_geometric_mean_that_only_it_learns_from():
    model, params = build(RESNET, points=(1, 2, 3), ensemble=True)
    _, _, logits, answers = run(model, params, IMAGES)
    for e, point in ((1, "2"), (2, "3")):
        own = jax.tree.map(lambda x: np.asarray(x, np.float64), params["exits"][point]["ensemble"])
        weights = np.log1p(np.exp(own["weights"]))
        probs = [np.asarray(jax.nn.softmax(x), np.float64) for x in logits[: e + 1]]
        mixed = np.exp(own["bias"]) * np.prod(
            [p**w for p, w in zip(probs, weights, strict=True)], 0
        )
        want = mixed / mixed.sum(-1, keepdims=True)
        np.testing.assert_allclose(jax.nn.softmax(answers[e]), want, rtol=1e-4)

    def answer(exits):
        return run(model, params | {"exits": exits}, IMAGES)[3][-1][:, 0].sum()

    gradient = tree.flatten(jax.grad(answer)(params["exits"]))
    moved = {path for path, leaf in gradient.items() if (leaf != 0).any()}
    assert moved == {"3/ensemble/weights", "3/ensemble/bias"}


def test_a_new_ensemble_is_the_plain_geometric_mean():
    model = MultiExit(RESNET, ExitConfig((1, 3), "linear", ensemble=True))
    _, backbone = base.split(RESNET.build(nnx.Rngs(0)))
    exits = model.init_exits(jax.random.key(1), backbone, "random", None)
    _, _, logits, answers = run(model, {"backbone": backbone, "exits": exits}, IMAGES)
    mean = sum(jax.nn.log_softmax(x) for x in logits) / 2
    np.testing.assert_allclose(answers[1], mean, atol=1e-5)


def test_an_encoder_copies_what_it_has():
    model = MultiExit(ENCODER, ExitConfig((2,), "mlp", gate=True))
    _, backbone = base.split(ENCODER.build(nnx.Rngs(0)))
    head = model.init_exits(jax.random.key(1), backbone, "copy", None)["2"]
    blocks = backbone["blocks"]
    for part, source in (
        ("mlp", blocks["1"]["mlp"]),
        ("mlp_norm", blocks["1"]["mlp_norm"]),
        ("norm", blocks["3"]["mlp_norm"]),
        ("output", backbone["output"]),
    ):
        jax.tree.map(np.testing.assert_array_equal, head[part], source)
    assert "gate" in head


@pytest.mark.parametrize(
    ("config", "options", "message"),
    [
        (RESNET, {"head": "layer"}, "no head 'layer'; choose one of linear, norm, mlp, grid"),
        (ENCODER, {"head": "grid"}, "no head 'grid'; choose one of linear, norm, mlp, layer"),
        (RESNET, {"output": "shared"}, r"heads after blocks \[1\] are not as wide"),
        (ENCODER, {"classes": 3}, "exits.classes reduces a vocabulary"),
    ],
)
def test_exits_that_do_not_fit_a_classifier(config, options, message):
    with pytest.raises(ValueError, match=message):
        build(config, **options)


@pytest.mark.parametrize("kind", ["mlp", "grid"])
def test_a_resnet_has_nothing_that_a_head_could_copy(kind):
    model, params = build(RESNET, head=kind)
    message = f"after block 1 cannot copy its .*{kind}.*exits.init=random"
    with pytest.raises(ValueError, match=message):
        model.init_exits(jax.random.key(0), params["backbone"], "copy", None)


def test_heads_move_only_where_they_fit():
    model, params = build(RESNET)
    moved, changed = edit.move(model, params, {1: 2})
    assert moved.exits.points == (2, 3)
    jax.tree.map(np.testing.assert_array_equal, changed["exits"]["2"], params["exits"]["1"])
    with pytest.raises(ValueError, match="head after block 2 would not fit there"):
        edit.move(model, params, {3: 2})
    ensembles = build(RESNET, ensemble=True)
    with pytest.raises(ValueError, match="head after block 3 would not fit there"):
        edit.drop(*ensembles, [1])
