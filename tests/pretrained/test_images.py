"""Classifiers of images, against what torch said when the fixtures were made."""

import dataclasses
import functools
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from early_exit import tree
from early_exit.backbones import base
from early_exit.backbones.base import update_statistics
from early_exit.backbones.efficientnet import EfficientNetConfig
from early_exit.backbones.mobilenet_v2 import MobileNetV2Config
from early_exit.backbones.vit import ViTConfig
from early_exit.cost import multiply_adds
from early_exit.exits.heads import ExitConfig
from early_exit.exits.multi_exit import MultiExit
from early_exit.pretrained import convnext, deit, efficientnet, families, mobilenet_v2, vit
from early_exit.pretrained.load import load
from early_exit.runs import assemble

FIXTURES = Path(__file__).parents[1] / "fixtures"
# Networks, and the heads that are tried on them: where hidden states are alike, heads are.
HEADS = {
    "tiny_vit": ("linear", "layer"),
    "tiny_deit": ("norm",),
    "tiny_mobilenet_v2": ("linear",),
    "tiny_efficientnet": ("grid",),
    "tiny_convnext": ("mlp",),
}
NAMES = tuple(HEADS)


@functools.partial(jax.jit, static_argnames="config")
def run(params, images, config):
    """Everything that a fixture holds."""
    model = base.merge(base.described(config)[0], params)
    hidden, context = model.stem({"images": images})
    states = [hidden]
    for block in range(config.depth):
        states.append(model.run_blocks(states[-1], block, block + 1, context))
    found = {f"hidden_{i}": state for i, state in enumerate(states)}
    found |= {"images": images, "features": model.features(states[-1], context)}
    return found | ({"logits": model.readout(states[-1], context)} if config.num_classes else {})


@pytest.fixture(scope="module", params=NAMES)
def case(request):
    """(the loaded network, what torch says, what it says itself)."""
    pretrained = load(str(FIXTURES / request.param))
    assert set(HEADS[request.param]) <= set(pretrained.config.head_kinds)
    with np.load(FIXTURES / request.param / "expected.npz", allow_pickle=False) as file:
        expected = dict(file)
    return pretrained, expected, run(pretrained.params, expected["images"], pretrained.config)


def test_features_logits_and_every_hidden_state(case):
    _, expected, found = case
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        np.testing.assert_allclose(found[name], value, rtol=0, atol=1e-4, err_msg=name)
        assert np.abs(value).mean() > 0.03, name


