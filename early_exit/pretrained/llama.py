"""Llama and its relatives (SmolLM2, Mistral, Qwen2, Qwen3): transformers' config and tensors →
the decoder's, and back.

The first example of what a family is (`families.Family`).
"""

from typing import Any

from early_exit.backbones.decoder import DecoderConfig
from early_exit.pretrained import decoders, usual

_CLASSES = {
    "llama": "LlamaForCausalLM",
    "mistral": "MistralForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
}
MODEL_TYPES = tuple(_CLASSES)
NEW = {"decoder": DecoderConfig}
PREFIXES, IGNORED = usual.PREFIXES, usual.IGNORED
entries = usual.entries

# Where transformers' default for an absent entry is not the one that follows from the others.
_DEFAULTS = {
    "mistral": {"num_key_value_heads": 8, "sliding_window": 4096},
    "qwen2": {"num_key_value_heads": 32, "sliding_window": 4096, "max_window_layers": 28},
    "qwen3": {
        "num_key_value_heads": 32,
        "head_dim": 128,
        "sliding_window": 4096,
        "max_window_layers": 28,
    },
}


def config(hf: dict[str, Any]) -> DecoderConfig:
    """A `config.json` as a `DecoderConfig`.

    Raises:
      ValueError: entries are missing, or ask for what the decoder does not do (all are named).
    """
    kind = hf.get("model_type", "llama")
    hf = _DEFAULTS.get(kind, {}) | hf
    rope = decoders.rope_entries(hf)
    types = _layer_types(kind, hf)
    asked = {
        "partial_rotary_factor": (rope["partial_rotary_factor"], (1,)),
        **usual.check_layer_types(hf, types),
    }
    if kind == "llama":
        asked["sliding_window"] = (hf.get("sliding_window"), (None,))
    usual.check(hf, rope, asked, others=decoders.unknown_rope(hf))
    all_biases = kind in ("llama", "qwen3") and bool(hf.get("attention_bias"))
    return usual.config(
        hf,
        rope,
        types=types,
        qkv_bias=all_biases or kind == "qwen2",
        attention_output_bias=all_biases,
        mlp_bias=kind == "llama" and bool(hf.get("mlp_bias")),
        qk_norm=kind == "qwen3",
    )


def _layer_types(kind: str, hf: dict[str, Any]) -> list[str]:
    """What each block attends to; Qwen switches the window on by itself."""
    window, depth = hf.get("sliding_window"), hf.get("num_hidden_layers") or 0
    if kind == "llama" or not window:
        return [usual.FULL] * depth
    if kind == "mistral":
        return [usual.SLIDING] * depth
    if not hf.get("use_sliding_window"):
        return [usual.FULL] * depth
    full = min(hf["max_window_layers"], depth)
    return hf.get("layer_types") or [usual.FULL] * full + [usual.SLIDING] * (depth - full)


def to_hf(decoder: DecoderConfig) -> dict[str, Any]:
    """The `config.json` with which `transformers` builds the same network.

    Raises:
      ValueError: none of the model types can be it.
    """
    d = decoder
    windows = {
        "use_sliding_window": d.window is not None,
        "sliding_window": d.window,
        "max_window_layers": d.depth,
        "layer_types": usual.layer_types(d),
    }
    own = {
        "llama": {"attention_bias": d.attention_output_bias, "mlp_bias": d.mlp_bias},
        "mistral": {"sliding_window": d.window},
        "qwen2": windows,
        "qwen3": windows | {"attention_bias": d.attention_output_bias},
    }
    if d.width % d.heads:  # transformers refuses such a Llama, but not the same as a Mistral
        del own["llama"]
    return decoders.first_that_says(decoder, config, usual.to_hf(d), _CLASSES, own)
