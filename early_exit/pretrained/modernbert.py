"""ModernBERT: transformers' config and tensor names → the encoder's, and back.

A checkpoint for sequence classification becomes a backbone with an output matrix, any other a bare
encoder: heads that predict masked words are left out.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

from early_exit.backbones.modernbert import ModernBertConfig
from early_exit.pretrained import bert
from early_exit.pretrained.table import TRANSPOSED, Entry, Fused

MODEL_TYPES = ("modernbert",)
NEW = {"modernbert": ModernBertConfig}
PREFIXES = ("model.", "")
IGNORED = (r"^head\.", r"^decoder\.")

_NEEDED = ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads")
_NEEDED += ("intermediate_size", "max_position_embeddings")
_FULL, _NEAR = "full_attention", "sliding_attention"
_THETAS = {_FULL: ("global_rope_theta", 160_000.0), _NEAR: ("local_rope_theta", 10_000.0)}
_POOLINGS = {"cls": "first", "mean": "mean"}
_TASKS = ("Model", "ForSequenceClassification", "ForMaskedLM")


def config(hf: dict[str, Any]) -> ModernBertConfig:
    """A `config.json` as a `ModernBertConfig`.

    Raises:
      ValueError: entries are missing, or ask for what the encoder does not do (all are named).
    """
    asked = {
        "architectures": (
            bert.architecture(hf) or "ModernBertModel",
            [f"ModernBert{task}" for task in _TASKS],
        ),
        "hidden_activation": (hf.get("hidden_activation", "gelu"), bert.ACTIVATIONS),
        "classifier_activation": (hf.get("classifier_activation", "gelu"), bert.ACTIVATIONS),
        "classifier_pooling": (hf.get("classifier_pooling", "cls"), _POOLINGS),
        "quantization_config": (hf.get("quantization_config"), [None]),
        "rope_scaling": (hf.get("rope_scaling"), [None]),
    }
    ropes = {kind: _rope(hf, kind) for kind in _THETAS}
    for kind, rope in ropes.items():
        asked[f"rope_type of {kind}"] = rope.get("rope_type", "default"), ["default"]
    bert.check(hf, _NEEDED, asked)
    depth, every = hf["num_hidden_layers"], hf.get("global_attn_every_n_layers", 3)
    types = hf.get("layer_types") or [_NEAR if i % every else _FULL for i in range(depth)]
    if len(types) != depth or not set(types) <= set(_THETAS):
        raise ValueError(f"layer_types = {types} does not name {_FULL} or {_NEAR} {depth} times")
    return ModernBertConfig(
        vocab_size=hf["vocab_size"],
        width=hf["hidden_size"],
        depth=depth,
        heads=hf["num_attention_heads"],
        mlp_width=hf["intermediate_size"],
        context_length=hf["max_position_embeddings"],
        num_classes=bert.num_classes(hf),
        window=hf.get("local_attention", 128) // 2 + 1,
        full_blocks=tuple(i for i, kind in enumerate(types) if kind == _FULL),
        rope_theta=ropes[_FULL]["rope_theta"],
        local_rope_theta=ropes[_NEAR]["rope_theta"],
        norm_bias=hf.get("norm_bias", False),
        attention_bias=hf.get("attention_bias", False),
        mlp_bias=hf.get("mlp_bias", False),
        pooler_bias=hf.get("classifier_bias", False),
        activation=bert.ACTIVATIONS[hf.get("hidden_activation", "gelu")],
        pooler_activation=bert.ACTIVATIONS[hf.get("classifier_activation", "gelu")],
        norm_eps=hf.get("norm_eps", 1e-5),
        pooling=_POOLINGS[hf.get("classifier_pooling", "cls")],
    )


def _rope(hf: Mapping[str, Any], kind: str) -> dict[str, Any]:
    """How positions turn in blocks of a kind, as either version of transformers writes it."""
    old, usual = _THETAS[kind]
    said = (hf.get("rope_parameters") or {}).get(kind) or {}
    return {"rope_theta": hf.get(old) or usual} | said


def nearest(config: ModernBertConfig) -> ModernBertConfig:
    """The bare encoder, whose pooler and classifier transformers does not have."""
    return dataclasses.replace(config, num_classes=0)


def to_hf(config: ModernBertConfig) -> dict[str, Any]:
    """The `config.json` with which `transformers` builds the same network."""
    thetas = {_FULL: config.rope_theta, _NEAR: config.local_rope_theta}
    types = [_FULL if i in config.full_blocks else _NEAR for i in range(config.depth)]
    return bert.task_hf(config, "ModernBert") | {
        "model_type": "modernbert",
        "vocab_size": config.vocab_size,
        "hidden_size": config.width,
        "num_hidden_layers": config.depth,
        "num_attention_heads": config.heads,
        "intermediate_size": config.mlp_width,
        "max_position_embeddings": config.context_length,
        "local_attention": 2 * (config.window - 1),
        "layer_types": types,
        "rope_parameters": {
            kind: {"rope_type": "default", "rope_theta": theta} for kind, theta in thetas.items()
        },
        "norm_bias": config.norm_bias,
        "attention_bias": config.attention_bias,
        "mlp_bias": config.mlp_bias,
        "classifier_bias": config.pooler_bias,
        "hidden_activation": bert.WRITTEN_ACTIVATIONS[config.activation],
        "classifier_activation": bert.WRITTEN_ACTIVATIONS[config.pooler_activation],
        "norm_eps": config.norm_eps,
        "classifier_pooling": {ours: said for said, ours in _POOLINGS.items()}[config.pooling],
    }


def entries(config: ModernBertConfig) -> list[Entry]:
    """Every tensor of a checkpoint."""
    c = config

    def norm(theirs: str, ours: str) -> list[Entry]:
        return bert.norm(theirs, ours)[: 2 if c.norm_bias else 1]

    def layer(theirs: str, ours: str, bias: bool) -> list[Entry]:
        return bert.layer(theirs, ours)[: 2 if bias else 1]

    def fused(theirs: str, parts: list[str], size: int, bias: bool) -> list[Entry]:
        sizes = (size,) * len(parts)
        kernels, biases = (tuple(f"{part}/{x}" for part in parts) for x in ("kernel", "bias"))
        found = [Entry(f"{theirs}.weight", kernels, Fused(sizes, 0, TRANSPOSED))]
        return [*found, Entry(f"{theirs}.bias", biases, Fused(sizes, 0))] if bias else found

    found = [Entry("model.embeddings.tok_embeddings.weight", ("words/embedding",))]
    found += norm("model.embeddings.norm", "words_norm")
    for i in range(c.depth):
        theirs, ours = f"model.layers.{i}.", f"blocks/{i}/"
        heads = [f"{ours}attention/{part}" for part in ("query", "key", "value")]
        if i:
            found += norm(f"{theirs}attn_norm", f"{ours}attention_norm")
        found += fused(f"{theirs}attn.Wqkv", heads, c.width, c.attention_bias)
        found += layer(f"{theirs}attn.Wo", f"{ours}attention/output", c.attention_bias)
        found += norm(f"{theirs}mlp_norm", f"{ours}mlp_norm")
        gated = [f"{ours}mlp/gate", f"{ours}mlp/up"]
        found += fused(f"{theirs}mlp.Wi", gated, c.mlp_width, c.mlp_bias)
        found += layer(f"{theirs}mlp.Wo", f"{ours}mlp/down", c.mlp_bias)
    found += norm("model.final_norm", "final_norm")
    if c.num_classes:
        found += layer("head.dense", "pooler/dense", c.pooler_bias)
        found += norm("head.norm", "pooler/norm") + bert.classifier("classifier")
    return found
