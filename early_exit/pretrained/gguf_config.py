"""A GGUF file's metadata as the `config.json` that transformers would have.

The one idea: a key that nobody asks for is not passed over. Whatever of the architecture's metadata
is neither read here nor known to leave the network as it is, is refused by its name, because what
it changes cannot be told.

What the keys mean is llama.cpp's (src/llama-model.cpp, src/models/, src/llama-context.cpp, ggml's
`rope_yarn`); what it has in its code instead of a key is here in code, too.
"""

import math
import pathlib
from collections.abc import Callable, Collection, Mapping
from typing import Any

import numpy as np

# Tensors that say what keys might: the divisor of each rotary frequency (Llama 3.1), and those of
# short and of long texts (Phi-3).
ROPE_DIVISORS = "rope_freqs.weight"
SHORT_DIVISORS, LONG_DIVISORS = "rope_factors_short.weight", "rope_factors_long.weight"
VECTORS = (ROPE_DIVISORS, SHORT_DIVISORS, LONG_DIVISORS)

# Keys that say nothing with one of these values; None for any.
_HARMLESS: dict[str, Collection | None] = {
    "attention.causal": (True,),
    "attention.clamp_kqv": (0,),
    "attention.max_alibi_bias": (0,),
    "attention.sliding_window": (0,),
    "embedding_scale": (0, 1),
    "expert_count": (0,),
    "expert_used_count": (0,),
    "logit_scale": (0, 1),
    "residual_scale": (0, 1),
    "rope.scaling.finetuned": None,
    "rope.scaling.yarn_attn_factor": (1, -1),
    "rope.scaling.yarn_ext_factor": (1, -1),
    "rope.scaling.yarn_log_multiplier": (0,),
    "tensor_data_layout": ("Meta AI original pth",),
    "use_parallel_residual": (False,),
}


class Metadata:
    """What a file says of its architecture, and what of it has been asked for."""

    def __init__(self, path: pathlib.Path, metadata: Mapping[str, Any]):
        self.path = path
        self.prefix = prefix = f"{metadata.get('general.architecture')}."
        self._said = {
            key.removeprefix(prefix): value
            for key, value in metadata.items()
            if key.startswith(prefix)
        }
        self._asked: set[str] = set()

    def get(self, key: str, default: Any = None) -> Any:
        self._asked.add(key)
        return self._said.get(key, default)

    def whole(self, key: str, default: int | None = None) -> int:
        value = self.get(key, default)
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise ValueError(
                f"{self.path} needs a positive whole number {self.prefix}{key}, not {value!r}"
            )
        return value

    def number(self, key: str, default: float | None = None) -> float | None:
        value = self.get(key, default)
        is_number = isinstance(value, int | float) and not isinstance(value, bool)
        if value is not default and not (is_number and math.isfinite(value)):
            raise ValueError(f"{self.path} needs a number {self.prefix}{key}, not {value!r}")
        return value

    def refuse_what_is_left(self) -> None:
        """Raises ValueError with every key that nobody asked for and that may say something."""
        left = [
            f"{self.prefix}{key} = {_shortened(value)}"
            for key, value in self._said.items()
            if key not in self._asked and not _is_harmless(key, value)
        ]
        if left:
            raise ValueError(
                f"{self.path} asks for what is not read from GGUF files: {', '.join(left)}. Use "
                "the model's safetensors folder if its family is supported"
            )


def _is_harmless(key: str, value: Any) -> bool:
    return key in _HARMLESS and (_HARMLESS[key] is None or value in _HARMLESS[key])


def _shortened(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}…"


