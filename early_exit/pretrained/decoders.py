"""What the families of causal language models share in reading and writing a `config.json`.

The one idea: a config is refused in one error that names everything the decoder does not do.
"""

import math
import re
from collections.abc import Callable, Collection, Iterable, Mapping
from typing import Any

from early_exit.backbones import rotary
from early_exit.backbones.decoder import DecoderConfig
from early_exit.pretrained.table import Entry, Layout

# transformers' names of the activations → ours; of several that are equal it is given the last.
ACTIVATIONS = {
    "silu": "silu",
    "swish": "silu",
    "relu": "relu",
    "gelu_python": "gelu",
    "gelu": "gelu",
    "gelu_fast": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_new": "gelu_tanh",
}
ACTIVATION_NAMES = {ours: theirs for theirs, ours in ACTIVATIONS.items()} | {"silu": "silu"}

# What each kind of rotary scaling cannot do without; then, what must be a number if it is there.
_NEEDED = {
    "default": (),
    "linear": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor"),
    "yarn": ("factor",),
    "longrope": ("short_factor", "long_factor"),
}
_NUMBERS = ("rope_theta", "original_max_position_embeddings", "attention_factor", "beta_fast")
_NUMBERS += ("beta_slow", "mscale", "mscale_all_dim", "factor", "low_freq_factor")
_NUMBERS += ("high_freq_factor",)
# What else may stand among them. Whether a model was trained further does not change it.
_OTHERS = ("rope_type", "type", "truncate", "short_factor", "long_factor", "partial_rotary_factor")
_OTHERS += ("finetuned",)
# Where a `config.json` has its rotary entries.
ROPE_PLACES = ("rope_theta", "rope_scaling", "rope_parameters", "partial_rotary_factor")


def check(
    hf: Mapping[str, Any],
    needed: Iterable[str],
    asked: Mapping[str, tuple[Any, Collection]],
    others: Iterable[str] = (),
) -> None:
    """Refuses a config.

    Args:
      needed: entries that must be there.
      asked: name → (what the config asks for, what is supported).
      others: what else is wrong.

    Raises:
      ValueError: naming all that is missing or not supported.
    """
    lacking = [repr(name) for name in needed if hf.get(name) is None]
    problems = [f"the model's config lacks {', '.join(lacking)}"] if lacking else []
    refused = [
        f"{name} = {value!r} (only {' or '.join(map(repr, supported))} is supported)"
        for name, (value, supported) in asked.items()
        if value not in list(supported)
    ]
    if quantised := hf.get("quantization_config"):
        refused.append(f"quantization_config = {quantised!r}")
    refused += others
    if refused:
        problems.append(f"the model needs what the decoder does not do: {'; '.join(refused)}")
    if problems:
        raise ValueError("; ".join(problems))


def rope_entries(hf: Mapping[str, Any], theta: float = 10_000.0) -> dict[str, Any]:
    """The entries about rotary positions, however old the config: transformers 5 has
    `rope_parameters`, before there were `rope_theta` and `rope_scaling`.

    Args:
      theta: `rope_theta`, if there is none.
    """
    rope = dict(hf.get("rope_scaling") or hf.get("rope_parameters") or {})
    rope["rope_type"] = rope.get("rope_type") or rope.get("type") or "default"
    for name, default in (("rope_theta", theta), ("partial_rotary_factor", 1.0)):
        if rope.get(name) is None:
            rope[name] = default if hf.get(name) is None else hf[name]
    # Where a config has it outside, transformers prefers that.
    context = hf.get("original_max_position_embeddings")
    context = context or rope.get("original_max_position_embeddings")
    rope["original_max_position_embeddings"] = context or hf.get("max_position_embeddings")
    return rope


def rope_problems(rope: Mapping[str, Any]) -> list[str]:
    """What of `rope_entries` is not supported, not known, missing, or no number."""
    if nested := [name for name, value in rope.items() if isinstance(value, dict)]:
        return [f"rope_parameters that differ by layer type ({', '.join(nested)})"]
    kind = rope["rope_type"]
    if kind not in _NEEDED:
        return [f"rope_type = {kind!r} (only {' or '.join(map(repr, _NEEDED))} is supported)"]
    given = {name: value for name, value in rope.items() if value is not None}
    problems = [
        f"{name} = {value!r} of rotary positions, which is not known"
        for name, value in given.items()
        if name not in (*_NUMBERS, *_OTHERS)
    ]
    problems += [f"rope_type = {kind!r} without {n}" for n in _NEEDED[kind] if n not in given]
    problems += [
        f"{name} = {given[name]!r} of rotary positions, which is no positive number"
        for name in _NUMBERS
        if name in given and not _is_positive(given[name])
    ]
    if not isinstance(given.get("truncate", True), bool):
        problems.append(f"truncate = {given['truncate']!r} of rotary positions")
    if kind == "llama3" and not problems:
        low, high = rope["low_freq_factor"], rope["high_freq_factor"]
        if high <= low:
            problems.append(f"high_freq_factor = {high} is not above low_freq_factor = {low}")
    if kind == "longrope" and not problems:
        problems += [
            f"{name} = {given[name]!r} of rotary positions, which are no positive numbers"
            for name in ("short_factor", "long_factor")
            if not isinstance(given[name], list) or not all(map(_is_positive, given[name]))
        ]
    return problems


def _is_positive(value: Any) -> bool:
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    return is_number and 0 < value < math.inf


def unknown_rope(hf: Mapping[str, Any], places: Collection[str] = ROPE_PLACES) -> list[str]:
    """Entries of a `config.json` that name rotary positions and that nobody would read.

    Args:
      places: those that are read.
    """
    known = {*places, "original_max_position_embeddings"}
    return [
        f"{name} = {value!r}, which this family does not have"
        for name, value in hf.items()
        if re.search("rope|rotary", name) and name not in known and value not in (None, False)
    ]


