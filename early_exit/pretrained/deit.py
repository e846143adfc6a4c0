"""DeiT as transformers stores it: a ViT with a second token, which a teacher taught.

Of the two classifiers of a checkpoint "with teacher", the answer is the mean.
"""

from typing import Any

from early_exit.backbones.vit import ViTConfig
from early_exit.pretrained import vit
from early_exit.pretrained.table import Entry

MODEL_TYPES = ("deit",)
PREFIXES = ("deit.", "")
IGNORED = vit.IGNORED
adapted, nearest = vit.adapted, vit.nearest


def config(hf: dict[str, Any]) -> ViTConfig:
    """A `config.json` as a `ViTConfig`; absent entries are transformers' defaults.

    Raises:
      ValueError: entries ask for what the backbone does not do (all are named).
    """
    return vit.vit_config(hf, "DeiT", distilled=True)


def to_hf(config: ViTConfig) -> dict[str, Any]:
    """The `config.json` with which `transformers` builds the same network.

    Raises:
      ValueError: a ViT.
    """
    if not config.distilled:
        raise ValueError("a DeiT has a token of a teacher's, and this network has none")
    return {"model_type": "deit"} | vit.vit_hf(config, "DeiT")


def entries(config: ViTConfig) -> list[Entry]:
    """Every tensor of a checkpoint."""
    return vit.vit_entries(config, "deit.")
