"""Residual networks as transformers stores them: its config and tensor names → ours, and back."""

from collections.abc import Iterator
from typing import Any

from early_exit.backbones.resnet import ResNetConfig
from early_exit.pretrained.table import CONV, Entry

MODEL_TYPES = ("resnet",)
NEW = {"resnet_imagenet": ResNetConfig.imagenet}
PREFIXES = ("resnet.", "")
IGNORED = (r"\.num_batches_tracked$",)

_CLASSIFIER = "ResNetForImageClassification"


def config(hf: dict[str, Any]) -> ResNetConfig:
    """A `config.json` as a `ResNetConfig`; absent entries are transformers' defaults.

    Raises:
      ValueError: entries ask for what the backbone does not do (all are named), or contradict one
        another.
    """
    refused = []
    activation = hf.get("hidden_act", "relu")
    if activation != "relu":
        refused.append(f"hidden_act = {activation!r} (only 'relu' is supported)")
    architectures = hf.get("architectures") or ["ResNetModel"]
    if architectures[0] not in (_CLASSIFIER, "ResNetModel"):
        refused.append(
            f"architectures = {architectures} (only {_CLASSIFIER} and ResNetModel are supported)"
        )
    if refused:
        raise ValueError(f"this ResNet needs what the backbone does not do: {'; '.join(refused)}")
    labels = len(hf["id2label"]) if hf.get("id2label") is not None else hf.get("num_labels", 2)
    return ResNetConfig(
        depths=tuple(hf.get("depths", (3, 4, 6, 3))),
        widths=tuple(hf.get("hidden_sizes", (256, 512, 1024, 2048))),
        num_classes=labels if architectures[0] == _CLASSIFIER else 0,
        block=hf.get("layer_type", "bottleneck"),
        stem="imagenet",
        stem_width=hf.get("embedding_size", 64),
        channels=hf.get("num_channels", 3),
        first_stride=2 if hf.get("downsample_in_first_stage", False) else 1,
        early_stride=hf.get("downsample_in_bottleneck", False),
    )


def to_hf(config: ResNetConfig) -> dict[str, Any]:
    """The `config.json` with which `transformers` builds the same network.

    Raises:
      ValueError: it cannot.
    """
    if config.stem != "imagenet":
        raise ValueError(
            f"transformers' ResNet has no {config.stem!r} stem; export with torchvision's names"
        )
    hf = {
        "architectures": [_CLASSIFIER if config.num_classes else "ResNetModel"],
        "model_type": "resnet",
        "num_channels": config.channels,
        "embedding_size": config.stem_width,
        "hidden_sizes": list(config.widths),
        "depths": list(config.depths),
        "layer_type": config.block,
        "hidden_act": "relu",
        "downsample_in_first_stage": config.first_stride == 2,
        "downsample_in_bottleneck": config.early_stride,
    }
    if config.num_classes:
        labels = [f"LABEL_{i}" for i in range(config.num_classes)]
        hf["id2label"] = {str(i): label for i, label in enumerate(labels)}
        hf["label2id"] = {label: i for i, label in enumerate(labels)}
    return hf


def entries(config: ResNetConfig) -> list[Entry]:
    """Every tensor of a checkpoint."""

    def unit(theirs: str, ours: str) -> Iterator[Entry]:
        return unit_entries(f"{theirs}.convolution", f"{theirs}.normalization", ours)

    table = [*unit("resnet.embedder.embedder", "entry")]
    for block, shape in enumerate(config.blocks):
        theirs = f"resnet.encoder.stages.{shape.stage}.layers.{shape.index}"
        for i in range(config.units):
            table += unit(f"{theirs}.layer.{i}", f"blocks/{block}/units/{i}")
        if shape.has_shortcut:
            table += unit(f"{theirs}.shortcut", f"blocks/{block}/shortcut")
    if config.num_classes:
        table.append(Entry("classifier.1.weight", ("output/embedding",)))
        table.append(Entry("classifier.1.bias", ("output/bias",)))
    return table


def unit_entries(convolution: str, norm: str, ours: str) -> Iterator[Entry]:
    """The tensors of a convolution and of its BatchNorm, by their names in torch."""
    yield Entry(f"{convolution}.weight", (f"{ours}/conv/kernel",), CONV)
    yield Entry(f"{norm}.weight", (f"{ours}/norm/scale",))
    yield Entry(f"{norm}.bias", (f"{ours}/norm/bias",))
    yield Entry(f"{norm}.running_mean", (f"{ours}/norm/mean",))
    yield Entry(f"{norm}.running_var", (f"{ours}/norm/variance",))
