"""A network of one's own: exits on any `BackboneConfig`, and a family so that files of it load.

    python examples/own_network.py

Here, a Llama whose feed-forward parts are squared ReLUs. `early_exit.backbones.base` says what a
network has to be able to do; a decoder is most easily one part of `DecoderConfig` made anew.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

import early_exit as ee
from early_exit.backbones import base
from early_exit.backbones.decoder import DecoderConfig
from early_exit.pretrained import llama


class SquaredReLU(nnx.Module):
    """down(relu(up(x))²)."""

    def __init__(self, config, rngs):
        self.up = nnx.Linear(config.width, config.mlp_width, use_bias=False, rngs=rngs)
        self.down = nnx.Linear(config.mlp_width, config.width, use_bias=False, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.down(jnp.square(jax.nn.relu(self.up(x))))


@dataclasses.dataclass(frozen=True)
class SquaredConfig(DecoderConfig):
    """As Llama, but for the feed-forward parts."""

    def build_mlp(self, rngs):
        return SquaredReLU(self, rngs)


class Squared:
    """The family: from `config.json` to `SquaredConfig`, and from tensors to parameters."""

    __name__ = "squared"
    MODEL_TYPES, PREFIXES, IGNORED = ("squared",), llama.PREFIXES, llama.IGNORED

    @staticmethod
    def config(hf):
        return SquaredConfig(**vars(llama.config({**hf, "model_type": "llama"})))

    @staticmethod
    def to_hf(config):
        if not isinstance(config, SquaredConfig):
            raise ValueError("not of this family")
        return {**llama.to_hf(DecoderConfig(**vars(config))), "model_type": "squared"}

    @staticmethod
    def entries(config):
        gates = "mlp/gate/"
        return [e for e in llama.entries(config) if not any(gates in path for path in e.paths)]


ee.register.family(Squared)

SMALL = SquaredConfig(
    vocab_size=64,
    width=32,
    depth=4,
    heads=4,
    kv_heads=2,
    head_dim=8,
    mlp_width=64,
    context_length=128,
)


def main():
    params = base.init(SMALL, jax.random.key(0))  # or those of a model that you have
    model = ee.attach(ee.Model.of(SMALL, params), (1, 2))
    batches = [np.random.default_rng(i).integers(0, 64, (2, 32)) for i in range(4)]
    model = ee.tune(model, batches, steps=8)
    model = ee.calibrate(model, batches, epsilon=0.5)
    (answer,) = ee.generate(model, [[1, 2, 3]], max_new_tokens=8)
    print(answer.tokens, answer.depths)


if __name__ == "__main__":
    main()
