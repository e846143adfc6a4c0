"""Phi-3, Phi-3.5-mini and Phi-4-mini: transformers' config and tensors → the decoder's, and back.

One stored matrix makes queries, keys and values, and one the gate and what it gates. Long contexts
have divisors of rotary frequencies of their own (`rotary.LongRope`).
"""

import functools
from typing import Any

from early_exit.backbones.decoder import DecoderConfig
from early_exit.pretrained import decoders, usual

MODEL_TYPES = ("phi3",)
PREFIXES, IGNORED = usual.PREFIXES, usual.IGNORED
entries = functools.partial(usual.entries, fused=True)

# transformers' for absent entries, where it is not the one that follows from the others.
_DEFAULTS = {"rms_norm_eps": 1e-5, "original_max_position_embeddings": 4096}
# What the first of these models said; transformers takes each for longrope.
_OLD_KINDS = ("su", "yarn")


def config(hf: dict[str, Any]) -> DecoderConfig:
    """A `config.json` as a `DecoderConfig`.

    Raises:
      ValueError: entries are missing, or ask for what the decoder does not do (all are named).
    """
    hf = _DEFAULTS | hf
    rope = decoders.rope_entries(hf)
    if rope["rope_type"] in _OLD_KINDS:
        rope["rope_type"] = "longrope"
    asked = {
        "rope_type": (rope["rope_type"], ("default", "longrope")),
        "attention_bias": (hf.get("attention_bias", False), (False,)),
    }
    usual.check(hf, rope, asked, others=decoders.unknown_rope(hf))
    depth = hf["num_hidden_layers"] if hf.get("sliding_window") else 0
    return usual.config(
        hf, rope, types=[usual.SLIDING] * depth, rotary_fraction=rope["partial_rotary_factor"]
    )


def to_hf(decoder: DecoderConfig) -> dict[str, Any]:
    """The `config.json` with which `transformers` builds the same network."""
    d, common = decoder, usual.to_hf(decoder)
    rope = common["rope_parameters"] | {"partial_rotary_factor": d.rotary_fraction}
    own = {"sliding_window": d.window, "rope_parameters": rope}
    if "original_max_position_embeddings" in rope:
        # transformers prefers the one outside, whose default is not that of the others.
        own["original_max_position_embeddings"] = rope["original_max_position_embeddings"]
    return decoders.first_that_says(d, config, common, {"phi3": "Phi3ForCausalLM"}, {"phi3": own})
