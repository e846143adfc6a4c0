"""BERT: transformers' config and tensor names → the encoder's, and back.

A checkpoint for sequence classification becomes a backbone with an output matrix, any other a bare
encoder: heads that predict masked words are left out. What BERT's relatives share is here too.
"""

import dataclasses
from collections.abc import Collection, Iterable, Mapping
from typing import Any

from early_exit.backbones.encoder import EncoderConfig
from early_exit.pretrained.table import TRANSPOSED, Entry

MODEL_TYPES = ("bert",)
NEW = {"encoder": EncoderConfig}
PREFIXES = ("bert.", "")
IGNORED = (r"^cls\.", r"embeddings\.(position|token_type)_ids$")

# transformers' names of the activations → ours; of several the first is written back.
ACTIVATIONS = {
    "gelu": "gelu",
    "gelu_python": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "relu": "relu",
    "silu": "silu",
    "swish": "silu",
}
WRITTEN_ACTIVATIONS = {ours: theirs for theirs, ours in reversed(ACTIVATIONS.items())}

# What BERT's and RoBERTa's configs cannot do without.
NEEDED = ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads")
NEEDED += ("intermediate_size", "max_position_embeddings")

_CLASSIFICATION = "ForSequenceClassification"
_TASKS = ("Model", _CLASSIFICATION, "ForMaskedLM", "ForPreTraining")


def config(hf: dict[str, Any]) -> EncoderConfig:
    """A `config.json` as an `EncoderConfig`.

    Raises:
      ValueError: entries are missing, or ask for what the encoder does not do (all are named).
    """
    check(hf, NEEDED, asked(hf, "Bert"))
    return encoder_config(hf)


def adapted(config: EncoderConfig, names: Collection[str]) -> EncoderConfig:
    """The config for a checkpoint of these tensor names.

    A bare encoder may have been saved with or without the pooler, and no `config.json` says which.
    """
    if config.num_classes or any(name.endswith("pooler.dense.weight") for name in names):
        return config
    return dataclasses.replace(config, pooler="none")


def nearest(config: EncoderConfig) -> EncoderConfig:
    """What of an encoder every one in transformers can be: the bare one, without a classifier.

    Its classifiers read the first position, through a dense layer of their own.
    """
    return dataclasses.replace(config, num_classes=0, pooling="first")


def to_hf(config: EncoderConfig) -> dict[str, Any]:
    """The `config.json` with which `transformers` builds the same network."""
    return {"model_type": "bert"} | encoder_hf(config, "Bert")


def entries(config: EncoderConfig) -> list[Entry]:
    """Every tensor of a checkpoint."""
    found = encoder_entries(config, "bert.")
    if config.pooler != "none":
        found += layer("bert.pooler.dense", "pooler")
    if config.num_classes:
        found += classifier("classifier")
    return found


def asked(hf: dict[str, Any], family: str) -> dict[str, tuple[Any, Collection]]:
    """Name → (what a `config.json` asks for, what is supported), where the two may differ.

    Args:
      family: what the names of its classes in `transformers` begin with.
    """
    return {
        "architectures": (architecture(hf) or f"{family}Model", [family + t for t in _TASKS]),
        "hidden_act": (hf.get("hidden_act", "gelu"), ACTIVATIONS),
        "position_embedding_type": (hf.get("position_embedding_type", "absolute"), ["absolute"]),
        "is_decoder": (hf.get("is_decoder", False), [False]),
        "add_cross_attention": (hf.get("add_cross_attention", False), [False]),
        "quantization_config": (hf.get("quantization_config"), [None]),
    }


def check(
    hf: Mapping[str, Any], needed: Iterable[str], asked: Mapping[str, tuple[Any, Collection]]
) -> None:
    """Raises ValueError naming every entry that is missing and all that is not supported."""
    problems = [f"the model's config lacks {name!r}" for name in needed if hf.get(name) is None]
    problems += [
        f"{name} = {value!r}, which the encoder does not do (but {', '.join(map(repr, supported))})"
        for name, (value, supported) in asked.items()
        if value not in list(supported)
    ]
    if problems:
        raise ValueError("; ".join(problems))


