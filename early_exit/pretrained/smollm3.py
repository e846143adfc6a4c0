"""SmolLM3: transformers' config and tensors → the decoder's, and back.

Every fourth block does not turn queries and keys by their positions.
"""

from typing import Any

from early_exit.backbones.decoder import DecoderConfig
from early_exit.pretrained import decoders, usual

MODEL_TYPES = ("smollm3",)
PREFIXES, IGNORED = usual.PREFIXES, usual.IGNORED
entries = usual.entries

# transformers' for absent entries, where it is not the one that follows from the others.
_DEFAULTS = {"num_key_value_heads": 4, "no_rope_layer_interval": 4, "tie_word_embeddings": True}
_PLACES = (*decoders.ROPE_PLACES, "no_rope_layers", "no_rope_layer_interval")


def config(hf: dict[str, Any]) -> DecoderConfig:
    """A `config.json` as a `DecoderConfig`.

    Raises:
      ValueError: entries are missing, or ask for what the decoder does not do (all are named).
    """
    hf = _DEFAULTS | hf
    rope = decoders.rope_entries(hf, theta=2_000_000.0)
    depth = hf.get("num_hidden_layers") or 0
    turned = hf.get("no_rope_layers")  # which says 1 of those that have rotary positions
    if turned is None:
        every = hf["no_rope_layer_interval"]
        turned = [int((block + 1) % every != 0) for block in range(depth)]
    types = _layer_types(hf, turned)
    asked = {
        "partial_rotary_factor": (rope["partial_rotary_factor"], (1,)),
        **usual.check_layer_types(hf, types),
    }
    others = decoders.unknown_rope(hf, _PLACES)
    if len(turned) < depth:
        others.append(f"no_rope_layers of {len(turned)} blocks, where there are {depth}")
    usual.check(hf, rope, asked, others=others)
    has_bias = bool(hf.get("attention_bias"))
    return usual.config(
        hf,
        rope,
        types=types,
        unturned_blocks=tuple(block for block in range(depth) if not turned[block]),
        qkv_bias=has_bias,
        attention_output_bias=has_bias,
        mlp_bias=bool(hf.get("mlp_bias")),
    )


def _layer_types(hf: dict[str, Any], turned: list[int]) -> list[str]:
    """What each block attends to: where there is a window, it is of those that are not turned."""
    has_window = hf.get("use_sliding_window") and hf.get("sliding_window") is not None
    depth = hf.get("num_hidden_layers") or 0
    if not has_window:
        return [usual.FULL] * depth
    usually = [usual.FULL if turn else usual.SLIDING for turn in turned[:depth]]
    return hf.get("layer_types") or usually


def to_hf(decoder: DecoderConfig) -> dict[str, Any]:
    """The `config.json` with which `transformers` builds the same network."""
    d = decoder
    own = {
        "attention_bias": d.attention_output_bias,
        "mlp_bias": d.mlp_bias,
        "no_rope_layers": [int(block not in d.unturned_blocks) for block in range(d.depth)],
        "use_sliding_window": d.window is not None,
        "sliding_window": d.window,
        "layer_types": usual.layer_types(d),
    }
    classes = {"smollm3": "SmolLM3ForCausalLM"}
    return decoders.first_that_says(d, config, usual.to_hf(d), classes, {"smollm3": own})