def rope_scaling(rope: Mapping[str, Any], longest: int) -> rotary.Scaling | None:
    """The scaling that entries which have passed `check` describe, as transformers computes it.

    Args:
      longest: `max_position_embeddings`.
    """
    kind, factor = rope["rope_type"], rope.get("factor")
    context = rope["original_max_position_embeddings"]
    if kind == "linear":
        return rotary.Linear(factor)
    if kind == "llama3":
        return rotary.Llama3(factor, context, rope["low_freq_factor"], rope["high_freq_factor"])
    if kind == "longrope":
        return _longrope(rope, longest)
    if kind == "yarn":
        attention_factor = rope.get("attention_factor")
        if attention_factor is None:
            attention_factor = _yarn_attention(factor)
            if (own := rope.get("mscale")) and (all_dim := rope.get("mscale_all_dim")):
                attention_factor = _yarn_attention(factor, own) / _yarn_attention(factor, all_dim)
        truncate = rope.get("truncate", True)
        fast, slow = rope.get("beta_fast") or 32.0, rope.get("beta_slow") or 1.0
        return rotary.Yarn(factor, context, attention_factor, fast, slow, truncate)
    return None


def _longrope(rope: Mapping[str, Any], longest: int) -> rotary.PerPair | rotary.LongRope:
    context, attention_factor = (
        rope["original_max_position_embeddings"],
        rope.get("attention_factor"),
    )
    short, long = (tuple(map(float, rope[name])) for name in ("short_factor", "long_factor"))
    if attention_factor is None:  # Ding et al. 2024, §3.3
        factor = rope.get("factor") or longest / context
        sharper = factor > 1 and context > 1
        attention_factor = (1 + math.log(factor) / math.log(context)) ** 0.5 if sharper else 1.0
    if short == long and attention_factor == 1:
        return rotary.PerPair(short)
    return rotary.LongRope(short, attention_factor, context, long, longest)


def context_length(scaling: rotary.Scaling | None, longest: int) -> int:
    """Positions that a network takes whose `max_position_embeddings` is `longest`."""
    is_shorter = isinstance(scaling, rotary.LongRope)
    return min(longest, scaling.original_context) if is_shorter else longest


def longest_text(config: DecoderConfig) -> int:
    """`max_position_embeddings`, of which `context_length` is the inverse."""
    scaling = config.rope_scaling
    return scaling.long_context if isinstance(scaling, rotary.LongRope) else config.context_length


def _yarn_attention(factor: float, scale: float = 1.0) -> float:
    """Peng et al. 2023, eq. 22."""
    return 1.0 if factor <= 1 else 0.1 * scale * math.log(factor) + 1.0


def rope_parameters(config: DecoderConfig) -> dict[str, Any]:
    """transformers 5's `rope_parameters` for a decoder with rotary positions."""
    parameters: dict[str, Any] = {"rope_theta": config.rope_theta, "rope_type": "default"}
    match config.rope_scaling:
        case rotary.LongRope():
            return parameters | {
                "rope_type": "longrope",
                "short_factor": list(config.rope_scaling.divisors),
                "long_factor": list(config.rope_scaling.long_divisors),
                "attention_factor": config.rope_scaling.attention_factor,
                "original_max_position_embeddings": config.rope_scaling.original_context,
            }
        case rotary.Linear(factor):
            return parameters | {"rope_type": "linear", "factor": factor}
        case rotary.Llama3(factor, context, low, high):
            return parameters | {
                "rope_type": "llama3",
                "factor": factor,
                "low_freq_factor": low,
                "high_freq_factor": high,
                "original_max_position_embeddings": context,
            }
        case rotary.Yarn(factor, context, attention_factor, fast, slow, truncate):
            return parameters | {
                "rope_type": "yarn",
                "factor": factor,
                "attention_factor": attention_factor,
                "beta_fast": fast,
                "beta_slow": slow,
                "truncate": truncate,
                "original_max_position_embeddings": context,
            }
        case rotary.PerPair(divisors):  # up to a length and beyond it
            return parameters | {
                "rope_type": "longrope",
                "short_factor": list(divisors),
                "long_factor": list(divisors),
                "attention_factor": 1.0,
                "factor": 1.0,
                "original_max_position_embeddings": config.context_length,
            }
    return parameters


def first_that_says(
    decoder: DecoderConfig,
    read: Callable[[dict[str, Any]], DecoderConfig],
    common: Mapping[str, Any],
    classes: Mapping[str, str],
    own: Mapping[str, Mapping[str, Any]],
) -> dict[str, Any]:
    """The `config.json` of the first model type that can be this decoder.

    Args:
      read: what the family makes of a `config.json`.
      common: entries of all model types.
      classes: model type → its class in transformers.
      own: model type → its own entries.

    Raises:
      ValueError: none of the model types can be it.
    """
    for kind, more in own.items():
        hf = {"architectures": [classes[kind]], "model_type": kind} | dict(common) | dict(more)
        if read(hf) == decoder:
            return hf
    raise ValueError(f"none of {', '.join(classes)} in transformers can be {decoder}")


def layer(name: str, path: str, layout: Layout, bias: bool) -> list[Entry]:
    """The tensors of a linear layer or LayerNorm: `path` ends in `kernel` or `scale`."""
    found = [Entry(f"{name}.weight", (path,), layout)]
    if bias:
        found.append(Entry(f"{name}.bias", (f"{path.rpartition('/')[0]}/bias",)))
    return found
