"""A kind of exit head of one's own: here, a low-rank adapter in front of the norm.

python examples/own_head.py tests/fixtures/tiny_chat
"""

import sys

import jax
from flax import nnx

import early_exit as ee


class Adapter(nnx.Module):
    """x + up(down(x)), then the network's norm. Starts as the norm alone."""

    def __init__(self, network, rngs, rank=8):
        zeros = nnx.initializers.zeros_init()
        self.down = nnx.Linear(network.width, rank, use_bias=False, rngs=rngs)
        self.up = nnx.Linear(rank, network.width, use_bias=False, kernel_init=zeros, rngs=rngs)
        self.norm = network.build_norm(rngs)

    def __call__(self, hidden: jax.Array) -> jax.Array:
        """[..., D] → [..., D], which the head's output matrix reads."""
        return self.norm(hidden + self.up(self.down(hidden)))


ee.register.head("adapter", Adapter)


def main(source):
    model = ee.attach(ee.load(source), ee.ExitConfig((2, 4), head="adapter", output="shared"))
    texts = [ee.__doc__] * 8
    model = ee.tune(model, texts, steps=20, batch_size=2, sequence_length=64)
    model = ee.calibrate(model, texts, epsilon=0.8, batch_size=2, sequence_length=64)
    print(ee.generate(model, "What is an exit?", max_new_tokens=16).depths)


if __name__ == "__main__":
    main(sys.argv[1])
