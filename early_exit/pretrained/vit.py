"""ViT as transformers stores it: its config and tensor names → ours, and back; DeiT's, likewise."""

import dataclasses
from collections.abc import Collection
from typing import Any

from early_exit.backbones.vit import ViTConfig
from early_exit.pretrained import bert, images
from early_exit.pretrained.table import CONV, Entry

MODEL_TYPES = ("vit",)
NEW = {"vit": images.new(ViTConfig)}
PREFIXES = ("vit.", "")
IGNORED = (r"embeddings\.mask_token$",)

_CLASSIFICATION, _TAUGHT = "ForImageClassification", "ForImageClassificationWithTeacher"
_FRONT = ("cls_token", "distillation_token")
_ACTIVATIONS = {theirs: ours for theirs, ours in images.ACTIVATIONS.items() if ours != "relu6"}


@dataclasses.dataclass(frozen=True)
class _Leading:
    """One parameter; the tensor has so many axes of length 1 in front."""

    axes: int

    def split(self, array):
        if array.ndim < self.axes + 1 or set(array.shape[: self.axes]) != {1}:
            raise ValueError(f"{array.shape} does not begin with {self.axes} axes of length 1")
        return (array.reshape(array.shape[self.axes :]),)

    def join(self, arrays):
        (array,) = arrays
        return array.reshape((1,) * self.axes + array.shape)


def config(hf: dict[str, Any]) -> ViTConfig:
    """A `config.json` as a `ViTConfig`; absent entries are transformers' defaults.

    Raises:
      ValueError: entries ask for what the backbone does not do (all are named).
    """
    return vit_config(hf, "ViT")


def vit_config(hf: dict[str, Any], family: str, *, distilled: bool = False) -> ViTConfig:
    """The same of one of the families, `ViT` or `DeiT`."""
    activation, width = hf.get("hidden_act", "gelu"), hf.get("hidden_size", 768)
    tasks = ("Model", _CLASSIFICATION, *((_TAUGHT,) if distilled else ()))
    asked = {
        "hidden_act": (activation, _ACTIVATIONS),
        "pooler_act": (hf.get("pooler_act", "tanh"), ["tanh"]),
        "pooler_output_size": (hf.get("pooler_output_size") or width, [width]),
    }
    images.check(hf, family, asked, tasks)
    return ViTConfig(
        token_width=width,
        depth=hf.get("num_hidden_layers", 12),
        heads=hf.get("num_attention_heads", 12),
        mlp_width=hf.get("intermediate_size", 3072),
        num_classes=images.num_classes(hf, tasks[1:]),
        image_size=images.pair(hf.get("image_size", 224)),
        patch_size=images.pair(hf.get("patch_size", 16)),
        channels=hf.get("num_channels", 3),
        distilled=distilled,
        taught=images.architecture(hf) == family + _TAUGHT,
        qkv_bias=hf.get("qkv_bias", True),
        activation=_ACTIVATIONS[activation],
        norm_eps=hf.get("layer_norm_eps", 1e-12),
    )


def adapted(config: ViTConfig, names: Collection[str]) -> ViTConfig:
    """The config for a checkpoint of these tensor names: a bare network may have a pooler or not,
    which no `config.json` says."""
    has_pooler = any(name.endswith("pooler.dense.weight") for name in names)
    return dataclasses.replace(config, pooler=True) if has_pooler else config


def nearest(config: ViTConfig) -> ViTConfig:
    """The bare network: what classifies in transformers reads the first token, without a pooler."""
    return dataclasses.replace(config, num_classes=0, pooling="first", taught=False)


def to_hf(config: ViTConfig) -> dict[str, Any]:
    """The `config.json` with which `transformers` builds the same network.

    Raises:
      ValueError: a DeiT.
    """
    if config.distilled:
        raise ValueError("a ViT has no token of a teacher's, and this network has one")
    return {"model_type": "vit"} | vit_hf(config, "ViT")


def vit_hf(config: ViTConfig, family: str) -> dict[str, Any]:
    """The inverse of `vit_config`."""
    task = _TAUGHT if config.taught else _CLASSIFICATION
    return images.task_hf(config, family, task) | {
        "hidden_size": config.token_width,
        "num_hidden_layers": config.depth,
        "num_attention_heads": config.heads,
        "intermediate_size": config.mlp_width,
        "image_size": images.side(config.image_size),
        "patch_size": images.side(config.patch_size),
        "num_channels": config.channels,
        "qkv_bias": config.qkv_bias,
        "hidden_act": images.ACTIVATION_NAMES[config.activation],
        "layer_norm_eps": config.norm_eps,
    }


def entries(config: ViTConfig) -> list[Entry]:
    """Every tensor of a checkpoint."""
    return vit_entries(config, "vit.")


def vit_entries(config: ViTConfig, prefix: str) -> list[Entry]:
    """The same under a family's prefix."""
    theirs = f"{prefix}embeddings."
    found = [
        Entry(f"{theirs}{name}", ("tokens",), _Leading(2), slice=row)
        for row, name in enumerate(_FRONT[: config.extra])
    ]
    found += [
        Entry(f"{theirs}position_embeddings", ("positions",), _Leading(1)),
        Entry(f"{theirs}patch_embeddings.projection.weight", ("patches/kernel",), CONV),
        Entry(f"{theirs}patch_embeddings.projection.bias", ("patches/bias",)),
    ]
    for i in range(config.depth):
        theirs, ours = f"{prefix}encoder.layer.{i}.", f"blocks/{i}/"
        for part in ("query", "key", "value"):
            both = bert.layer(f"{theirs}attention.attention.{part}", f"{ours}attention/{part}")
            found += both if config.qkv_bias else both[:1]
        found += bert.layer(f"{theirs}attention.output.dense", f"{ours}attention/output")
        found += bert.layer(f"{theirs}intermediate.dense", f"{ours}mlp/up")
        found += bert.layer(f"{theirs}output.dense", f"{ours}mlp/down")
        found += bert.norm(f"{theirs}layernorm_before", f"{ours}attention_norm")
        found += bert.norm(f"{theirs}layernorm_after", f"{ours}mlp_norm")
    found += bert.norm(f"{prefix}layernorm", "final_norm")
    if config.pooler:
        found += bert.layer(f"{prefix}pooler.dense", "pooler")
    if config.taught:
        found += [
            Entry("distillation_classifier.weight", ("taught_output/embedding",)),
            Entry("distillation_classifier.bias", ("taught_output/bias",)),
        ]
    return found + images.classifier(config, "cls_classifier" if config.taught else "classifier")
