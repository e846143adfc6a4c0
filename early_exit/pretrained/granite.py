"""Granite: transformers' config and tensors → the decoder's, and back.

A Llama whose embeddings, scores, parts of blocks and logits have a multiplier each.
"""

from typing import Any

from early_exit.backbones.decoder import DecoderConfig
from early_exit.pretrained import decoders, usual

MODEL_TYPES = ("granite",)
PREFIXES, IGNORED = usual.PREFIXES, usual.IGNORED
entries = usual.entries

# Their name → ours; all are 1 where they are absent.
_MULTIPLIERS = {
    "embedding_multiplier": "embedding_scale",
    "attention_multiplier": "attention_scale",
    "residual_multiplier": "residual_scale",
    "logits_scaling": "logit_divisor",
}


def config(hf: dict[str, Any]) -> DecoderConfig:
    """A `config.json` as a `DecoderConfig`.

    Raises:
      ValueError: entries are missing, or ask for what the decoder does not do (all are named).
    """
    rope = decoders.rope_entries(hf)
    asked = {"partial_rotary_factor": (rope["partial_rotary_factor"], (1,))}
    usual.check(hf, rope, asked, others=decoders.unknown_rope(hf))
    has_bias = bool(hf.get("attention_bias"))
    return usual.config(
        hf,
        rope,
        qkv_bias=has_bias,
        attention_output_bias=has_bias,
        mlp_bias=bool(hf.get("mlp_bias")),
        **{ours: float(hf.get(theirs, 1.0)) for theirs, ours in _MULTIPLIERS.items()},
    )


def to_hf(decoder: DecoderConfig) -> dict[str, Any]:
    """The `config.json` with which `transformers` builds the same network."""
    d = decoder
    own = {"attention_bias": d.attention_output_bias, "mlp_bias": d.mlp_bias}
    own |= {theirs: getattr(d, ours) for theirs, ours in _MULTIPLIERS.items()}
    classes = {"granite": "GraniteForCausalLM"}
    return decoders.first_that_says(d, config, usual.to_hf(d), classes, {"granite": own})