def test_composed_segments_are_the_full_forward_pass(case):
    """From each split to the end, and from the stem to it, one operation after the other, so that
    no compiler sees what follows."""
    pretrained, _, found = case
    depth = pretrained.config.depth
    model = base.merge(base.described(pretrained.config)[0], pretrained.params)
    for start, stop in [(i, depth) for i in range(depth)] + [(0, depth // 2)]:
        after = model.run_blocks(found[f"hidden_{start}"], start, stop, None)
        np.testing.assert_allclose(after, found[f"hidden_{stop}"], rtol=0, atol=1e-5)


def test_heads_stand_everywhere_and_are_counted(case):
    """Each kind reads what is there, as wide as it is there, a row at a time."""
    pretrained, expected, _ = case
    config, points = pretrained.config, (1, pretrained.config.depth - 1)
    rng = np.random.default_rng(0)
    for kind in HEADS[Path(pretrained.source).name]:
        model = MultiExit(config, ExitConfig(points, kind, gate=True))
        exits = jax.tree.map(
            lambda x: jnp.asarray(rng.normal(0, 0.3, x.shape), x.dtype), model.abstract_exits()
        )
        bound = model.bind({"backbone": pretrained.params, "exits": exits})
        for e, point in enumerate(points):
            state = jnp.asarray(expected[f"hidden_{point}"])
            whole = bound.exit_logits(e, state, None, [])
            assert whole.shape == (2, config.num_classes) and np.isfinite(whole).all()
            alone = bound.exit_logits(e, state[1:], None, [])
            np.testing.assert_allclose(alone[0], whole[1], atol=1e-5 * np.abs(whole).max())
    costs = multiply_adds.backbone(config)
    assert len(costs.blocks) == config.depth and min(cost.bytes for cost in costs.blocks) > 0
    assert (np.diff(multiply_adds.leaving(model, costs)) > 0).all()


def test_a_transformer_s_heads_are_copied_from_it():
    pretrained = load(str(FIXTURES / "tiny_vit"))
    model = MultiExit(pretrained.config, ExitConfig((2,), "layer"))
    head = model.init_exits(jax.random.key(0), pretrained.params, "copy", None)["2"]
    params = pretrained.params
    for part, source in (
        ("block", params["blocks"]["2"]),
        ("norm", params["final_norm"]),
        ("output", params["output"]),
    ):
        jax.tree.map(np.testing.assert_array_equal, head[part], source)
    # With the block that it lacks, the head after block 2 of 3 says what the network says.
    with np.load(FIXTURES / "tiny_vit/expected.npz") as expected:
        bound = model.bind({"backbone": params, "exits": {"2": head}})
        said = bound.exit_logits(0, jnp.asarray(expected["hidden_2"]), None, [])
        np.testing.assert_allclose(said, expected["logits"], rtol=0, atol=1e-4)


def test_positions_for_another_image_are_torch_s_bicubic_ones():
    """Against torch.nn.functional.interpolate(…, (3, 7), mode="bicubic") of arange(20) % 7."""
    from early_exit.backbones import vit as backbone

    table = (np.arange(20) % 7).reshape(4, 5).astype(np.float32)
    down, right = backbone._bicubic(4, 3), backbone._bicubic(5, 7)
    np.testing.assert_allclose(down @ table @ right.T, BICUBIC, atol=1e-5)
    np.testing.assert_allclose(down.sum(1), 1, atol=1e-12)
    np.testing.assert_allclose(backbone._bicubic(6, 6), np.eye(6), atol=1e-12)


BICUBIC = [
    [0.673598, 1.345731, 1.784627, 1.626158, 2.234176, 3.201959, 3.835971],
    [4.577534, 5.567692, 4.889076, 2.5, 3.443195, 2.279884, 0.095298],
    [1.173599, 1.714781, 2.613828, 3.373842, 4.172833, 4.425835, 4.237757],
]


def test_an_image_of_another_size_has_positions_of_its_own():
    pretrained = load(str(FIXTURES / "tiny_vit"))
    images = np.random.default_rng(0).normal(size=(2, 24, 16, 3)).astype(np.float32)
    model = base.merge(base.described(pretrained.config)[0], pretrained.params)
    hidden, _ = model.stem({"images": images})
    assert hidden.shape == (2, 1 + 6 * 4, 20)
    with pytest.raises(ValueError, match="images of 16 × 3 pixels hold no patch of 4 × 4"):
        model.stem({"images": images[:, :16, :3]})
    with pytest.raises(ValueError, match=r"images are \[B, H, W, 3\], channels last"):
        model.stem({"images": images[..., :1]})


def test_the_mean_of_patches_leaves_tokens_out():
    config = ViTConfig(
        token_width=8, depth=2, heads=2, mlp_width=8, num_classes=3, image_size=(8, 8),
        patch_size=(4, 4), pooling="mean", distilled=True,
    )  # fmt: skip
    hidden = jax.random.normal(jax.random.key(0), (2, 6, 8))
    np.testing.assert_allclose(config.pool(hidden, None), hidden[:, 2:].mean(1), atol=1e-6)
    family, hf = families.writing(config)
    assert family is deit and hf["early_exit"] == {"num_classes": 3, "pooling": "mean"}
    names = [entry.name for entry in family.entries(config)]
    assert families.reading(family, hf, names) == config


def test_moments_of_a_batch_move_statistics_in_training():
    """All but the last unit's, which is the readout's."""
    pretrained = load(str(FIXTURES / "tiny_efficientnet"))
    config, params = pretrained.config, pretrained.params
    images = np.random.default_rng(0).normal(size=(4, 33, 40, 3)).astype(np.float32)

    @jax.jit
    def moments(params):
        model = base.merge(base.described(config)[0], params)
        hidden, _, moved = model.stem_training({"images": images})
        _, more = model.run_blocks_training(hidden, 0, config.depth, None)
        return moved | more

    found = moments(params)
    every = {path for path in tree.flatten(params) if path.endswith(("norm/mean", "norm/variance"))}
    assert found.keys() == {path for path in every if not path.startswith("last/")}
    moved = tree.flatten(update_statistics(params, found))
    still = tree.flatten(params)
    changed = {path for path in still if not np.array_equal(still[path], moved[path])}
    assert changed == found.keys()


def test_published_sizes():
    """Sandler et al. 2018, table 2; Tan & Le 2019, table 2; torchvision's numbers of parameters."""
    shapes = MobileNetV2Config(1000).blocks
    assert [s.outputs for s in shapes[::5]] == [24, 64, 96, 320]
    assert [s.inner for s in shapes[:3]] == [96, 144, 144]
    assert MobileNetV2Config(1000, multiplier=1.4).width == 1792
    assert MobileNetV2Config(1000, multiplier=0.5).width == 1280
    counts = {
        mobilenet_v2.config({"architectures": ["MobileNetV2ForImageClassification"]}): 3_504_872,
        vit.config({"architectures": ["ViTForImageClassification"]}): 86_567_656,
        convnext.config({"architectures": ["ConvNextForImageClassification"]}): 28_589_128,
        EfficientNetConfig.published(0): 5_288_548,
    }
    for config, count in counts.items():
        config = dataclasses.replace(config, num_classes=1000)
        flat = tree.flatten(base.described(config)[1])
        learnt = [x.size for path, x in flat.items() if not path.endswith(("/mean", "/variance"))]
        assert sum(learnt) == count


@pytest.mark.parametrize(
    ("family", "entries", "message"),
    [
        (vit, {"hidden_act": "relu6"}, "ViT needs .*: hidden_act = 'relu6' .supported: relu, "),
        (vit, {"architectures": ["ViTForMaskedImageModeling"]}, "architectures = 'ViTForMasked"),
        (vit, {"pooler_act": "relu", "pooler_output_size": 5}, "pooler_act = .*; pooler_outp"),
        (deit, {"architectures": ["ViTModel"]}, "DeiT needs .* architectures = 'ViTModel'"),
        (deit, {"quantization_config": {}}, "quantization_config = {}"),
        (mobilenet_v2, {"hidden_act": "hard_swish"}, "hidden_act = 'hard_swish' .supported: relu6"),
        (mobilenet_v2, {"architectures": ["MobileNetV2ForSemanticSegmentation"]}, "Segmentation"),
        (mobilenet_v2, {"depth_multiplier": 0}, "multiplier=0 and divisor=8 make no widths"),
        (efficientnet, {"pooling_type": "max"}, "pooling_type = 'max' .supported: mean"),
        (efficientnet, {"hidden_dim": 1280}, "hidden_dim = 1280 .supported: 2560"),
        (efficientnet, {"strides": [1, 2]}, "must name the same stages, each with a block: .*'inp"),
        (efficientnet, {"hidden_act": "mish", "width_coefficient": 1.0}, "hidden_act .*hidden_dim"),
        (convnext, {"num_stages": 3}, "num_stages = 3 .supported: 4"),
        (convnext, {"architectures": ["ConvNextBackbone"]}, "architectures = 'ConvNextBackbone'"),
        (convnext, {"depths": [1, 2]}, "must name the same stages"),
        (vit, {"hidden_size": 50}, "token_width=50 is no multiple of heads=12"),
        (vit, {"image_size": 8}, r"no patch of \(16, 16\) fits into \(8, 8\) pixels"),
    ],
)  # fmt: skip
def test_what_a_backbone_does_not_do_is_named(family, entries, message):
    with pytest.raises(ValueError, match=message):
        family.config(entries)


def test_new_ones_are_made_of_settings_as_files_have_them():
    sizes = {"token_width": 8, "depth": 2, "heads": 2, "mlp_width": 8, "num_classes": 3}
    made = assemble._new({"family": "vit", "image_size": 32, "patch_size": [8, 4], **sizes})
    assert made == ViTConfig(image_size=(32, 32), patch_size=(8, 4), **sizes)
    assert assemble._new({"family": "efficientnet", "number": 1}).depth == 23
    with pytest.raises(ValueError, match="no EfficientNet-B7; choose one of 0, 1, 2, 3, 4"):
        assemble._new({"family": "efficientnet", "number": 7})


@pytest.mark.parametrize("name", NAMES)
def test_a_damaged_table_of_tensors_is_told_whole(name, tmp_path):
    """A part more than there is, in the words of each family."""
    hf = json.loads((FIXTURES / name / "config.json").read_text())
    layer = {"num_hidden_layers": 4}, r"missing: \w+.encoder.layer.3.attention.attention.key.bias"
    changes, wanted = {
        "tiny_vit": layer,
        "tiny_deit": layer,
        "tiny_mobilenet_v2": (
            {"first_layer_is_expansion": False},
            "missing: mobilenet_v2.conv_stem.expand_1x1.convolution.weight",
        ),
        "tiny_efficientnet": (
            {"num_block_repeats": [1, 2, 2]},
            "missing: efficientnet.encoder.blocks.7.squeeze_excite.reduce.bias",
        ),
        "tiny_convnext": (
            {"depths": [1, 2, 2]},
            "missing: convnext.encoder.stages.2.layers.1.layer_scale_parameter",
        ),
    }[name]
    hf |= changes
    (tmp_path / "config.json").write_text(json.dumps(hf))
    (tmp_path / "model.safetensors").write_bytes(
        (FIXTURES / name / "model.safetensors").read_bytes()
    )
    with pytest.raises(ValueError, match=wanted):
        load(str(tmp_path))
