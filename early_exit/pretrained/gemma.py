"""Gemma 2 and the text models of Gemma 3: transformers' config and tensors → the decoder's, and
back.

Norms are of the form 1 + scale, four in a block; blocks with a window alternate with blocks
without. Gemma 2 softly caps scores and logits. Gemma 3 norms queries and keys instead, and its
blocks with a window have rotary frequencies of their own.
"""

from typing import Any

from early_exit.backbones.decoder import DecoderConfig
from early_exit.pretrained import decoders, usual

_CLASSES = {"gemma2": "Gemma2ForCausalLM", "gemma3_text": "Gemma3ForCausalLM"}
MODEL_TYPES = tuple(_CLASSES)
PREFIXES, IGNORED = usual.PREFIXES, usual.IGNORED
entries = usual.entries

_ACTIVATION = "hidden_activation"
_ACTIVATION_NAMES = decoders.ACTIVATION_NAMES | {"gelu_tanh": "gelu_pytorch_tanh"}
# transformers' for absent entries.
_COMMON = {
    "num_key_value_heads": 4,
    "head_dim": 256,
    _ACTIVATION: "gelu_pytorch_tanh",
    "tie_word_embeddings": True,
    "query_pre_attn_scalar": 256,
    "sliding_window": 4096,
}
_DEFAULTS = {
    "gemma2": {"final_logit_softcapping": 30.0, "attn_logit_softcapping": 50.0},
    "gemma3_text": {"sliding_window_pattern": 6},
}
_PLACES = (*decoders.ROPE_PLACES, "rope_local_base_freq")
_KINDS = {usual.FULL, usual.SLIDING}
_GLOBAL_THETA, _LOCAL_THETA = 1_000_000.0, 10_000.0


def config(hf: dict[str, Any]) -> DecoderConfig:
    """A `config.json` as a `DecoderConfig`.

    Raises:
      ValueError: entries are missing, or ask for what the decoder does not do (all are named).
    """
    kind = hf.get("model_type")
    hf = _COMMON | _DEFAULTS[kind] | hf
    is_third = kind == "gemma3_text"
    rope, local = _ropes(hf) if is_third else (decoders.rope_entries(hf), None)
    types = _layer_types(hf)
    asked = {
        "partial_rotary_factor": (
            hf.get("partial_rotary_factor") or rope["partial_rotary_factor"],
            (1,),
        ),
        "use_bidirectional_attention": (hf.get("use_bidirectional_attention"), (None, False)),
        **usual.check_layer_types(hf, types),
    }
    if is_third:
        local_kind = local["rope_type"], local["partial_rotary_factor"]
        asked |= {
            "rope_type of blocks with a window": (local_kind, (("default", 1.0),)),
            # Which transformers does not read.
            "attn_logit_softcapping": (hf.get("attn_logit_softcapping"), (None,)),
        }
    others = decoders.unknown_rope(hf, _PLACES if is_third else decoders.ROPE_PLACES)
    if is_third and (unread := (hf.get("rope_parameters") or {}).keys() - _KINDS):
        others.append(
            f"rope_parameters of {', '.join(sorted(unread))}, which are not kinds of block"
        )
    if usual.SLIDING in types and not hf["sliding_window"]:
        others.append(f"sliding_window = {hf['sliding_window']!r} of blocks with a window")
    usual.check(hf, rope, asked, activation=_ACTIVATION, others=others)
    has_bias, is_windowed = bool(hf.get("attention_bias")), usual.SLIDING in types
    return usual.config(
        hf,
        rope,
        activation=_ACTIVATION,
        types=types,
        norm="rms_offset",
        norms="both",
        qk_norm=is_third,
        qkv_bias=has_bias,
        attention_output_bias=has_bias,
        embedding_scale=hf["hidden_size"] ** 0.5,
        attention_scale=hf["query_pre_attn_scalar"] ** -0.5,
        attention_cap=hf.get("attn_logit_softcapping"),
        logit_cap=hf.get("final_logit_softcapping"),
        local_rope_theta=local["rope_theta"] if is_third and is_windowed else None,
    )


def _ropes(hf: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """`decoders.rope_entries` of blocks without a window, and of those with one.

    transformers 5 has both in `rope_parameters`; before, `rope_theta` and `rope_scaling` were the
    one's and `rope_local_base_freq` the other's.
    """
    nested = hf.get("rope_parameters") or {}
    longest = {"max_position_embeddings": hf.get("max_position_embeddings")}
    everywhere = dict(nested.get(usual.FULL) or {}) | dict(hf.get("rope_scaling") or {})
    near = dict(nested.get(usual.SLIDING) or {})
    found = []
    for rope, outside, theta in (
        (everywhere, "rope_theta", _GLOBAL_THETA),
        (near, "rope_local_base_freq", _LOCAL_THETA),
    ):
        theta = theta if hf.get(outside) is None else hf[outside]
        found.append(decoders.rope_entries({"rope_parameters": rope} | longest, theta))
    return tuple(found)


def _layer_types(hf: dict[str, Any]) -> list[str]:
    """What each block attends to: a window, but in every second block, or every sixth."""
    every = hf.get("sliding_window_pattern", 2)
    usually = [
        usual.SLIDING if (block + 1) % every else usual.FULL
        for block in range(hf.get("num_hidden_layers") or 0)
    ]
    return hf.get("layer_types") or usually


def to_hf(decoder: DecoderConfig) -> dict[str, Any]:
    """The `config.json` with which `transformers` builds the same network.

    Raises:
      ValueError: none of the model types can be it.
    """
    d, common = decoder, usual.to_hf(decoder)
    del common["hidden_act"]
    common |= {
        _ACTIVATION: _ACTIVATION_NAMES[d.activation],
        "attention_bias": d.attention_output_bias,
        "query_pre_attn_scalar": round((d.attention_scale or 1.0) ** -2),
        "sliding_window": d.window or _COMMON["sliding_window"],
        "layer_types": usual.layer_types(d),
        "attn_logit_softcapping": d.attention_cap,
        "final_logit_softcapping": d.logit_cap,
    }
    near = {"rope_theta": d.local_rope_theta or _LOCAL_THETA, "rope_type": "default"}
    ropes = {usual.FULL: common["rope_parameters"], usual.SLIDING: near}
    own = {"gemma2": {}, "gemma3_text": {"rope_parameters": ropes}}
    return decoders.first_that_says(d, config, common, _CLASSES, own)
