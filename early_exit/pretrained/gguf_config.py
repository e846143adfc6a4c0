"""A Llama GGUF file's metadata as the `config.json` that transformers would have.

The one idea: a key that nobody asks for is not passed over. Whatever of the architecture's metadata
is neither read here nor known to leave the network as it is, is refused by its name, because what
it changes cannot be told.

What the keys mean is llama.cpp's (src/llama-model.cpp, src/llama-context.cpp, ggml's `rope_yarn`).
"""

import math
import pathlib
from collections.abc import Collection, Mapping
from typing import Any

import numpy as np

# The divisor of each rotary frequency, a tensor that says what a key might (Llama 3.1).
ROPE_DIVISORS = "rope_freqs.weight"

# Keys that say nothing with one of these values; None for any.
_HARMLESS: dict[str, Collection | None] = {
    "attention.causal": (True,),
    "attention.clamp_kqv": (0,),
    "attention.max_alibi_bias": (0,),
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


class _Metadata:
    """What a file says under `llama.`, and what of it has been asked for."""

    def __init__(self, path: pathlib.Path, metadata: Mapping[str, Any]):
        self._path = path
        self._said = {
            key.removeprefix("llama."): value
            for key, value in metadata.items()
            if key.startswith("llama.")
        }
        self._asked: set[str] = set()

    def get(self, key: str, default: Any = None) -> Any:
        self._asked.add(key)
        return self._said.get(key, default)

    def whole(self, key: str, default: int | None = None) -> int:
        value = self.get(key, default)
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise ValueError(
                f"{self._path} needs a positive whole number llama.{key}, not {value!r}"
            )
        return value

    def number(self, key: str, default: float | None = None) -> float | None:
        value = self.get(key, default)
        is_number = isinstance(value, int | float) and not isinstance(value, bool)
        if value is not default and not (is_number and math.isfinite(value)):
            raise ValueError(f"{self._path} needs a number llama.{key}, not {value!r}")
        return value

    def refuse_what_is_left(self) -> None:
        """Raises ValueError with every key that nobody asked for and that may say something."""
        left = [
            f"llama.{key} = {_shortened(value)}"
            for key, value in self._said.items()
            if key not in self._asked and not _is_harmless(key, value)
        ]
        if left:
            raise ValueError(
                f"{self._path} asks for what is not read from GGUF files: {', '.join(left)}. Use "
                "the model's safetensors folder if its family is supported"
            )


def _is_harmless(key: str, value: Any) -> bool:
    return key in _HARMLESS and (_HARMLESS[key] is None or value in _HARMLESS[key])


def _shortened(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}…"


def llama(
    path: pathlib.Path, metadata: Mapping[str, Any], tied: bool, divisors: np.ndarray | None
) -> dict[str, Any]:
    """A Llama's `config.json`.

    Args:
      tied: whether the file has no output matrix.
      divisors: what the tensor `ROPE_DIVISORS` holds, if there is one.

    Raises:
      ValueError: a key is missing, of a wrong kind, or says what is not read; it is named.
    """
    said = _Metadata(path, metadata)
    heads = said.whole("attention.head_count")
    head_dim = said.whole("attention.key_length", said.whole("embedding_length") // heads)
    if said.whole("attention.value_length", head_dim) != head_dim:
        raise ValueError(
            f"{path} has keys and values of different widths (llama.attention.key_length = "
            f"{head_dim}, value_length = {said.get('attention.value_length')}), which no family has"
        )
    tokens = len(metadata.get("tokenizer.ggml.tokens", ())) or None
    config = {
        "model_type": "llama",
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
        "rope_scaling": _rope_scaling(path, said, divisors),
        "partial_rotary_factor": said.whole("rope.dimension_count", head_dim) / head_dim,
        "sliding_window": said.get("attention.sliding_window") or None,
        "tie_word_embeddings": tied,
    } | _token_ids(metadata)
    said.refuse_what_is_left()
    return config


def _token_ids(metadata: Mapping[str, Any]) -> dict[str, Any]:
    """What ends a text, a turn (`eot`) and a message that calls a tool (`eom`); what fills rows."""
    ends = [metadata.get(f"tokenizer.ggml.{name}_token_id") for name in ("eos", "eot", "eom")]
    return {
        "eos_token_id": [token for token in dict.fromkeys(ends) if token is not None],
        "pad_token_id": metadata.get("tokenizer.ggml.padding_token_id"),
    }


def _rope_scaling(
    path: pathlib.Path, said: _Metadata, divisors: np.ndarray | None
) -> dict[str, Any] | None:
    """transformers' `rope_scaling`. A factor without a type means linear, as in llama.cpp, which
    also reads the name that the factor had before there were types."""
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
            f"{path} has llama.rope.scaling.type = {kind!r}; only 'none', 'linear' and 'yarn' are "
            "read. Use the model's safetensors folder if its family is supported"
        )
    if kind == "yarn" and factor is None:
        raise ValueError(f"{path} has llama.rope.scaling.type = 'yarn' without a scaling.factor")
    if kind != "yarn" and sharpness != 1:
        raise ValueError(
            f"{path} has llama.rope.scaling.attn_factor = {sharpness} without yarn, which the "
            "decoder does not do"
        )
    if divisors is not None and kind != "none" and factor not in (None, 1):
        raise ValueError(
            f"{path} has the divisors {ROPE_DIVISORS} and llama.rope.scaling.factor = {factor}; "
            "the decoder does one of the two"
        )
    if divisors is not None:
        # longrope is transformers' word for a divisor of each frequency, up to a length and beyond.
        each = divisors.astype(float).ravel().tolist()
        return {
            "rope_type": "longrope",
            "short_factor": each,
            "long_factor": each,
            "attention_factor": 1.0,
        }
    if kind == "none" or factor is None:
        return None
    if kind == "linear":
        return {"rope_type": "linear", "factor": factor}
    # llama.cpp multiplies what the paper says (Peng et al. 2023, eq. 22) by its own factor.
    sharpened = {"attention_factor": sharpness * (1 + 0.1 * math.log(factor))} if factor > 0 else {}
    original = {} if context is None else {"original_max_position_embeddings": context}
    return {"rope_type": "yarn", "factor": factor} | sharpened | original | betas
