"""MobileNetV2 as transformers stores it: its config and tensor names → ours, and back."""

from typing import Any

from early_exit.backbones.mobilenet_v2 import MobileNetV2Config
from early_exit.pretrained import images
from early_exit.pretrained.resnet import unit_entries
from early_exit.pretrained.table import Entry

MODEL_TYPES = ("mobilenet_v2",)
NEW = {"mobilenet_v2": images.new(MobileNetV2Config)}
PREFIXES = ("mobilenet_v2.", "")
IGNORED = (r"\.num_batches_tracked$",)

_CLASSES = "MobileNetV2"


def config(hf: dict[str, Any]) -> MobileNetV2Config:
    """A `config.json` as a `MobileNetV2Config`; absent entries are transformers' defaults.

    Raises:
      ValueError: entries ask for what the backbone does not do (all are named).
    """
    activation = hf.get("hidden_act", "relu6")
    images.check(hf, _CLASSES, {"hidden_act": (activation, images.ACTIVATIONS)})
    return MobileNetV2Config(
        num_classes=images.num_classes(hf),
        multiplier=hf.get("depth_multiplier", 1.0),
        divisor=hf.get("depth_divisible_by", 8),
        least=hf.get("min_depth", 8),
        expansion=hf.get("expand_ratio", 6.0),
        output_stride=hf.get("output_stride", 32),
        stem_expands=not hf.get("first_layer_is_expansion", True),
        wide_features=hf.get("finegrained_output", True),
        same=hf.get("tf_padding", True),
        activation=images.ACTIVATIONS[activation],
        norm_eps=hf.get("layer_norm_eps", 1e-3),
        channels=hf.get("num_channels", 3),
        image_size=images.pair(hf.get("image_size", 224)),
    )


def to_hf(config: MobileNetV2Config) -> dict[str, Any]:
    """The `config.json` with which `transformers` builds the same network."""
    return images.task_hf(config, _CLASSES) | {
        "model_type": "mobilenet_v2",
        "depth_multiplier": config.multiplier,
        "depth_divisible_by": config.divisor,
        "min_depth": config.least,
        "expand_ratio": config.expansion,
        "output_stride": config.output_stride,
        "first_layer_is_expansion": not config.stem_expands,
        "finegrained_output": config.wide_features,
        "tf_padding": config.same,
        "hidden_act": images.ACTIVATION_NAMES[config.activation],
        "layer_norm_eps": config.norm_eps,
        "num_channels": config.channels,
        "image_size": images.side(config.image_size),
    }


def entries(config: MobileNetV2Config) -> list[Entry]:
    """Every tensor of a checkpoint."""
    table: list[Entry] = []

    def unit(theirs: str, ours: str) -> None:
        names = (f"mobilenet_v2.{theirs}.{part}" for part in ("convolution", "normalization"))
        table.extend(unit_entries(*names, ours))

    unit("conv_stem.first_conv", "entry/first")
    if config.stem_expands:
        unit("conv_stem.expand_1x1", "entry/expand")
    unit("conv_stem.conv_3x3", "entry/depthwise")
    unit("conv_stem.reduce_1x1", "entry/reduce")
    for i in range(config.depth):
        unit(f"layer.{i}.expand_1x1", f"blocks/{i}/expand")
        unit(f"layer.{i}.conv_3x3", f"blocks/{i}/depthwise")
        unit(f"layer.{i}.reduce_1x1", f"blocks/{i}/reduce")
    unit("conv_1x1", "last")
    return table + images.classifier(config)
