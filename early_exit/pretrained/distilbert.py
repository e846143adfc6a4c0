"""DistilBERT: transformers' config and tensor names → the encoder's, and back.

BERT without token types and pooler; the classification head brings a dense layer of its own.
"""

import dataclasses
from typing import Any

from early_exit.backbones.encoder import EncoderConfig
from early_exit.pretrained import bert
from early_exit.pretrained.table import Entry

MODEL_TYPES = ("distilbert",)
PREFIXES = ("distilbert.", "")
IGNORED = (r"^vocab_(transform|layer_norm|projector)\.", r"embeddings\.position_ids$")

_NEEDED = ("vocab_size", "dim", "n_layers", "n_heads", "hidden_dim", "max_position_embeddings")


def config(hf: dict[str, Any]) -> EncoderConfig:
    """A `config.json` as an `EncoderConfig`.

    Raises:
      ValueError: entries are missing, or ask for what the encoder does not do (all are named).
    """
    asked = bert.asked(hf, "DistilBert")
    asked = {name: asked[name] for name in ("architectures", "quantization_config")}
    activation = hf.get("activation", "gelu")
    bert.check(hf, _NEEDED, asked | {"activation": (activation, bert.ACTIVATIONS)})
    classes = bert.num_classes(hf)
    return EncoderConfig(
        vocab_size=hf["vocab_size"],
        width=hf["dim"],
        depth=hf["n_layers"],
        heads=hf["n_heads"],
        mlp_width=hf["hidden_dim"],
        context_length=hf["max_position_embeddings"],
        num_classes=classes,
        token_types=0,
        pooler="relu" if classes else "none",
        activation=bert.ACTIVATIONS[activation],
        norm_eps=1e-12,
    )


def nearest(config: EncoderConfig) -> EncoderConfig:
    """The bare encoder, which has no dense layer at its end; see `bert.nearest`."""
    return dataclasses.replace(bert.nearest(config), pooler="none")


def to_hf(config: EncoderConfig) -> dict[str, Any]:
    """The `config.json` with which `transformers` builds the same network."""
    return bert.task_hf(config, "DistilBert") | {
        "model_type": "distilbert",
        "vocab_size": config.vocab_size,
        "dim": config.width,
        "n_layers": config.depth,
        "n_heads": config.heads,
        "hidden_dim": config.mlp_width,
        "max_position_embeddings": config.context_length,
        "activation": bert.WRITTEN_ACTIVATIONS[config.activation],
    }


def entries(config: EncoderConfig) -> list[Entry]:
    """Every tensor of a checkpoint."""
    theirs, ours = "distilbert.embeddings.", "embeddings/"
    found = [
        Entry(f"{theirs}word_embeddings.weight", (f"{ours}words/embedding",)),
        Entry(f"{theirs}position_embeddings.weight", (f"{ours}positions/embedding",)),
        *bert.norm(f"{theirs}LayerNorm", f"{ours}norm"),
    ]
    for i in range(config.depth):
        theirs, ours = f"distilbert.transformer.layer.{i}.", f"blocks/{i}/"
        for letter, part in (("q", "query"), ("k", "key"), ("v", "value"), ("out", "output")):
            found += bert.layer(f"{theirs}attention.{letter}_lin", f"{ours}attention/{part}")
        found += bert.norm(f"{theirs}sa_layer_norm", f"{ours}attention_norm")
        found += bert.layer(f"{theirs}ffn.lin1", f"{ours}mlp/up")
        found += bert.layer(f"{theirs}ffn.lin2", f"{ours}mlp/down")
        found += bert.norm(f"{theirs}output_layer_norm", f"{ours}mlp_norm")
    if config.num_classes:
        found += bert.layer("pre_classifier", "pooler") + bert.classifier("classifier")
    return found
