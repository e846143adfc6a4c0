"""OLMo 2: transformers' config and tensors → the decoder's, and back.

Norms stand behind the parts of a block, and queries and keys are normed with all their heads.
"""

from typing import Any

from early_exit.backbones.decoder import DecoderConfig
from early_exit.pretrained import decoders, usual

MODEL_TYPES = ("olmo2",)
PREFIXES, IGNORED = usual.PREFIXES, usual.IGNORED
entries = usual.entries


def config(hf: dict[str, Any]) -> DecoderConfig:
    """A `config.json` as a `DecoderConfig`.

    Raises:
      ValueError: entries are missing, or ask for what the decoder does not do (all are named).
    """
    hf = {"rms_norm_eps": 1e-5} | hf
    rope = decoders.rope_entries(hf)
    asked = {"partial_rotary_factor": (rope["partial_rotary_factor"], (1,))}
    usual.check(hf, rope, asked, others=decoders.unknown_rope(hf))
    has_bias = bool(hf.get("attention_bias"))
    return usual.config(
        hf,
        rope,
        norms="after",
        qk_norm=True,
        qk_norm_whole=True,
        qkv_bias=has_bias,
        attention_output_bias=has_bias,
    )


def to_hf(decoder: DecoderConfig) -> dict[str, Any]:
    """The `config.json` with which `transformers` builds the same network."""
    own = {"olmo2": {"attention_bias": decoder.attention_output_bias}}
    classes = {"olmo2": "Olmo2ForCausalLM"}
    return decoders.first_that_says(decoder, config, usual.to_hf(decoder), classes, own)
