"""DeBERTa-v3: transformers' config (`deberta-v2`) and tensor names → the encoder's, and back.

A checkpoint for sequence classification becomes a backbone with an output matrix, any other a bare
encoder: the heads of its pretraining are left out.
"""

import dataclasses
from typing import Any

from early_exit.backbones.deberta import DebertaConfig
from early_exit.pretrained import bert
from early_exit.pretrained.table import Entry

MODEL_TYPES = ("deberta-v2",)
NEW = {"deberta": DebertaConfig}
PREFIXES = ("deberta.", "")
IGNORED = (
    r"^(cls|lm_predictions|mask_predictions|lm_head)\.",
    r"embeddings\.(position_ids$|position_embeddings\.)",
)

_TASKS = ("Model", "ForSequenceClassification", "ForMaskedLM")
# What of the many that its code can be the third version is: entry → (default, what is supported).
_THIRD = {
    "relative_attention": (False, [True]),
    "share_att_key": (False, [True]),
    "position_biased_input": (True, [False]),
    "norm_rel_ebd": ("none", ["layer_norm"]),
    "conv_kernel_size": (0, [0]),
    "quantization_config": (None, [None]),
}


def config(hf: dict[str, Any]) -> DebertaConfig:
    """A `config.json` as a `DebertaConfig`.

    Raises:
      ValueError: entries are missing, or ask for what the encoder does not do (all are named).
    """
    width = hf.get("hidden_size")
    kinds = hf.get("pos_att_type") or []
    kinds = kinds.lower().split("|") if isinstance(kinds, str) else kinds
    kinds = "|".join(sorted(kind.strip() for kind in kinds))
    asked = {name: (hf.get(name, usual), known) for name, (usual, known) in _THIRD.items()}
    asked |= {
        "architectures": (
            bert.architecture(hf) or "DebertaV2Model",
            [f"DebertaV2{task}" for task in _TASKS],
        ),
        "hidden_act": (hf.get("hidden_act", "gelu"), bert.ACTIVATIONS),
        "pooler_hidden_act": (hf.get("pooler_hidden_act", "gelu"), bert.ACTIVATIONS),
        "pos_att_type": (kinds, ["c2p|p2c"]),
        "embedding_size": (hf.get("embedding_size", width), [width]),
        "pooler_hidden_size": (hf.get("pooler_hidden_size", width), [width]),
    }
    bert.check(hf, (*bert.NEEDED, "position_buckets"), asked)
    longest, furthest = hf["max_position_embeddings"], hf.get("max_relative_positions", -1)
    return DebertaConfig(
        vocab_size=hf["vocab_size"],
        width=width,
        depth=hf["num_hidden_layers"],
        heads=hf["num_attention_heads"],
        mlp_width=hf["intermediate_size"],
        context_length=longest,
        buckets=hf["position_buckets"],
        furthest=longest if furthest < 1 else furthest,
        num_classes=bert.num_classes(hf),
        token_types=hf.get("type_vocab_size", 0),
        activation=bert.ACTIVATIONS[hf.get("hidden_act", "gelu")],
        pooler_activation=bert.ACTIVATIONS[hf.get("pooler_hidden_act", "gelu")],
        norm_eps=hf.get("layer_norm_eps", 1e-7),
    )


def nearest(config: DebertaConfig) -> DebertaConfig:
    """The bare encoder."""
    return dataclasses.replace(config, num_classes=0)


def to_hf(config: DebertaConfig) -> dict[str, Any]:
    """The `config.json` with which `transformers` builds the same network."""
    return bert.task_hf(config, "DebertaV2") | {
        "model_type": "deberta-v2",
        "vocab_size": config.vocab_size,
        "hidden_size": config.width,
        "num_hidden_layers": config.depth,
        "num_attention_heads": config.heads,
        "intermediate_size": config.mlp_width,
        "max_position_embeddings": config.context_length,
        "max_relative_positions": config.furthest,
        "position_buckets": config.buckets,
        "relative_attention": True,
        "share_att_key": True,
        "position_biased_input": False,
        "norm_rel_ebd": "layer_norm",
        "pos_att_type": ["p2c", "c2p"],
        "type_vocab_size": config.token_types,
        "hidden_act": bert.WRITTEN_ACTIVATIONS[config.activation],
        "pooler_hidden_act": bert.WRITTEN_ACTIVATIONS[config.pooler_activation],
        "pooler_hidden_size": config.width,
        "layer_norm_eps": config.norm_eps,
    }


def entries(config: DebertaConfig) -> list[Entry]:
    """Every tensor of a checkpoint."""
    theirs = "deberta.embeddings."
    found = [Entry(f"{theirs}word_embeddings.weight", ("words/embedding",))]
    if config.token_types:
        found.append(Entry(f"{theirs}token_type_embeddings.weight", ("token_types/embedding",)))
    found += bert.norm(f"{theirs}LayerNorm", "words_norm")
    found.append(Entry("deberta.encoder.rel_embeddings.weight", ("distances/embedding",)))
    found += bert.norm("deberta.encoder.LayerNorm", "distances_norm")
    for i in range(config.depth):
        theirs, ours = f"deberta.encoder.layer.{i}.", f"blocks/{i}/"
        for part in ("query", "key", "value"):
            found += bert.layer(f"{theirs}attention.self.{part}_proj", f"{ours}attention/{part}")
        found += bert.layer(f"{theirs}attention.output.dense", f"{ours}attention/output")
        found += bert.norm(f"{theirs}attention.output.LayerNorm", f"{ours}attention_norm")
        found += bert.layer(f"{theirs}intermediate.dense", f"{ours}mlp/up")
        found += bert.layer(f"{theirs}output.dense", f"{ours}mlp/down")
        found += bert.norm(f"{theirs}output.LayerNorm", f"{ours}mlp_norm")
    if config.num_classes:
        found += bert.layer("pooler.dense", "pooler") + bert.classifier("classifier")
    return found
