"""T5, Flan-T5 and mT5: transformers' config and tensors → the encoder–decoder's, and back.

Versions differ in the feed-forward part, and in the output matrix: the first shares the embedding
and scales logits, later ones have a matrix of their own. Files say so in several ways, of which the
tensor's presence is the surest.
"""

import dataclasses
from collections.abc import Collection
from typing import Any

from early_exit.backbones.t5 import T5Config
from early_exit.pretrained import decoders
from early_exit.pretrained.table import STORED, TRANSPOSED, Entry

MODEL_TYPES = ("t5", "mt5")
PREFIXES = ("",)
# The biases that older files have for attention to the prompt; nobody reads them.
IGNORED = (r"EncDecAttention\.relative_attention_bias\.weight$",)

_NEEDED = ("vocab_size", "d_model", "d_kv", "d_ff", "num_layers", "num_heads")
_OUTPUT = "lm_head.weight"
_GATED = "gated-"
# "gated-gelu" has always meant the one by tanh.
_WRITTEN = {"relu": "relu", "silu": "silu", "gelu": "gelu_python", "gelu_tanh": "gelu_new"}


def config(hf: dict[str, Any]) -> T5Config:
    """A `config.json` as a `T5Config`.

    Raises:
      ValueError: entries are missing, or ask for what the network does not do (all are named).
    """
    part = hf.get("feed_forward_proj", "gated-gelu" if hf.get("model_type") == "mt5" else "relu")
    name = "gelu_new" if part == f"{_GATED}gelu" else part.removeprefix(_GATED)
    asked = {
        "feed_forward_proj": (name, decoders.ACTIVATIONS),
        "is_encoder_decoder": (hf.get("is_encoder_decoder", True), (True,)),
        "is_decoder": (hf.get("is_decoder", False), (False,)),
    }
    decoders.check(hf, _NEEDED, asked)
    ties = hf.get("tie_word_embeddings") is not False
    scaled = hf.get("scale_decoder_outputs", ties and hf.get("model_type") != "mt5")
    start = hf.get("decoder_start_token_id")
    return T5Config(
        vocab_size=hf["vocab_size"],
        width=hf["d_model"],
        depth=hf.get("num_decoder_layers") or hf["num_layers"],
        encoder_depth=hf["num_layers"],
        heads=hf["num_heads"],
        head_dim=hf["d_kv"],
        mlp_width=hf["d_ff"],
        context_length=hf.get("n_positions") or 512,
        norm_eps=hf.get("layer_norm_epsilon", 1e-6),
        gated=part.startswith(_GATED),
        activation=decoders.ACTIVATIONS[name],
        buckets=hf.get("relative_attention_num_buckets", 32),
        max_distance=hf.get("relative_attention_max_distance", 128),
        tied=ties,
        scaled=scaled,
        start_id=(hf.get("pad_token_id") or 0) if start is None else start,
    )


def adapted(config: T5Config, names: Collection[str]) -> T5Config:
    """With a matrix of its own where there is one: newer files call theirs tied nevertheless."""
    has_own = not config.scaled and _OUTPUT in names
    return dataclasses.replace(config, tied=False) if has_own else config


def to_hf(config: T5Config) -> dict[str, Any]:
    """The `config.json` with which `transformers` builds the same network."""
    c = config
    written = "gelu" if c.gated and c.activation == "gelu_tanh" else _WRITTEN[c.activation]
    return {
        "architectures": ["T5ForConditionalGeneration"],
        "model_type": "t5",
        "is_encoder_decoder": True,
        "vocab_size": c.vocab_size,
        "d_model": c.width,
        "d_kv": c.head_dim,
        "d_ff": c.mlp_width,
        "num_layers": c.encoder_depth,
        "num_decoder_layers": c.depth,
        "num_heads": c.heads,
        "n_positions": c.context_length,
        "layer_norm_epsilon": c.norm_eps,
        "feed_forward_proj": (_GATED if c.gated else "") + written,
        "relative_attention_num_buckets": c.buckets,
        "relative_attention_max_distance": c.max_distance,
        "tie_word_embeddings": c.tied,
        "scale_decoder_outputs": c.scaled,
        "decoder_start_token_id": c.start_id,
    }


def entries(config: T5Config) -> list[Entry]:
    """Every tensor of a checkpoint."""
    found = [
        Entry("shared.weight", ("embedding/embedding",)),
        Entry("encoder.embed_tokens.weight", ("embedding/embedding",), optional=True),
        Entry("decoder.embed_tokens.weight", ("embedding/embedding",), optional=True),
    ]
    sides = (
        ("encoder", "encoder/", config.encoder_depth, ("attention", "mlp")),
        ("decoder", "", config.depth, ("attention", "cross_attention", "mlp")),
    )
    for theirs, ours, depth, parts in sides:
        bias = f"{theirs}.block.0.layer.0.SelfAttention.relative_attention_bias.weight"
        found.append(Entry(bias, (f"{ours}distances",)))
        found.append(Entry(f"{theirs}.final_layer_norm.weight", (f"{ours}final_norm/scale",)))
        for i in range(depth):
            for place, part in enumerate(parts):
                layer = f"{theirs}.block.{i}.layer.{place}."
                found += _part(config, layer, f"{ours}blocks/{i}/", part)
    if not config.tied:
        found.append(Entry(_OUTPUT, ("output/embedding",)))
    elif config.scaled:  # elsewhere, a matrix that is stored is one of its own
        found.append(Entry(_OUTPUT, ("embedding/embedding",), optional=True))
    return found


_NAMES = {"attention": "SelfAttention", "cross_attention": "EncDecAttention"}
_NORMS = {"attention": "attention_norm", "cross_attention": "cross_norm", "mlp": "mlp_norm"}
_PROJECTIONS = {"q": "query", "k": "key", "v": "value", "o": "output"}


def _part(config: T5Config, theirs: str, block: str, part: str) -> list[Entry]:
    """The tensors of one part of a block, and of the norm in front of it."""
    if part == "mlp":
        name = "DenseReluDense"
        layers = {"wi_0": "gate", "wi_1": "up"} if config.gated else {"wi": "up"}
        layers |= {"wo": "down"}
    else:
        name, layers = _NAMES[part], _PROJECTIONS
    found = [
        Entry(f"{theirs}{name}.{stored}.weight", (f"{block}{part}/{layer}/kernel",), TRANSPOSED)
        for stored, layer in layers.items()
    ]
    return [*found, Entry(f"{theirs}layer_norm.weight", (f"{block}{_NORMS[part]}/scale",), STORED)]
