"""What the families share that spell their config and name their tensors as Llama does.

The one idea: such a family is a table of differences. Its `config` gives the settings that Llama's
entries do not say, its `to_hf` the entries that Llama has not, and what the tensors are called
follows from the config.
"""

import dataclasses
from collections.abc import Collection, Iterable, Mapping
from typing import Any

from early_exit.backbones.decoder import DecoderConfig
from early_exit.pretrained import decoders
from early_exit.pretrained.table import STORED, TRANSPOSED, Entry, Fused

# Under which `transformers` may store the network; the first is the one it is exported with.
PREFIXES = ("model.", "")
# Regexes found in the names of tensors that are not needed.
IGNORED = (r"rotary_emb\.inv_freq$",)


@dataclasses.dataclass(frozen=True)
class Experts:
    """What a mixture is called in a block, and the gate, up and down matrices of its experts."""

    part: str = "mlp"
    matrices: tuple[str, str, str] = ("gate_proj", "up_proj", "down_proj")


EXPERTS = Experts()
SLIDING, FULL = "sliding_attention", "full_attention"

_NEEDED = ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads")
_NEEDED += ("intermediate_size", "max_position_embeddings")
# `DecoderConfig.norms` → the norms of a block: their name → ours.
_NORMS = {
    "before": {"input_layernorm": "attention_norm", "post_attention_layernorm": "mlp_norm"},
    "after": {
        "post_attention_layernorm": "attention/after_norm",
        "post_feedforward_layernorm": "mlp/after_norm",
    },
    "both": {
        "input_layernorm": "attention_norm",
        "post_attention_layernorm": "attention/after_norm",
        "pre_feedforward_layernorm": "mlp_norm",
        "post_feedforward_layernorm": "mlp/after_norm",
    },
}


def check(
    hf: Mapping[str, Any],
    rope: Mapping[str, Any],
    asked: Mapping[str, tuple[Any, Collection]],
    *,
    activation: str = "hidden_act",
    others: Iterable[str] = (),
) -> None:
    """Refuses a config; see `decoders.check`.

    Args:
      rope: its `decoders.rope_entries`.
      activation: the entry that names it.
    """
    activations = {activation: (hf.get(activation, "silu"), decoders.ACTIVATIONS)}
    problems = [*decoders.rope_problems(rope), *others]
    decoders.check(hf, _NEEDED, activations | asked, problems)


def check_layer_types(hf: Mapping[str, Any], types: Collection[str]) -> dict[str, Any]:
    """What to ask for of an entry `layer_types`."""
    return {
        "layer_types": (sorted({*types} - {SLIDING, FULL}), ([],)),
        "length of layer_types": (len(types), (hf.get("num_hidden_layers") or 0,)),
    }


def config(
    hf: Mapping[str, Any],
    rope: Mapping[str, Any],
    *,
    activation: str = "hidden_act",
    types: Collection[str] = (),
    **own,
) -> DecoderConfig:
    """A checked `config.json` as a `DecoderConfig`.

    Args:
      types: what each block attends to, `SLIDING` or `FULL`; () for all to everything.
      own: settings of the family.
    """
    heads, longest = hf["num_attention_heads"], hf["max_position_embeddings"]
    scaling = decoders.rope_scaling(rope, longest)
    full_blocks = tuple(i for i, seen in enumerate(types) if seen == FULL)
    is_windowed = len(full_blocks) < len(types)
    return DecoderConfig(
        vocab_size=hf["vocab_size"],
        width=hf["hidden_size"],
        depth=hf["num_hidden_layers"],
        heads=heads,
        kv_heads=hf.get("num_key_value_heads") or heads,
        head_dim=hf.get("head_dim") or hf["hidden_size"] // heads,
        mlp_width=hf["intermediate_size"],
        context_length=decoders.context_length(scaling, longest),
        norm_eps=hf.get("rms_norm_eps", 1e-6),
        activation=decoders.ACTIVATIONS[hf.get(activation, "silu")],
        rope_theta=rope["rope_theta"],
        rope_scaling=scaling,
        window=hf["sliding_window"] if is_windowed else None,
        full_blocks=full_blocks if is_windowed else (),
        tied=hf.get("tie_word_embeddings", False),
        **own,
    )


