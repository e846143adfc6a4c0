"""GPT-NeoX and Pythia: transformers' config and tensors → the decoder's, and back.

One stored matrix makes queries, keys and values, head by head; of each head a part is turned.
"""

from typing import Any

from early_exit.backbones.decoder import DecoderConfig
from early_exit.pretrained import decoders
from early_exit.pretrained.table import STORED, TRANSPOSED, Entry, FusedByHead

MODEL_TYPES = ("gpt_neox",)
PREFIXES = ("gpt_neox.", "")
IGNORED = (r"\.attention\.(masked_)?bias$", r"rotary_emb\.inv_freq$")

_NEEDED = ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads")
_NEEDED += ("intermediate_size", "max_position_embeddings")
# An entry of other families → (its name in this one, its default).
_OLD_NAMES = {
    "rope_theta": ("rotary_emb_base", 10_000.0),
    "partial_rotary_factor": ("rotary_pct", 0.25),
}


def config(hf: dict[str, Any]) -> DecoderConfig:
    """A `config.json` as a `DecoderConfig`.

    Raises:
      ValueError: entries are missing, or ask for what the decoder does not do (all are named).
    """
    given = {new: hf.get(old, default) for new, (old, default) in _OLD_NAMES.items()}
    rope = decoders.rope_entries(hf | given)
    problems = decoders.rope_problems(rope)
    problems += decoders.unknown_rope(hf, (*decoders.ROPE_PLACES, "rotary_emb_base", "rotary_pct"))
    problems += [  # which transformers does not read
        f"{new} = {hf[new]!r}, though {old} = {given[new]!r}"
        for new, (old, _) in _OLD_NAMES.items()
        if hf.get(new) not in (None, given[new])
    ]
    if not rope["partial_rotary_factor"]:
        problems.append("no rotary positions (rotary_pct = 0)")
    activation = hf.get("hidden_act", "gelu")
    decoders.check(hf, _NEEDED, {"hidden_act": (activation, decoders.ACTIVATIONS)}, problems)
    width, heads = hf["hidden_size"], hf["num_attention_heads"]
    if width % heads:
        raise ValueError(f"hidden_size = {width} is not a multiple of {heads} attention heads")
    scaling = decoders.rope_scaling(rope, hf["max_position_embeddings"])
    return DecoderConfig(
        vocab_size=hf["vocab_size"],
        width=width,
        depth=hf["num_hidden_layers"],
        heads=heads,
        kv_heads=heads,
        head_dim=width // heads,
        mlp_width=hf["intermediate_size"],
        context_length=decoders.context_length(scaling, hf["max_position_embeddings"]),
        norm="layer",
        norm_eps=hf.get("layer_norm_eps", 1e-5),
        gated=False,
        activation=decoders.ACTIVATIONS[activation],
        parallel=hf.get("use_parallel_residual", True),
        qkv_bias=hf.get("attention_bias", True),
        attention_output_bias=hf.get("attention_bias", True),
        mlp_bias=True,
        rotary_fraction=rope["partial_rotary_factor"],
        rope_theta=rope["rope_theta"],
        rope_scaling=scaling,
        tied=hf.get("tie_word_embeddings", False),
    )


def to_hf(decoder: DecoderConfig) -> dict[str, Any]:
    """The `config.json` with which `transformers` builds the same network."""
    d = decoder
    rope = decoders.rope_parameters(d) | {"partial_rotary_factor": d.rotary_fraction}
    return {
        "architectures": ["GPTNeoXForCausalLM"],
        "model_type": "gpt_neox",
        "vocab_size": d.vocab_size,
        "hidden_size": d.width,
        "num_hidden_layers": d.depth,
        "num_attention_heads": d.heads,
        "intermediate_size": d.mlp_width,
        "max_position_embeddings": decoders.longest_text(d),
        "layer_norm_eps": d.norm_eps,
        "hidden_act": decoders.ACTIVATION_NAMES[d.activation],
        "use_parallel_residual": d.parallel,
        "attention_bias": d.attention_output_bias,
        "rope_parameters": rope,
        "tie_word_embeddings": d.tied,
    }


def entries(config: DecoderConfig) -> list[Entry]:
    """Every tensor of a checkpoint."""
    has_bias = config.qkv_bias
    found = [Entry("gpt_neox.embed_in.weight", ("embedding/embedding",))]
    for i in range(config.depth):
        theirs, ours = f"gpt_neox.layers.{i}.", f"blocks/{i}/"
        for name, path, layout, bias in (
            ("input_layernorm", "attention_norm/scale", STORED, True),
            ("attention.dense", "attention/output/kernel", TRANSPOSED, has_bias),
            ("post_attention_layernorm", "mlp_norm/scale", STORED, True),
            ("mlp.dense_h_to_4h", "mlp/up/kernel", TRANSPOSED, True),
            ("mlp.dense_4h_to_h", "mlp/down/kernel", TRANSPOSED, True),
        ):
            found += decoders.layer(theirs + name, ours + path, layout, bias)
        kinds = [("weight", "kernel", TRANSPOSED)] + [("bias", "bias", STORED)] * has_bias
        for kind, part, layout in kinds:
            paths = tuple(f"{ours}attention/{x}/{part}" for x in ("query", "key", "value"))
            name = f"{theirs}attention.query_key_value.{kind}"
            found.append(Entry(name, paths, FusedByHead(config.heads, 3, layout)))
    output = "embedding" if config.tied else "output"
    return [
        *found,
        *decoders.layer("gpt_neox.final_layer_norm", "final_norm/scale", STORED, bias=True),
        Entry("embed_out.weight", (f"{output}/embedding",), optional=config.tied),
    ]
