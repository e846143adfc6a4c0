"""RoBERTa and its namesakes: transformers' config and tensor names → the encoder's, and back.

They are BERT but for two things: positions count real tokens, from the number after the padding's,
and the dense layer in front of the classifier belongs to the classification head.
"""

from typing import Any

from early_exit.backbones.encoder import EncoderConfig
from early_exit.pretrained import bert
from early_exit.pretrained.table import Entry

# `model_type` → what the names of its classes begin with.
_FAMILIES = {"roberta": "Roberta", "xlm-roberta": "XLMRoberta", "camembert": "Camembert"}

MODEL_TYPES = tuple(_FAMILIES)
PREFIXES = ("roberta.", "")
# Beside a classification head, old checkpoints hold a pooler that it does not use.
IGNORED = (r"^lm_head\.", r"embeddings\.(position|token_type)_ids$", r"^roberta\.pooler\.")
adapted, nearest = bert.adapted, bert.nearest


def config(hf: dict[str, Any]) -> EncoderConfig:
    """A `config.json` as an `EncoderConfig`.

    Raises:
      ValueError: entries are missing, or ask for what the encoder does not do (all are named).
    """
    hf = {"pad_token_id": 1} | hf
    asked = bert.asked(hf, _FAMILIES[hf.get("model_type", "roberta")])
    bert.check(hf, (*bert.NEEDED, "pad_token_id"), asked)
    return bert.encoder_config(hf, pad_position=hf["pad_token_id"])


def to_hf(config: EncoderConfig) -> dict[str, Any]:
    """The `config.json` with which `transformers` builds the same network, as a RoBERTa."""
    hf = {"model_type": "roberta", "pad_token_id": config.pad_position}
    return hf | bert.encoder_hf(config, "Roberta")


def entries(config: EncoderConfig) -> list[Entry]:
    """Every tensor of a checkpoint."""
    found = bert.encoder_entries(config, "roberta.")
    if config.num_classes:
        found += bert.layer("classifier.dense", "pooler") + bert.classifier("classifier.out_proj")
    elif config.pooler != "none":
        found += bert.layer("roberta.pooler.dense", "pooler")
    return found
