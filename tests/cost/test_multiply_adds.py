import dataclasses

import jax
import jax.numpy as jnp
import pytest

from conftest import TINY
from early_exit import tree
from early_exit.backbones import base
from early_exit.backbones.mixture import Mixture
from early_exit.backbones.resnet import ResNetConfig
from early_exit.cost import multiply_adds
from early_exit.exits.heads import ExitConfig


def shape(*sizes):
    return jax.ShapeDtypeStruct(sizes, jnp.float32)


@pytest.mark.parametrize(
    ("function", "shapes", "expected"),
    [
        (lambda a, b: a @ b, [(3, 4), (4, 5)], 3 * 4 * 5),
        (lambda a, b: jnp.einsum("bij,bjk->bik", a, b), [(2, 3, 4), (2, 4, 5)], 2 * 3 * 4 * 5),
        (lambda a: a * 2 + 1, [(9, 9)], 0),
        (jax.jit(lambda a, b: jnp.tanh(a @ b)), [(3, 4), (4, 5)], 3 * 4 * 5),
        (lambda a, b: jax.lax.scan(lambda c, _: (c @ b, None), a, length=7)[0],
         [(3, 4), (4, 4)], 7 * 3 * 4 * 4),
        (lambda a, b: jax.lax.cond(a[0, 0] > 0, lambda: a @ b, lambda: a), [(3, 4), (4, 4)], 48),
        # Padded to 6×6 and 3×3 wide: 4×4 places, or with stride 2, 2×2 ones.
        (lambda x, k: convolve(x, k, 1, 1), [(1, 4, 4, 3), (3, 3, 3, 5)], 16 * 9 * 3 * 5),
        (lambda x, k: convolve(x, k, 2, 1), [(1, 4, 4, 3), (3, 3, 3, 5)], 4 * 9 * 3 * 5),
        (lambda x, k: convolve(x, k, 1, 3), [(2, 4, 4, 3), (3, 3, 1, 6)], 2 * 16 * 9 * 1 * 6),
    ],
)  # fmt: skip
def test_multiply_adds_are_counted_by_hand(function, shapes, expected):
    assert multiply_adds.multiply_adds(function, *(shape(*sizes) for sizes in shapes)) == expected


def convolve(x, kernel, stride, groups):
    return jax.lax.conv_general_dilated(
        x,
        kernel,
        (stride, stride),
        ((1, 1), (1, 1)),
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
        feature_group_count=groups,
    )


@pytest.mark.parametrize(("layers", "published"), [(18, 1.81e9), (34, 3.66e9), (50, 4.09e9)])
def test_residual_networks_cost_what_is_published(layers, published):
    """torchvision's table of weights gives these figures, to three digits, for 224×224 pixels."""
    full = multiply_adds.backbone(ResNetConfig.imagenet(layers)).full
    assert abs(full.multiply_adds - published) < 0.005e9 + 1e6
    # The weights, and no training statistics beside the two that normalise.
    _, params = base.abstract(ResNetConfig.imagenet(layers).build)
    assert full.bytes == tree.size_in_bytes(params)


@pytest.mark.parametrize("tied", [True, False])
def test_a_token_reads_every_weight_but_the_look_up(tied):
    config = dataclasses.replace(TINY, tied=tied)
    of = multiply_adds.backbone(config, jnp.bfloat16)
    _, params = base.abstract(config.build)
    table = 2 * TINY.vocab_size * TINY.width
    assert of.full.bytes == 2 * tree.count(params) - (0 if tied else table)
    assert of.readout.bytes == table + 2 * TINY.width
    matrices = 24 * 24 * 2 + 24 * 12 * 2 + 3 * 24 * 40
    scores = 2 * 24  # of a position with itself: each head's query with key, and with value
    assert of.blocks == (multiply_adds.Cost(matrices + scores, 2 * (matrices + 2 * 24)),) * 6
    assert of.stem == multiply_adds.Cost()
    assert of.before(4).bytes + 2 * of.blocks[0].bytes + of.readout.bytes == of.full.bytes


@pytest.mark.parametrize("output", ["own", "shared"])
@pytest.mark.parametrize("classes", [0, 9])
@pytest.mark.parametrize("kind", ["embedding", "norm", "mlp", "layer"])
def test_a_head_costs_its_parts_and_the_rows_it_reads(kind, classes, output):
    of = multiply_adds.backbone(TINY)
    exits = ExitConfig((2,), head=kind, classes=classes, output=output)
    head, parameters = multiply_adds.head(TINY, exits, of, 2, jnp.float32)
    rows = classes + 1 if classes else TINY.vocab_size
    block = of.blocks[0]
    mlp, norm = 3 * 24 * 40, 24
    adds = {"embedding": 0, "norm": 0, "mlp": mlp, "layer": block.multiply_adds}[kind]
    weights = {"embedding": 0, "norm": norm, "mlp": mlp + 2 * norm, "layer": 0}[kind]
    if kind == "layer":
        weights = block.bytes // 4 + norm
    assert head == multiply_adds.Cost(adds + rows * 24, 4 * (weights + rows * 24))
    own = {"own": rows, "shared": 1 if classes else 0}[output]
    assert parameters == weights + own * 24


@pytest.mark.parametrize("shared", [0, 96])
def test_xla_counts_the_same_for_experts(shared):
    """XLA adds elementwise work; with all experts it would be four times as much."""
    config = dataclasses.replace(
        TINY, width=128, head_dim=32, depth=2, mixture=Mixture(8, 2, 192, shared_width=shared)
    )
    definition, params = base.described(config)

    def run(params, tokens):
        backbone = base.merge(definition, params)
        hidden, context = backbone.stem({"tokens": tokens})
        return backbone.readout(backbone.run_blocks(hidden, 0, config.depth, context))

    token = jax.ShapeDtypeStruct((1, 1), jnp.int32)
    said = jax.jit(run).lower(params, token).cost_analysis()["flops"]
    counted = 2 * multiply_adds.backbone(config).full.multiply_adds
    assert counted == pytest.approx(said, rel=0.05)
