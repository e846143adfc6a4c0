"""Residual networks under torchvision's names, which timm and most CIFAR repositories share.

Such weights carry no config of transformers'. A folder's `config.json` describes them in one of
two ways: timm's (`{"architecture": "resnet50", "num_classes": 1000}`), as in its repositories on
the hub, or the entries that `to_hf` writes, for any depths, widths and the CIFAR stem.
"""

import dataclasses
from typing import Any

from early_exit.backbones.resnet import ResNetConfig
from early_exit.pretrained.resnet import IGNORED, unit_entries
from early_exit.pretrained.table import Entry

__all__ = ["IGNORED", "MODEL_TYPES", "NEW", "PREFIXES", "config", "entries", "to_hf"]

_OWN = "torchvision_resnet"
# timm's configs have an `architecture` where transformers' have a `model_type`.
MODEL_TYPES = (_OWN, *(f"resnet{layers}" for layers in (18, 34, 50, 101, 152)))
NEW = {"resnet_cifar": ResNetConfig.cifar}
PREFIXES = ("",)


def config(hf: dict[str, Any]) -> ResNetConfig:
    """A `config.json` of either kind as a `ResNetConfig`.

    Raises:
      ValueError: entries are missing, unknown, or ask for what the backbone does not do.
    """
    if hf.get("model_type") != _OWN:
        architecture = hf.get("model_type", hf.get("architecture"))
        if hf.get("model_args"):
            raise ValueError(
                f"this {architecture} was built with model_args = {hf['model_args']}, which "
                f'are not understood; describe it with "model_type": "{_OWN}" instead'
            )
        layers = int(architecture.removeprefix("resnet"))
        return ResNetConfig.imagenet(layers, hf.get("num_classes", 1000))
    described = {name: value for name, value in hf.items() if name not in ("model_type", "dtype")}
    fields = {field.name: field for field in dataclasses.fields(ResNetConfig)}
    missing = [
        name
        for name, field in fields.items()
        if field.default is dataclasses.MISSING and name not in described
    ]
    problems = [f"lacks {name}" for name in missing]
    problems += [f"has the unknown {name}" for name in described if name not in fields]
    if problems:
        raise ValueError(
            f"the config of this {_OWN} {', '.join(problems)}; it may have {', '.join(fields)}"
        )
    return ResNetConfig(
        **{name: tuple(v) if isinstance(v, list) else v for name, v in described.items()}
    )


def to_hf(config: ResNetConfig) -> dict[str, Any]:
    """A `config.json` that says everything; no other library reads it, only the tensors."""
    return {"model_type": _OWN} | dataclasses.asdict(config)


def entries(config: ResNetConfig) -> list[Entry]:
    """Every tensor of a checkpoint."""
    table = [*unit_entries("conv1", "bn1", "entry")]
    for block, shape in enumerate(config.blocks):
        theirs, ours = f"layer{shape.stage + 1}.{shape.index}", f"blocks/{block}"
        for i in range(config.units):
            names = f"{theirs}.conv{i + 1}", f"{theirs}.bn{i + 1}"
            table += unit_entries(*names, f"{ours}/units/{i}")
        if shape.has_shortcut:
            names = f"{theirs}.downsample.0", f"{theirs}.downsample.1"
            table += unit_entries(*names, f"{ours}/shortcut")
    if config.num_classes:
        table.append(Entry("fc.weight", ("output/embedding",)))
        table.append(Entry("fc.bias", ("output/bias",)))
    return table
