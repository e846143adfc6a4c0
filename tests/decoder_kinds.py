"""A small decoder of every kind that is read, by the settings in which they differ."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from early_exit.backbones import base, rotary
from early_exit.backbones.decoder import DecoderConfig
from early_exit.backbones.mixture import Mixture

LLAMA = DecoderConfig(
    vocab_size=61,
    width=24,
    depth=3,
    heads=4,
    kv_heads=2,
    head_dim=6,
    mlp_width=40,
    context_length=512,
)
BIASES = dict(qkv_bias=True, attention_output_bias=True, mlp_bias=True)
PLAIN = dict(norm="layer", gated=False, kv_heads=4, **BIASES)
GEMMA = dict(norm="rms_offset", norms="both", activation="gelu_tanh", embedding_scale=24**0.5)
KINDS = {
    "llama": {},
    "llama3": dict(rope_scaling=rotary.Llama3(4.0, 64, 1.0, 4.0), **BIASES),
    "mistral": dict(window=20),
    "qwen2": dict(
        qkv_bias=True, window=140, full_blocks=(0,), rope_scaling=rotary.Yarn(4.0, 64, 1.1)
    ),
    "qwen3": dict(qk_norm=True, tied=False),
    "gpt2": dict(rotary_fraction=0.0, activation="gelu_tanh", context_length=165, **PLAIN),
    "neox": dict(parallel=True, rotary_fraction=1 / 3, activation="gelu", tied=False, **PLAIN),
    "olmo2": dict(norms="after", qk_norm=True, qk_norm_whole=True, tied=False),
    "smollm3": dict(unturned_blocks=(1,), window=30, full_blocks=(0, 2)),
    "granite": dict(
        embedding_scale=3.0, attention_scale=0.2, residual_scale=0.6, logit_divisor=2.5
    ),
    "phi3": dict(
        rotary_fraction=2 / 3,
        window=20,
        rope_scaling=rotary.LongRope((1.0, 1.5), 1.2, 256, (2.0, 9.0), 1024),
    ),
    "gemma2": dict(
        window=20, full_blocks=(1,), attention_scale=0.3, attention_cap=3.0, logit_cap=8.0, **GEMMA
    ),
    "gemma3": dict(
        qk_norm=True,
        window=20,
        full_blocks=(2,),
        attention_scale=0.3,
        rope_theta=900.0,
        rope_scaling=rotary.Linear(2.0),
        local_rope_theta=50.0,
        **GEMMA,
    ),
    "mixtral": dict(mixture=Mixture(6, 2, 16), window=20),
    "qwen2_moe": dict(
        qkv_bias=True,
        mixture=Mixture(5, 2, 10, renormalised=False, shared_width=7, dense_blocks=(1,)),
    ),
}
CONFIGS = {name: dataclasses.replace(LLAMA, **changes) for name, changes in KINDS.items()}


def random_params(config):
    """Every part matters: scales away from 1, biases away from 0, predictions that differ."""
    _, params = base.split(config.build(nnx.Rngs(0)))
    rng = np.random.default_rng(1)

    def spread(path, leaf):
        name = path[-1].key
        if name in ("scale", "bias"):
            return jnp.asarray(rng.uniform(0.5, 1.5, leaf.shape) - (name == "bias"), leaf.dtype)
        return leaf * 8

    return jax.tree_util.tree_map_with_path(spread, params)
