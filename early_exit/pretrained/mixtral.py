"""Mixtral: transformers' config and tensors → the decoder's, and back.

A Mistral whose feed-forward parts are mixtures of experts (`backbones.mixture`).
"""

import functools
from typing import Any

from early_exit.backbones.decoder import DecoderConfig
from early_exit.backbones.mixture import Mixture
from early_exit.pretrained import decoders, usual

MODEL_TYPES = ("mixtral",)
PREFIXES, IGNORED = usual.PREFIXES, usual.IGNORED
entries = functools.partial(
    usual.entries, experts=usual.Experts("block_sparse_moe", ("w1", "w3", "w2"))
)

# transformers' for absent entries, where it is not the one that follows from the others.
_DEFAULTS = {
    "num_key_value_heads": 8,
    "rms_norm_eps": 1e-5,
    "num_experts": 8,
    "num_experts_per_tok": 2,
    "router_aux_loss_coef": 0.001,
}


def config(hf: dict[str, Any]) -> DecoderConfig:
    """A `config.json` as a `DecoderConfig`.

    Raises:
      ValueError: entries are missing, or ask for what the decoder does not do (all are named).
    """
    hf = _DEFAULTS | hf
    rope = decoders.rope_entries(hf)
    asked = {"partial_rotary_factor": (rope["partial_rotary_factor"], (1,))}
    usual.check(hf, rope, asked, others=decoders.unknown_rope(hf))
    mixture = Mixture(
        experts=hf.get("num_local_experts") or hf["num_experts"],  # two names of one entry
        chosen=hf["num_experts_per_tok"],
        width=hf["intermediate_size"],
        balance=float(hf["router_aux_loss_coef"]),
    )
    windowed = hf["num_hidden_layers"] if hf.get("sliding_window") else 0
    return usual.config(hf, rope, types=[usual.SLIDING] * windowed, mixture=mixture)


def to_hf(decoder: DecoderConfig) -> dict[str, Any]:
    """The `config.json` with which `transformers` builds the same network."""
    d, m = decoder, decoder.mixture
    own = {
        "sliding_window": d.window,
        "num_local_experts": m.experts,
        "num_experts_per_tok": m.chosen,
        "router_aux_loss_coef": m.balance,
    }
    classes = {"mixtral": "MixtralForCausalLM"}
    return decoders.first_that_says(d, config, usual.to_hf(d), classes, {"mixtral": own})