def encoder_config(hf: dict[str, Any], pad_position: int | None = None) -> EncoderConfig:
    """A `config.json` of BERT's or RoBERTa's as an `EncoderConfig`."""
    unused = 0 if pad_position is None else pad_position + 1
    return EncoderConfig(
        vocab_size=hf["vocab_size"],
        width=hf["hidden_size"],
        depth=hf["num_hidden_layers"],
        heads=hf["num_attention_heads"],
        mlp_width=hf["intermediate_size"],
        context_length=hf["max_position_embeddings"] - unused,
        num_classes=num_classes(hf),
        token_types=hf.get("type_vocab_size", 2),
        pad_position=pad_position,
        activation=ACTIVATIONS[hf.get("hidden_act", "gelu")],
        norm_eps=hf.get("layer_norm_eps", 1e-12),
    )


def encoder_hf(config: EncoderConfig, family: str) -> dict[str, Any]:
    """The inverse of `encoder_config`.

    Raises:
      ValueError: an encoder without token types, which neither can be.
    """
    if not config.token_types:
        raise ValueError(f"a {family} has token types, and this encoder has none")
    unused = 0 if config.pad_position is None else config.pad_position + 1
    return task_hf(config, family) | {
        "vocab_size": config.vocab_size,
        "hidden_size": config.width,
        "num_hidden_layers": config.depth,
        "num_attention_heads": config.heads,
        "intermediate_size": config.mlp_width,
        "max_position_embeddings": config.context_length + unused,
        "type_vocab_size": config.token_types,
        "hidden_act": WRITTEN_ACTIVATIONS[config.activation],
        "layer_norm_eps": config.norm_eps,
    }


def architecture(hf: dict[str, Any]) -> str | None:
    return (hf.get("architectures") or [None])[0]


def num_classes(hf: dict[str, Any]) -> int:
    """Of a checkpoint for classification; 0 for any other."""
    if not (architecture(hf) or "").endswith(_CLASSIFICATION):
        return 0
    # transformers leaves its default, two classes, out of the file.
    return len(hf.get("id2label") or ()) or hf.get("num_labels", 2)


def task_hf(config: EncoderConfig, family: str) -> dict[str, Any]:
    """The inverse of `num_classes`. The classes have no names of their own."""
    if not config.num_classes:
        return {"architectures": [family + "Model"]}
    labels = [f"LABEL_{i}" for i in range(config.num_classes)]
    return {
        "architectures": [family + _CLASSIFICATION],
        "id2label": {str(i): label for i, label in enumerate(labels)},
        "label2id": {label: i for i, label in enumerate(labels)},
    }


def layer(theirs: str, ours: str) -> list[Entry]:
    """A linear layer."""
    return [
        Entry(f"{theirs}.weight", (f"{ours}/kernel",), TRANSPOSED),
        Entry(f"{theirs}.bias", (f"{ours}/bias",)),
    ]


def norm(theirs: str, ours: str) -> list[Entry]:
    return [
        Entry(f"{theirs}.weight", (f"{ours}/scale",)),
        Entry(f"{theirs}.bias", (f"{ours}/bias",)),
    ]


def classifier(theirs: str) -> list[Entry]:
    return [
        Entry(f"{theirs}.weight", ("output/embedding",)),
        Entry(f"{theirs}.bias", ("output/bias",)),
    ]


def encoder_entries(config: EncoderConfig, prefix: str) -> list[Entry]:
    """The embeddings and blocks, which RoBERTa names alike."""
    theirs, ours = f"{prefix}embeddings.", "embeddings/"
    found = [
        Entry(f"{theirs}word_embeddings.weight", (f"{ours}words/embedding",)),
        Entry(f"{theirs}position_embeddings.weight", (f"{ours}positions/embedding",)),
        Entry(f"{theirs}token_type_embeddings.weight", (f"{ours}token_types/embedding",)),
        *norm(f"{theirs}LayerNorm", f"{ours}norm"),
    ]
    for i in range(config.depth):
        theirs, ours = f"{prefix}encoder.layer.{i}.", f"blocks/{i}/"
        for part in ("query", "key", "value"):
            found += layer(f"{theirs}attention.self.{part}", f"{ours}attention/{part}")
        found += layer(f"{theirs}attention.output.dense", f"{ours}attention/output")
        found += norm(f"{theirs}attention.output.LayerNorm", f"{ours}attention_norm")
        found += layer(f"{theirs}intermediate.dense", f"{ours}mlp/up")
        found += layer(f"{theirs}output.dense", f"{ours}mlp/down")
        found += norm(f"{theirs}output.LayerNorm", f"{ours}mlp_norm")
    return found
