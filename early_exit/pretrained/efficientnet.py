"""EfficientNet as transformers stores it: its config and tensor names → ours, and back."""

from typing import Any

from early_exit.backbones.efficientnet import EfficientNetConfig
from early_exit.pretrained import images
from early_exit.pretrained.resnet import unit_entries
from early_exit.pretrained.table import CONV, Entry

MODEL_TYPES = ("efficientnet",)
NEW = {"efficientnet": EfficientNetConfig.published}
PREFIXES = ("efficientnet.", "")
IGNORED = (r"\.num_batches_tracked$",)

_CLASSES = "EfficientNet"
# Entries of each stage → ours.
_STAGES = {
    "in_channels": "inputs",
    "out_channels": "outputs",
    "kernel_sizes": "sizes",
    "strides": "strides",
    "num_block_repeats": "repeats",
    "expand_ratios": "expansions",
    "depthwise_padding": "square",
}


def config(hf: dict[str, Any]) -> EfficientNetConfig:
    """A `config.json` as an `EfficientNetConfig`; absent entries are transformers' defaults, which
    are a B7's.

    Raises:
      ValueError: entries ask for what the backbone does not do (all are named).
    """
    activation = hf.get("hidden_act", "swish")
    found = EfficientNetConfig(
        num_classes=images.num_classes(hf),
        wider=hf.get("width_coefficient", 2.0),
        deeper=hf.get("depth_coefficient", 3.1),
        divisor=hf.get("depth_divisor", 8),
        squeeze=hf.get("squeeze_expansion_ratio", 0.25),
        activation=images.ACTIVATIONS.get(activation, "silu"),
        norm_eps=hf.get("batch_norm_eps", 1e-3),
        channels=hf.get("num_channels", 3),
        image_size=images.pair(hf.get("image_size", 600)),
        **{ours: tuple(hf[theirs]) for theirs, ours in _STAGES.items() if theirs in hf},
    )
    asked = {
        "hidden_act": (activation, images.ACTIVATIONS),
        "pooling_type": (hf.get("pooling_type", "mean"), ["mean"]),
        "hidden_dim": (hf.get("hidden_dim", 2560), [found.width]),
    }
    images.check(hf, _CLASSES, asked)
    return found


def to_hf(config: EfficientNetConfig) -> dict[str, Any]:
    """The `config.json` with which `transformers` builds the same network."""
    hf = images.task_hf(config, _CLASSES) | {
        "model_type": "efficientnet",
        "width_coefficient": config.wider,
        "depth_coefficient": config.deeper,
        "depth_divisor": config.divisor,
        "squeeze_expansion_ratio": config.squeeze,
        "hidden_act": images.ACTIVATION_NAMES[config.activation],
        "hidden_dim": config.width,
        "pooling_type": "mean",
        "batch_norm_eps": config.norm_eps,
        "num_channels": config.channels,
        "image_size": images.side(config.image_size),
    }
    return hf | {theirs: list(getattr(config, ours)) for theirs, ours in _STAGES.items()}


def entries(config: EfficientNetConfig) -> list[Entry]:
    """Every tensor of a checkpoint."""
    table: list[Entry] = []

    def unit(theirs: str, conv: str, norm: str, ours: str) -> None:
        table.extend(unit_entries(theirs + conv, theirs + norm, ours))

    unit("efficientnet.embeddings.", "convolution", "batchnorm", "entry")
    for i, shape in enumerate(config.blocks):
        theirs, ours = f"efficientnet.encoder.blocks.{i}.", f"blocks/{i}/"
        if shape.inner != shape.inputs:
            unit(f"{theirs}expansion.", "expand_conv", "expand_bn", f"{ours}expand")
        names = ("depthwise_conv", "depthwise_norm")
        unit(f"{theirs}depthwise_conv.", *names, f"{ours}depthwise")
        for part in ("reduce", "expand"):
            name, path = f"{theirs}squeeze_excite.{part}", f"{ours}squeeze/{part}"
            table.append(Entry(f"{name}.weight", (f"{path}/kernel",), CONV))
            table.append(Entry(f"{name}.bias", (f"{path}/bias",)))
        unit(f"{theirs}projection.", "project_conv", "project_bn", f"{ours}reduce")
    unit("efficientnet.encoder.", "top_conv", "top_bn", "last")
    return table + images.classifier(config)
