"""The Llama family: transformers' config and tensor names → the decoder's.

A family is a module with two functions: `config` translates the config, or refuses what the
backbone cannot do, and `rules` gives the table of tensor names. Nothing else about a family is
known elsewhere.
"""

from typing import Any

from early_exit.backbones.decoder import DecoderConfig

# A linear layer's weight is [out, in] in torch, its kernel [in, out] here.
_TRANSPOSED = (1, 0)


def config(hf: dict[str, Any]) -> DecoderConfig:
    """A `config.json` as a `DecoderConfig`.

    Raises:
      ValueError: entries are missing, or ask for what the decoder does not do (all are named).
    """
    rope = hf.get("rope_parameters") or hf.get("rope_scaling") or {}
    asked_and_supported = {
        "hidden_act": (hf.get("hidden_act", "silu"), "silu"),
        "attention_bias": (hf.get("attention_bias") or False, False),
        "mlp_bias": (hf.get("mlp_bias") or False, False),
        "sliding_window": (hf.get("sliding_window"), None),
        "rope_type": (rope.get("rope_type", rope.get("type", "default")), "default"),
        "partial_rotary_factor": (
            rope.get("partial_rotary_factor", hf.get("partial_rotary_factor", 1)),
            1,
        ),
    }
    refused = [
        f"{name} = {asked!r} (only {supported!r} is supported)"
        for name, (asked, supported) in asked_and_supported.items()
        if asked != supported
    ]
    if refused:
        raise ValueError(f"this Llama needs what the decoder does not do: {'; '.join(refused)}")
    try:
        heads = hf["num_attention_heads"]
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
            rope_theta=rope.get("rope_theta", hf.get("rope_theta", 10_000.0)),
            tied=hf.get("tie_word_embeddings", False),
        )
    except KeyError as error:
        raise ValueError(f"the model's config lacks {error}") from error


def rules(config: DecoderConfig) -> list[tuple[str, str | None, tuple[int, ...] | None]]:
    """Ordered (regex of the whole tensor name, our path, order of axes); the first match counts.

    No path: the tensor is not needed. No order: as stored. Tensors that lead to one path must be
    equal, as a stored output matrix that is tied to the embedding.
    """
    block, ours = r"model\.layers\.(\d+)\.", r"blocks/\1/"
    return [
        (r"model\.embed_tokens\.weight", "embedding/embedding", None),
        (block + r"input_layernorm\.weight", ours + "attention_norm/scale", None),
        (block + r"self_attn\.q_proj\.weight", ours + "attention/query/kernel", _TRANSPOSED),
        (block + r"self_attn\.k_proj\.weight", ours + "attention/key/kernel", _TRANSPOSED),
        (block + r"self_attn\.v_proj\.weight", ours + "attention/value/kernel", _TRANSPOSED),
        (block + r"self_attn\.o_proj\.weight", ours + "attention/output/kernel", _TRANSPOSED),
        (block + r"post_attention_layernorm\.weight", ours + "mlp_norm/scale", None),
        (block + r"mlp\.(gate|up|down)_proj\.weight", ours + r"mlp/\2/kernel", _TRANSPOSED),
        (r"model\.norm\.weight", "final_norm/scale", None),
        (r"lm_head\.weight", f"{'embedding' if config.tied else 'output'}/embedding", None),
        (r"model\.(layers\.\d+\.self_attn\.)?rotary_emb\.inv_freq", None, None),
    ]
