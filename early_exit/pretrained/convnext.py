"""ConvNeXt as transformers stores it: its config and tensor names → ours, and back."""

from typing import Any

from early_exit.backbones.convnext import ConvNeXtConfig
from early_exit.pretrained import bert, images
from early_exit.pretrained.table import CONV, Entry

MODEL_TYPES = ("convnext",)
NEW = {"convnext": images.new(ConvNeXtConfig)}
PREFIXES = ("convnext.", "")
IGNORED = ()

_CLASSES = "ConvNext"
_ACTIVATIONS = {theirs: ours for theirs, ours in images.ACTIVATIONS.items() if ours != "relu6"}


def config(hf: dict[str, Any]) -> ConvNeXtConfig:
    """A `config.json` as a `ConvNeXtConfig`; absent entries are transformers' defaults.

    Raises:
      ValueError: entries ask for what the backbone does not do (all are named).
    """
    activation = hf.get("hidden_act", "gelu")
    depths = tuple(hf.get("depths") or (3, 3, 9, 3))
    asked = {
        "hidden_act": (activation, _ACTIVATIONS),
        "num_stages": (hf.get("num_stages", len(depths)), [len(depths)]),
    }
    images.check(hf, _CLASSES, asked)
    return ConvNeXtConfig(
        depths=depths,
        widths=tuple(hf.get("hidden_sizes") or (96, 192, 384, 768)),
        num_classes=images.num_classes(hf),
        patch_size=images.pair(hf.get("patch_size", 4)),
        layer_scale=hf.get("layer_scale_init_value", 1e-6) > 0,
        activation=_ACTIVATIONS[activation],
        norm_eps=hf.get("layer_norm_eps", 1e-12),
        channels=hf.get("num_channels", 3),
        image_size=images.pair(hf.get("image_size", 224)),
    )


def to_hf(config: ConvNeXtConfig) -> dict[str, Any]:
    """The `config.json` with which `transformers` builds the same network."""
    return images.task_hf(config, _CLASSES) | {
        "model_type": "convnext",
        "depths": list(config.depths),
        "hidden_sizes": list(config.widths),
        "num_stages": len(config.depths),
        "patch_size": images.side(config.patch_size),
        "layer_scale_init_value": 1e-6 if config.layer_scale else 0.0,
        "hidden_act": images.ACTIVATION_NAMES[config.activation],
        "layer_norm_eps": config.norm_eps,
        "num_channels": config.channels,
        "image_size": images.side(config.image_size),
    }


def entries(config: ConvNeXtConfig) -> list[Entry]:
    """Every tensor of a checkpoint."""

    def conv(theirs: str, ours: str) -> list[Entry]:
        weight = Entry(f"{theirs}.weight", (f"{ours}/kernel",), CONV)
        return [weight, Entry(f"{theirs}.bias", (f"{ours}/bias",))]

    found = conv("convnext.embeddings.patch_embeddings", "patches")
    found += bert.norm("convnext.embeddings.layernorm", "patch_norm")
    for i, shape in enumerate(config.blocks):
        stage, ours = f"convnext.encoder.stages.{shape.stage}.", f"blocks/{i}/"
        if shape.reduces:
            found += bert.norm(f"{stage}downsampling_layer.0", f"{ours}reduce_norm")
            found += conv(f"{stage}downsampling_layer.1", f"{ours}reduce")
        theirs = f"{stage}layers.{shape.index}."
        found += conv(f"{theirs}dwconv", f"{ours}depthwise")
        found += bert.norm(f"{theirs}layernorm", f"{ours}norm")
        found += bert.layer(f"{theirs}pwconv1", f"{ours}up")
        found += bert.layer(f"{theirs}pwconv2", f"{ours}down")
        if config.layer_scale:
            found.append(Entry(f"{theirs}layer_scale_parameter", (f"{ours}layer_scale",)))
    return found + bert.norm("convnext.layernorm", "final_norm") + images.classifier(config)
