"""Llama and its relatives (SmolLM2, Mistral, Qwen2, Qwen3): transformers' config and tensors →
the decoder's, and back.

The first example of what a family is (`families.Family`).
"""

from typing import Any

from early_exit.backbones.decoder import DecoderConfig
from early_exit.pretrained import decoders
from early_exit.pretrained.table import STORED, TRANSPOSED, Entry

_CLASSES = {
    "llama": "LlamaForCausalLM",
    "mistral": "MistralForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
}
MODEL_TYPES = tuple(_CLASSES)
NEW = {"decoder": DecoderConfig}
# Under which `transformers` may store the network; the first is the one it is exported with.
PREFIXES = ("model.", "")
# Regexes found in the names of tensors that are not needed.
IGNORED = (r"rotary_emb\.inv_freq$",)

_NEEDED = ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads")
_NEEDED += ("intermediate_size", "max_position_embeddings")
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
_SLIDING, _FULL = "sliding_attention", "full_attention"


def config(hf: dict[str, Any]) -> DecoderConfig:
    """A `config.json` as a `DecoderConfig`.

    Raises:
      ValueError: entries are missing, or ask for what the decoder does not do (all are named).
    """
    kind = hf.get("model_type", "llama")
    hf = _DEFAULTS.get(kind, {}) | hf
    rope = decoders.rope_entries(hf)
    types, window = _layer_types(kind, hf)
    asked = {
        "hidden_act": (hf.get("hidden_act", "silu"), decoders.ACTIVATIONS),
        "partial_rotary_factor": (rope["partial_rotary_factor"], (1,)),
        "layer_types": (sorted({*types} - {_SLIDING, _FULL}), ([],)),
        "length of layer_types": (len(types), (hf.get("num_hidden_layers") or 0,)),
    }
    if kind == "llama":
        asked["sliding_window"] = (hf.get("sliding_window"), (None,))
    problems = decoders.rope_problems(rope) + decoders.unknown_rope(hf)
    decoders.check(hf, _NEEDED, asked, problems)
    heads = hf["num_attention_heads"]
    full_blocks = [i for i, seen in enumerate(types) if seen == _FULL]
    is_windowed = len(full_blocks) < len(types)
    all_biases = kind in ("llama", "qwen3") and bool(hf.get("attention_bias"))
    return DecoderConfig(
        vocab_size=hf["vocab_size"],
        width=hf["hidden_size"],
        depth=hf["num_hidden_layers"],
        heads=heads,
        kv_heads=hf.get("num_key_value_heads") or heads,
        head_dim=hf.get("head_dim") or hf["hidden_size"] // heads,
        mlp_width=hf["intermediate_size"],
        context_length=hf["max_position_embeddings"],
        norm_eps=hf.get("rms_norm_eps", 1e-6),
        activation=decoders.ACTIVATIONS[hf.get("hidden_act", "silu")],
        qkv_bias=all_biases or kind == "qwen2",
        attention_output_bias=all_biases,
        mlp_bias=kind == "llama" and bool(hf.get("mlp_bias")),
        qk_norm=kind == "qwen3",
        rope_theta=rope["rope_theta"],
        rope_scaling=decoders.rope_scaling(rope),
        window=window if is_windowed else None,
        full_blocks=tuple(full_blocks) if is_windowed else (),
        tied=hf.get("tie_word_embeddings", False),
    )


def _layer_types(kind: str, hf: dict[str, Any]) -> tuple[list[str], int | None]:
    """(what each block attends to, the window); Qwen switches the window on by itself."""
    window, depth = hf.get("sliding_window"), hf.get("num_hidden_layers") or 0
    if kind == "llama" or not window:
        return [_FULL] * depth, None
    if kind == "mistral":
        return [_SLIDING] * depth, window
    if not hf.get("use_sliding_window"):
        return [_FULL] * depth, None
    full = min(hf["max_window_layers"], depth)
    return hf.get("layer_types") or [_FULL] * full + [_SLIDING] * (depth - full), window


def to_hf(decoder: DecoderConfig) -> dict[str, Any]:
    """The `config.json` with which `transformers` builds the same network.

    Raises:
      ValueError: none of the model types can be it.
    """
    d = decoder
    common = {
        "vocab_size": d.vocab_size,
        "hidden_size": d.width,
        "num_hidden_layers": d.depth,
        "num_attention_heads": d.heads,
        "num_key_value_heads": d.kv_heads,
        "head_dim": d.head_dim,
        "intermediate_size": d.mlp_width,
        "max_position_embeddings": d.context_length,
        "rms_norm_eps": d.norm_eps,
        "hidden_act": decoders.ACTIVATION_NAMES[d.activation],
        "rope_parameters": decoders.rope_parameters(d),
        "tie_word_embeddings": d.tied,
    }
    windows = {
        "use_sliding_window": d.window is not None,
        "sliding_window": d.window,
        "max_window_layers": d.depth,
        "layer_types": [_SLIDING if d.window_of(i) else _FULL for i in range(d.depth)],
    }
    own = {
        "llama": {"attention_bias": d.attention_output_bias, "mlp_bias": d.mlp_bias},
        "mistral": {"sliding_window": d.window},
        "qwen2": windows,
        "qwen3": windows | {"attention_bias": d.attention_output_bias},
    }
    if d.width % d.heads:  # transformers refuses such a Llama, but not the same as a Mistral
        del own["llama"]
    for kind, more in own.items():
        hf = {"architectures": [_CLASSES[kind]], "model_type": kind} | common | more
        if config(hf) == decoder:
            return hf
    raise ValueError(f"none of {', '.join(MODEL_TYPES)} in transformers can be {decoder}")


def entries(config: DecoderConfig) -> list[Entry]:
    """Every tensor of a checkpoint."""
    c = config
    found = [Entry("model.embed_tokens.weight", ("embedding/embedding",))]
    for i in range(c.depth):
        parts = [
            ("input_layernorm", "attention_norm/scale", STORED, False),
            ("self_attn.q_proj", "attention/query/kernel", TRANSPOSED, c.qkv_bias),
            ("self_attn.k_proj", "attention/key/kernel", TRANSPOSED, c.qkv_bias),
            ("self_attn.v_proj", "attention/value/kernel", TRANSPOSED, c.qkv_bias),
            ("self_attn.o_proj", "attention/output/kernel", TRANSPOSED, c.attention_output_bias),
            ("post_attention_layernorm", "mlp_norm/scale", STORED, False),
            ("mlp.gate_proj", "mlp/gate/kernel", TRANSPOSED, c.mlp_bias),
            ("mlp.up_proj", "mlp/up/kernel", TRANSPOSED, c.mlp_bias),
            ("mlp.down_proj", "mlp/down/kernel", TRANSPOSED, c.mlp_bias),
        ]
        if c.qk_norm:
            parts += [
                ("self_attn.q_norm", "attention/query_norm/scale", STORED, False),
                ("self_attn.k_norm", "attention/key_norm/scale", STORED, False),
            ]
        for theirs, ours, layout, bias in parts:
            found += decoders.layer(
                f"model.layers.{i}.{theirs}", f"blocks/{i}/{ours}", layout, bias
            )
    output = "embedding" if c.tied else "output"
    return [
        *found,
        Entry("model.norm.weight", ("final_norm/scale",)),
        Entry("lm_head.weight", (f"{output}/embedding",), optional=c.tied),
    ]
