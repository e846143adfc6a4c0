"""The architectures of GGUF files that are read: how each differs from a Llama.

The one idea: an architecture is a table of differences, in metadata, in the names of tensors and in
how some of them are stored. What it becomes is a family's `config.json` and tensors.
"""

import dataclasses
import pathlib
import re
from collections.abc import Callable, Collection, Mapping
from typing import Any

import numpy as np

from early_exit.pretrained import gguf_config
from early_exit.pretrained.gguf_config import Metadata

_TOP_NAMES = {
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
    "output": "lm_head",
}
# Parts of a block: llama.cpp's name → transformers'.
_PARTS = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_AFTER = {
    "post_attention_norm": "post_attention_layernorm",
    "post_ffw_norm": "post_feedforward_layernorm",
}


@dataclasses.dataclass(frozen=True)
class Architecture:
    """How files of one architecture are read.

    Attributes:
      model_type: transformers' name.
      own: the metadata and the entries that are known → those of this architecture alone.
      scaling: as for `gguf_config.read`.
      parts: of a block, where they are not a Llama's.
      by_pairs: llama.cpp turns neighbouring rows of a head against each other (0 with 1, 2 with 3,
        …), this project and transformers the first half of a head against the second.
      adds_one: norms are stored as 1 + scale.
    """

    model_type: str
    own: Callable[[Metadata, Mapping[str, Any]], dict[str, Any]] = lambda said, known: {}
    scaling: Callable[[Metadata, Mapping[str, np.ndarray]], dict[str, Any]] = (
        gguf_config.rope_scaling
    )
    parts: Mapping[str, str] = dataclasses.field(default_factory=dict)
    by_pairs: bool = False
    adds_one: bool = False

    def config(
        self,
        path: pathlib.Path,
        metadata: Mapping[str, Any],
        names: Collection[str],
        vectors: Mapping[str, np.ndarray],
    ) -> dict[str, Any]:
        """The file's `config.json`; see `gguf_config.read`."""
        said = Metadata(path, metadata)
        known = gguf_config.read(said, metadata, names, self.scaling, vectors)
        known |= {"model_type": self.model_type} | self.own(said, known)
        said.refuse_what_is_left()
        return known

    def transformers_name(self, name: str) -> str:
        """Names without a counterpart stay as they are, and are refused as unexpected later."""
        if block := re.fullmatch(r"blk\.(\d+)\.(\w+)\.(weight|bias)", name):
            number, part, kind = block.groups()
            if theirs := (_PARTS | self.parts).get(part):
                return f"model.layers.{number}.{theirs}.{kind}"
        top, _, kind = name.rpartition(".")
        return f"{_TOP_NAMES[top]}.{kind}" if top in _TOP_NAMES else name

    def as_transformers(self, name: str, array: np.ndarray, config: Mapping[str, Any]):
        """A tensor as transformers has it."""
        part = name.split(".")[-2]
        heads = {"attn_q": "num_attention_heads", "attn_k": "num_key_value_heads"}
        if self.by_pairs and part in heads:
            return _to_half_rotation(array, config[heads[part]])
        return array - 1 if self.adds_one and part.endswith("norm") else array


def _to_half_rotation(array: np.ndarray, heads: int) -> np.ndarray:
    """Rows that are pairs of neighbours in a head → the firsts of all pairs, then the seconds."""
    rows, rest = array.shape[0], array.shape[1:]
    pairs = array.reshape(heads, rows // heads // 2, 2, *rest)
    return pairs.swapaxes(1, 2).reshape(rows, *rest)


def _window(said: Metadata, known: Mapping[str, Any]) -> dict[str, Any]:
    return {"sliding_window": said.get("attention.sliding_window") or None}


def _smollm3(said: Metadata, known: Mapping[str, Any]) -> dict[str, Any]:
    return {"no_rope_layer_interval": 4}  # llama.cpp has no key for it


def _granite(said: Metadata, known: Mapping[str, Any]) -> dict[str, Any]:
    if said.get("rope.scaling.finetuned", True) is not True:
        raise ValueError(
            f"{said.path} has {said.prefix}rope.scaling.finetuned = False, by which a Granite has "
            "no rotary positions; that is not read"
        )
    usual = known["head_dim"] ** -0.5
    return {
        "attention_multiplier": said.number("attention.scale") or usual,
        "embedding_multiplier": said.number("embedding_scale") or 1.0,
        "residual_multiplier": said.number("residual_scale") or 1.0,
        "logits_scaling": said.number("logit_scale") or 1.0,
    }


def _gemma2(said: Metadata, known: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "attn_logit_softcapping": said.number("attn_logit_softcapping", 50.0),
        "final_logit_softcapping": said.number("final_logit_softcapping", 30.0),
        **_gemma(said, known, every=2, window=4096, largest=46),
    }


def _gemma3(said: Metadata, known: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "rope_local_base_freq": said.number("rope.freq_base_swa", 10_000.0),
        "final_logit_softcapping": said.number("final_logit_softcapping") or None,
        **_gemma(said, known, every=6, window=None, largest=62),
    }


def _gemma(
    said: Metadata, known: Mapping[str, Any], every: int, window: int | None, largest: int
) -> dict[str, Any]:
    """Args:
    every: which blocks see everything, if no key says it.
    largest: blocks of the network that scales scores as if its heads were hidden_size / heads wide.
    """
    depth, width, heads = (
        known[name] for name in ("num_hidden_layers", "hidden_size", "num_attention_heads")
    )
    pattern = said.get("attention.sliding_window_pattern", every)
    window = said.get("attention.sliding_window", window) or None
    if not isinstance(pattern, list):
        every = said.whole("attention.sliding_window_pattern", every)
        pattern = [(block + 1) % every != 0 for block in range(depth)]
    return {
        "sliding_window": window,
        "layer_types": [
            "sliding_attention" if is_near and window else "full_attention" for is_near in pattern
        ],
        "query_pre_attn_scalar": width // heads if depth == largest else known["head_dim"],
    }


_GEMMA = _AFTER | {"ffn_norm": "pre_feedforward_layernorm"}
_PHI3 = {"attn_qkv": "self_attn.qkv_proj", "ffn_up": "mlp.gate_up_proj"}
BY_NAME = {
    "llama": Architecture("llama", _window, by_pairs=True),
    "qwen2": Architecture("qwen2"),
    "qwen3": Architecture("qwen3"),
    "olmo2": Architecture("olmo2", parts=_AFTER),
    "smollm3": Architecture("smollm3", _smollm3, by_pairs=True),
    "granite": Architecture("granite", _granite, by_pairs=True),
    "phi3": Architecture("phi3", _window, gguf_config.long_scaling, _PHI3),
    "gemma2": Architecture("gemma2", _gemma2, parts=_GEMMA, adds_one=True),
    "gemma3": Architecture("gemma3_text", _gemma3, parts=_GEMMA, adds_one=True),
}
