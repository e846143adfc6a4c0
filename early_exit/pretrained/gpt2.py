"""GPT-2: transformers' config and tensors → the decoder's, and back.

Its linear layers are stored [in, out], as here; one of them makes queries, keys and values.
"""

from typing import Any

from early_exit.backbones.decoder import DecoderConfig
from early_exit.pretrained import decoders
from early_exit.pretrained.table import STORED, Entry, Fused

MODEL_TYPES = ("gpt2",)
PREFIXES = ("transformer.", "")
IGNORED = (r"\.attn\.(masked_)?bias$",)  # the causal mask

_NEEDED = ("vocab_size", "n_embd", "n_layer", "n_head", "n_positions")


def config(hf: dict[str, Any]) -> DecoderConfig:
    """A `config.json` as a `DecoderConfig`.

    Raises:
      ValueError: entries are missing, or ask for what the decoder does not do (all are named).
    """
    activation = hf.get("activation_function", "gelu_new")
    asked = {
        "activation_function": (activation, decoders.ACTIVATIONS),
        "scale_attn_weights": (hf.get("scale_attn_weights", True), (True,)),
        "scale_attn_by_inverse_layer_idx": (
            hf.get("scale_attn_by_inverse_layer_idx", False),
            (False,),
        ),
        "add_cross_attention": (hf.get("add_cross_attention", False), (False,)),
    }
    decoders.check(hf, _NEEDED, asked, decoders.unknown_rope(hf, places=()))
    width, heads = hf["n_embd"], hf["n_head"]
    if width % heads:
        raise ValueError(f"n_embd = {width} is not a multiple of n_head = {heads}")
    return DecoderConfig(
        vocab_size=hf["vocab_size"],
        width=width,
        depth=hf["n_layer"],
        heads=heads,
        kv_heads=heads,
        head_dim=width // heads,
        mlp_width=hf.get("n_inner") or 4 * width,
        context_length=hf["n_positions"],
        norm="layer",
        norm_eps=hf.get("layer_norm_epsilon", 1e-5),
        gated=False,
        activation=decoders.ACTIVATIONS[activation],
        qkv_bias=True,
        attention_output_bias=True,
        mlp_bias=True,
        rotary_fraction=0.0,
        tied=hf.get("tie_word_embeddings", True),
    )


def to_hf(decoder: DecoderConfig) -> dict[str, Any]:
    """The `config.json` with which `transformers` builds the same network."""
    d = decoder
    return {
        "architectures": ["GPT2LMHeadModel"],
        "model_type": "gpt2",
        "vocab_size": d.vocab_size,
        "n_embd": d.width,
        "n_layer": d.depth,
        "n_head": d.heads,
        "n_inner": d.mlp_width,
        "n_positions": d.context_length,
        "activation_function": decoders.ACTIVATION_NAMES[d.activation],
        "layer_norm_epsilon": d.norm_eps,
        "tie_word_embeddings": d.tied,
    }


def entries(config: DecoderConfig) -> list[Entry]:
    """Every tensor of a checkpoint."""
    thirds = (config.width,) * 3
    found = [
        Entry("transformer.wte.weight", ("embedding/embedding",)),
        Entry("transformer.wpe.weight", ("positions/embedding",)),
    ]
    for i in range(config.depth):
        theirs, ours = f"transformer.h.{i}.", f"blocks/{i}/"
        for name, path in (
            ("ln_1", "attention_norm/scale"),
            ("attn.c_proj", "attention/output/kernel"),
            ("ln_2", "mlp_norm/scale"),
            ("mlp.c_fc", "mlp/up/kernel"),
            ("mlp.c_proj", "mlp/down/kernel"),
        ):
            found += decoders.layer(theirs + name, ours + path, STORED, bias=True)
        for kind, part, axis in (("weight", "kernel", 1), ("bias", "bias", 0)):
            paths = tuple(f"{ours}attention/{x}/{part}" for x in ("query", "key", "value"))
            found.append(Entry(f"{theirs}attn.c_attn.{kind}", paths, Fused(thirds, axis)))
    output = "embedding" if config.tied else "output"
    return [
        *found,
        *decoders.layer("transformer.ln_f", "final_norm/scale", STORED, bias=True),
        Entry("lm_head.weight", (f"{output}/embedding",), optional=config.tied),
    ]
