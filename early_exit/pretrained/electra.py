"""ELECTRA: transformers' config and tensor names → the encoder's, and back.

BERT without a pooler, with tables that may be narrower than hidden states; its classification head
brings a dense layer of its own. The heads of its pretraining are left out.
"""

import dataclasses
from typing import Any

from early_exit.backbones.encoder import EncoderConfig
from early_exit.pretrained import bert
from early_exit.pretrained.table import Entry

MODEL_TYPES = ("electra",)
PREFIXES = ("electra.", "")
IGNORED = (r"^(discriminator|generator)_", r"embeddings\.(position|token_type)_ids$")


def config(hf: dict[str, Any]) -> EncoderConfig:
    """A `config.json` as an `EncoderConfig`.

    Raises:
      ValueError: entries are missing, or ask for what the encoder does not do (all are named).
    """
    bert.check(hf, bert.NEEDED, bert.asked(hf, "Electra"))
    found, narrow = bert.encoder_config(hf), hf.get("embedding_size", 128)
    return dataclasses.replace(
        found,
        pooler="gelu" if found.num_classes else "none",
        embedding_width=0 if narrow == found.width else narrow,
    )


def nearest(config: EncoderConfig) -> EncoderConfig:
    """The bare encoder, which has no dense layer at its end; see `bert.nearest`."""
    return dataclasses.replace(bert.nearest(config), pooler="none")


def to_hf(config: EncoderConfig) -> dict[str, Any]:
    """The `config.json` with which `transformers` builds the same network."""
    narrow = config.embedding_width or config.width
    hf = {"model_type": "electra", "embedding_size": narrow}
    return hf | bert.encoder_hf(config, "Electra")


def entries(config: EncoderConfig) -> list[Entry]:
    """Every tensor of a checkpoint."""
    found = bert.encoder_entries(config, "electra.")
    if config.embedding_width:
        found += bert.layer("electra.embeddings_project", "embeddings/project")
    if config.num_classes:
        found += bert.layer("classifier.dense", "pooler") + bert.classifier("classifier.out_proj")
    return found
