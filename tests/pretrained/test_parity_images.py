"""Classifiers of images against torch and transformers, in one process; sizes at random."""

import pathlib
import runpy

import jax
import numpy as np
import pytest

from early_exit.backbones import base
from early_exit.pretrained.load import load

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

pytestmark = pytest.mark.parity

HELPERS = pathlib.Path(__file__).parents[1] / "fixtures/make_images.py"
VIT = dict(hidden_size=24, num_hidden_layers=2, num_attention_heads=3, intermediate_size=20)
MOBILE = dict(depth_multiplier=0.1, depth_divisible_by=2, min_depth=2, expand_ratio=2.0)
EFFICIENT = dict(
    depth_divisor=2, in_channels=[32, 16], out_channels=[16, 24], num_block_repeats=[2, 2]
)
EFFICIENT |= dict(kernel_sizes=[5, 3], strides=[2, 2], expand_ratios=[1, 2], depth_coefficient=1.0)
CONV = dict(hidden_sizes=[4, 8], depths=[2, 1], num_stages=2)
CASES = {
    "ConvNextModel": CONV | dict(image_size=21, layer_scale_init_value=0.0),
    "ConvNextForImageClassification": CONV | dict(image_size=[24, 16], hidden_act="relu"),
    "ConvNextForImageClassification, grey": CONV
    | dict(image_size=18, num_channels=1, patch_size=3, layer_norm_eps=1e-2),
    "EfficientNetModel": EFFICIENT | dict(width_coefficient=0.1, hidden_dim=128, image_size=29),
    "EfficientNetForImageClassification": EFFICIENT
    | dict(width_coefficient=0.2, hidden_dim=256, image_size=24, depthwise_padding=[2, 0]),
    "EfficientNetForImageClassification, other": EFFICIENT
    | dict(width_coefficient=0.1, hidden_dim=128, image_size=[33, 18], num_channels=1)
    | dict(hidden_act="relu", squeeze_expansion_ratio=0.5, batch_norm_eps=1e-2),
    "ViTModel": VIT | dict(image_size=15, patch_size=5),
    "ViTModel, grey": VIT | dict(num_channels=1, image_size=[20, 12], patch_size=[4, 5]),
    "ViTForImageClassification": VIT
    | dict(qkv_bias=False, hidden_act="relu", num_labels=1, image_size=24, patch_size=8),
    "DeiTModel": VIT | dict(image_size=16, patch_size=4),
    "DeiTForImageClassification": VIT | dict(image_size=9, patch_size=4, num_labels=3),
    "DeiTForImageClassificationWithTeacher": VIT | dict(image_size=12, patch_size=4),
    "MobileNetV2Model": MOBILE | dict(tf_padding=False, image_size=37),
    "MobileNetV2ForImageClassification": MOBILE | dict(output_stride=8, image_size=33),
    "MobileNetV2ForImageClassification, stem": MOBILE
    | dict(first_layer_is_expansion=False, hidden_act="silu", num_channels=1, image_size=[50, 33]),
}


@pytest.fixture(scope="module")
def helpers():
    return runpy.run_path(str(HELPERS))


def forward(pretrained, images):
    """Everything that `evaluate` finds of a network."""

    @jax.jit
    def run(params, images):
        model = base.merge(base.described(pretrained.config)[0], params)
        hidden, context = model.stem({"images": images})
        found = {"hidden_0": hidden}
        for i in range(pretrained.config.depth):
            hidden = model.run_blocks(hidden, i, i + 1, context)
            found[f"hidden_{i + 1}"] = hidden
        found["features"] = model.features(hidden, context)
        if pretrained.config.num_classes:
            found["logits"] = model.readout(hidden, context)
        return found

    return run(pretrained.params, images)


def compare(found, expected):
    assert found.keys() == expected.keys() - {"images"}
    for name, value in found.items():
        np.testing.assert_allclose(value, expected[name], rtol=0, atol=1e-4, err_msg=name)


@pytest.mark.parametrize("name", CASES)
def test_random_networks(name, helpers, tmp_path):
    model = helpers["random_model"](name.split(",")[0], seed=1, **CASES[name])
    model.save_pretrained(tmp_path, max_shard_size="20KB")
    images = helpers["images_of"](model, seed=2)
    compare(forward(load(str(tmp_path)), images), helpers["evaluate"](model, images))


@pytest.mark.parametrize("size", [(12, 12), (20, 36), (33, 8)])
@pytest.mark.parametrize("name", ["ViTForImageClassification", "DeiTForImageClassification"])
def test_positions_for_other_images(name, size, helpers, tmp_path):
    sizes = VIT | dict(image_size=16, patch_size=4)
    model = helpers["random_model"](name, seed=3, **sizes)
    model.save_pretrained(tmp_path)
    images = helpers["random_images"](2, *size, 3, seed=4)
    expected = helpers["evaluate"](model, images, interpolate_pos_encoding=True)
    compare(forward(load(str(tmp_path)), images), expected)