def read(
    said: Metadata,
    metadata: Mapping[str, Any],
    names: Collection[str],
    scaling: Callable[[Metadata, Mapping[str, np.ndarray]], dict[str, Any]],
    vectors: Mapping[str, np.ndarray],
) -> dict[str, Any]:
    """What architectures have in common of a `config.json`.

    Args:
      said: the metadata of the architecture.
      names: of the file's tensors.
      scaling: the metadata and `vectors` → the entries that scale rotary positions.
      vectors: the tensors among `VECTORS` that the file has.

    Raises:
      ValueError: a key is missing, of a wrong kind, or says what is not read; it is named.
    """
    heads = said.whole("attention.head_count")
    head_dim = said.whole("attention.key_length", said.whole("embedding_length") // heads)
    if said.whole("attention.value_length", head_dim) != head_dim:
        raise ValueError(
            f"{said.path} has keys and values of different widths ({said.prefix}attention."
            f"key_length = {head_dim}, value_length = {said.get('attention.value_length')}), which "
            "no family has"
        )
    tokens = len(metadata.get("tokenizer.ggml.tokens", ())) or None
    return {
        "vocab_size": said.whole("vocab_size", tokens),
        "hidden_size": said.whole("embedding_length"),
        "num_hidden_layers": said.whole("block_count"),
        "num_attention_heads": heads,
        "num_key_value_heads": said.whole("attention.head_count_kv", heads),
        "head_dim": head_dim,
        "intermediate_size": said.whole("feed_forward_length"),
        "max_position_embeddings": said.whole("context_length"),
        "rms_norm_eps": said.number("attention.layer_norm_rms_epsilon", 1e-6),
        "rope_theta": said.number("rope.freq_base", 10_000.0),
        "partial_rotary_factor": said.whole("rope.dimension_count", head_dim) / head_dim,
        "tie_word_embeddings": "output.weight" not in names,
        "attention_bias": "blk.0.attn_q.bias" in names,
        "mlp_bias": "blk.0.ffn_up.bias" in names,
        **scaling(said, vectors),
        **_token_ids(metadata),
    }


def _token_ids(metadata: Mapping[str, Any]) -> dict[str, Any]:
    """What ends a text, a turn (`eot`) and a message that calls a tool (`eom`); what fills rows."""
    ends = [metadata.get(f"tokenizer.ggml.{name}_token_id") for name in ("eos", "eot", "eom")]
    return {
        "eos_token_id": [token for token in dict.fromkeys(ends) if token is not None],
        "pad_token_id": metadata.get("tokenizer.ggml.padding_token_id"),
    }


def rope_scaling(said: Metadata, vectors: Mapping[str, np.ndarray]) -> dict[str, Any]:
    """A factor without a type means linear, as in llama.cpp, which also reads the name that the
    factor had before there were types."""
    path, divisors = said.path, vectors.get(ROPE_DIVISORS)
    factor = said.number("rope.scaling.factor", said.number("rope.scale_linear")) or None
    kind = said.get("rope.scaling.type", "linear")
    sharpness = said.number("rope.scaling.attn_factor", 1.0)
    context = said.get("rope.scaling.original_context_length")
    betas = {
        name: said.number(f"rope.scaling.yarn_{name}")
        for name in ("beta_fast", "beta_slow")
        if said.number(f"rope.scaling.yarn_{name}") not in (None, -1)  # -1 is "not set"
    }
    if kind not in ("none", "linear", "yarn"):
        raise ValueError(
            f"{path} has {said.prefix}rope.scaling.type = {kind!r}; only 'none', 'linear' and "
            "'yarn' are read. Use the model's safetensors folder if its family is supported"
        )
    if kind == "yarn" and factor is None:
        raise ValueError(
            f"{path} has {said.prefix}rope.scaling.type = 'yarn' without a scaling.factor"
        )
    if kind != "yarn" and sharpness != 1:
        raise ValueError(
            f"{path} has {said.prefix}rope.scaling.attn_factor = {sharpness} without yarn, which "
            "the decoder does not do"
        )
    if divisors is not None and kind != "none" and factor not in (None, 1):
        raise ValueError(
            f"{path} has the divisors {ROPE_DIVISORS} and {said.prefix}rope.scaling.factor = "
            f"{factor}; the decoder does one of the two"
        )
    if divisors is not None:
        # longrope is transformers' word for a divisor of each frequency, up to a length and beyond.
        return {"rope_scaling": _longrope(divisors, divisors, 1.0)}
    if kind == "none" or factor is None:
        return {}
    if kind == "linear":
        return {"rope_scaling": {"rope_type": "linear", "factor": factor}}
    # llama.cpp multiplies what the paper says (Peng et al. 2023, eq. 22) by its own factor.
    sharpened = {"attention_factor": sharpness * (1 + 0.1 * math.log(factor))} if factor > 0 else {}
    original = {} if context is None else {"original_max_position_embeddings": context}
    scaling = {"rope_type": "yarn", "factor": factor} | sharpened | original | betas
    return {"rope_scaling": scaling}


def long_scaling(said: Metadata, vectors: Mapping[str, np.ndarray]) -> dict[str, Any]:
    """Of Phi-3, whose files have divisors for short and for long texts, or no scaling at all."""
    sharpness = said.number("rope.scaling.attn_factor", 1.0)
    original = said.whole("rope.scaling.original_context_length", said.whole("context_length"))
    kind, short = said.get("rope.scaling.type", "longrope"), vectors.get(SHORT_DIVISORS)
    if kind not in ("longrope", "none"):
        raise ValueError(
            f"{said.path} has {said.prefix}rope.scaling.type = {kind!r}; of this architecture only "
            "'longrope' is read"
        )
    if (short is None) != (LONG_DIVISORS not in vectors):
        raise ValueError(
            f"{said.path} has only one of {SHORT_DIVISORS} and {LONG_DIVISORS}; the file is "
            "damaged, download it again"
        )
    if short is None:
        return {}
    scaling = _longrope(short, vectors[LONG_DIVISORS], sharpness)
    return {"rope_scaling": scaling, "original_max_position_embeddings": original}


def _longrope(short: np.ndarray, long: np.ndarray, sharpness: float) -> dict[str, Any]:
    return {
        "rope_type": "longrope",
        "short_factor": short.astype(float).ravel().tolist(),
        "long_factor": long.astype(float).ravel().tolist(),
        "attention_factor": sharpness,
    }