def to_hf(decoder: DecoderConfig) -> dict[str, Any]:
    """Llama's entries of a `config.json`."""
    d = decoder
    return {
        "vocab_size": d.vocab_size,
        "hidden_size": d.width,
        "num_hidden_layers": d.depth,
        "num_attention_heads": d.heads,
        "num_key_value_heads": d.kv_heads,
        "head_dim": d.head_dim,
        "intermediate_size": d.mlp_width,
        "max_position_embeddings": decoders.longest_text(d),
        "rms_norm_eps": d.norm_eps,
        "hidden_act": decoders.ACTIVATION_NAMES[d.activation],
        "rope_parameters": decoders.rope_parameters(d),
        "tie_word_embeddings": d.tied,
    }


def layer_types(decoder: DecoderConfig) -> list[str]:
    """The entry of that name."""
    return [SLIDING if decoder.window_of(i) else FULL for i in range(decoder.depth)]


def entries(
    config: DecoderConfig, *, fused: bool = False, experts: Experts = EXPERTS
) -> list[Entry]:
    """Every tensor of a checkpoint.

    Args:
      fused: one matrix makes queries, keys and values, and one the gate and what it gates (Phi-3).
      experts: what a mixture's parts are called.
    """
    c = config
    found = [Entry("model.embed_tokens.weight", ("embedding/embedding",))]
    for i in range(c.depth):
        theirs, ours = f"model.layers.{i}.", f"blocks/{i}/"
        parts = [(name, f"{path}/scale", STORED, False) for name, path in _NORMS[c.norms].items()]
        parts += [
            ("self_attn.o_proj", "attention/output/kernel", TRANSPOSED, c.attention_output_bias)
        ]
        is_mixed = c.mixture is not None and not c.place(i).dense
        if not is_mixed:
            parts.append(("mlp.down_proj", "mlp/down/kernel", TRANSPOSED, c.mlp_bias))
        if c.qk_norm:
            parts += [
                ("self_attn.q_norm", "attention/query_norm/scale", STORED, False),
                ("self_attn.k_norm", "attention/key_norm/scale", STORED, False),
            ]
        if not fused:
            parts += [
                ("self_attn.q_proj", "attention/query/kernel", TRANSPOSED, c.qkv_bias),
                ("self_attn.k_proj", "attention/key/kernel", TRANSPOSED, c.qkv_bias),
                ("self_attn.v_proj", "attention/value/kernel", TRANSPOSED, c.qkv_bias),
            ]
        if not fused and not is_mixed:
            parts += [
                ("mlp.gate_proj", "mlp/gate/kernel", TRANSPOSED, c.mlp_bias),
                ("mlp.up_proj", "mlp/up/kernel", TRANSPOSED, c.mlp_bias),
            ]
        for name, path, layout, bias in parts:
            found += decoders.layer(theirs + name, ours + path, layout, bias)
        if fused:
            found += _fused(c, theirs, ours)
        if is_mixed:
            found += _mixed(c, theirs + experts.part, ours, experts)
    output = "embedding" if c.tied else "output"
    return [
        *found,
        Entry("model.norm.weight", ("final_norm/scale",)),
        Entry("lm_head.weight", (f"{output}/embedding",), optional=c.tied),
    ]


def _mixed(c: DecoderConfig, theirs: str, ours: str, experts: Experts) -> list[Entry]:
    found = [Entry(f"{theirs}.gate.weight", (f"{ours}mlp/router/kernel",), TRANSPOSED)]
    for index in range(c.mixture.experts):
        for part, name in zip(("gate", "up", "down"), experts.matrices, strict=True):
            name = f"{theirs}.experts.{index}.{name}.weight"
            path = f"{ours}mlp/experts/{part}/kernel"
            found.append(Entry(name, (path,), TRANSPOSED, slice=index))
    if c.mixture.shared_width:
        for part in ("gate", "up", "down"):
            path = f"{ours}mlp/shared/{part}/kernel"
            found.append(Entry(f"{theirs}.shared_expert.{part}_proj.weight", (path,), TRANSPOSED))
        path = f"{ours}mlp/shared_gate/kernel"
        found.append(Entry(f"{theirs}.shared_expert_gate.weight", (path,), TRANSPOSED))
    return found


def _fused(c: DecoderConfig, theirs: str, ours: str) -> list[Entry]:
    inner, kv_inner = c.heads * c.head_dim, c.kv_heads * c.head_dim
    parts = [
        ("self_attn.qkv_proj", "attention", ("query", "key", "value"), (inner, kv_inner, kv_inner)),
        ("mlp.gate_up_proj", "mlp", ("gate", "up"), (c.mlp_width, c.mlp_width)),
    ]
    return [
        Entry(
            f"{theirs}{name}.weight",
            tuple(f"{ours}{part}/{which}/kernel" for which in whose),
            Fused(sizes, 0, TRANSPOSED),
        )
        for name, part, whose, sizes in parts
    ]
