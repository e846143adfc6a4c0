"""Qwen2-MoE, Qwen3-MoE and OLMoE: transformers' config and tensors → the decoder's, and
back.

Decoders whose feed-forward parts are mixtures of experts (`backbones.mixture`).
"""

from typing import Any

from early_exit.backbones.decoder import DecoderConfig
from early_exit.backbones.mixture import Mixture
from early_exit.pretrained import decoders, usual

_CLASSES = {
    "qwen2_moe": "Qwen2MoeForCausalLM",
    "qwen3_moe": "Qwen3MoeForCausalLM",
    "olmoe": "OlmoeForCausalLM",
}
MODEL_TYPES = tuple(_CLASSES)
PREFIXES, IGNORED = usual.PREFIXES, usual.IGNORED
entries = usual.entries

# transformers' for absent entries, where it is not the one that follows from the others.
_QWEN = {"use_sliding_window": False, "decoder_sparse_step": 1, "norm_topk_prob": False}
_DEFAULTS = {
    "qwen2_moe": _QWEN
    | {
        "num_key_value_heads": 16,
        "moe_intermediate_size": 1408,
        "shared_expert_intermediate_size": 5632,
        "num_experts_per_tok": 4,
        "num_experts": 60,
        "qkv_bias": True,
        "router_aux_loss_coef": 0.001,
    },
    "qwen3_moe": _QWEN
    | {
        "num_key_value_heads": 4,
        "moe_intermediate_size": 768,
        "num_experts_per_tok": 8,
        "num_experts": 128,
        "router_aux_loss_coef": 0.001,
    },
    "olmoe": {
        "rms_norm_eps": 1e-5,
        "num_experts_per_tok": 8,
        "num_experts": 64,
        "norm_topk_prob": False,
        "router_aux_loss_coef": 0.01,
    },
}


def config(hf: dict[str, Any]) -> DecoderConfig:
    """A `config.json` as a `DecoderConfig`.

    Raises:
      ValueError: entries are missing, or ask for what the decoder does not do (all are named).
    """
    kind = hf.get("model_type")
    hf = _DEFAULTS[kind] | hf
    rope = decoders.rope_entries(hf)
    asked = {
        "partial_rotary_factor": (rope["partial_rotary_factor"], (1,)),
        "clip_qkv": (hf.get("clip_qkv"), (None,)),
        "use_sliding_window": (hf.get("use_sliding_window", False), (False,)),
    }
    usual.check(hf, rope, asked, others=decoders.unknown_rope(hf))
    has_bias = kind != "qwen2_moe" and bool(hf.get("attention_bias"))
    return usual.config(
        hf,
        rope,
        qkv_bias=has_bias or (kind == "qwen2_moe" and bool(hf["qkv_bias"])),
        attention_output_bias=has_bias,
        qk_norm=kind != "qwen2_moe",
        qk_norm_whole=kind == "olmoe",
        mixture=_mixture(kind, hf),
    )


def _mixture(kind: str, hf: dict[str, Any]) -> Mixture:
    dense = set(hf.get("mlp_only_layers") or ())
    if every := hf.get("decoder_sparse_step"):
        dense |= {block for block in range(hf["num_hidden_layers"]) if (block + 1) % every}
    return Mixture(
        experts=hf.get("num_local_experts") or hf["num_experts"],  # two names of one entry
        chosen=hf["num_experts_per_tok"],
        width=hf.get("moe_intermediate_size") or hf["intermediate_size"],
        renormalised=bool(hf["norm_topk_prob"]),
        shared_width=hf["shared_expert_intermediate_size"] if kind == "qwen2_moe" else 0,
        dense_blocks=tuple(sorted(dense)),
        balance=float(hf["router_aux_loss_coef"]),
    )


def to_hf(decoder: DecoderConfig) -> dict[str, Any]:
    """The `config.json` with which `transformers` builds the same network.

    Raises:
      ValueError: none of the model types can be it.
    """
    d, m = decoder, decoder.mixture
    common = usual.to_hf(d) | {
        "num_experts": m.experts,
        "num_local_experts": m.experts,
        "num_experts_per_tok": m.chosen,
        "norm_topk_prob": m.renormalised,
        "router_aux_loss_coef": m.balance,
    }
    qwen = {
        "moe_intermediate_size": m.width,
        "decoder_sparse_step": 1,
        "mlp_only_layers": list(m.dense_blocks),
    }
    own = {
        "qwen2_moe": qwen
        | {"qkv_bias": d.qkv_bias, "shared_expert_intermediate_size": m.shared_width},
        "qwen3_moe": qwen | {"attention_bias": d.attention_output_bias},
        "olmoe": {"attention_bias": d.attention_output_bias},
    }
    return decoders.first_that_says(d, config, common, _CLASSES, own)
