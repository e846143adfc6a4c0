"""A family that differs in one part overrides that part, in blocks and in heads alike."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from conftest import TINY
from early_exit import tree
from early_exit.backbones import base
from early_exit.backbones.decoder import DecoderConfig
from early_exit.backbones.encoder import EncoderConfig
from early_exit.exits.heads import ExitConfig
from early_exit.exits.multi_exit import MultiExit

EXPERTS, TOKENS = 3, np.array([[7, 3, 52, 11, 29, 0, 60, 3]], np.int32)


class Mixture(nnx.Module):
    """Experts, each position going to the one that its router likes best (Fedus et al. 2021)."""

    def __init__(self, width: int, inner: int, *, rngs: nnx.Rngs):
        init = nnx.initializers.normal(0.3)
        self.router = nnx.Linear(width, EXPERTS, rngs=rngs)
        self.up = nnx.Param(init(rngs.params(), (EXPERTS, width, inner)))
        self.down = nnx.Param(init(rngs.params(), (EXPERTS, inner, width)))

    def __call__(self, x):
        probs = jax.nn.softmax(self.router(x))
        best = jnp.where(probs == probs.max(-1, keepdims=True), probs, 0)
        inner = jax.nn.relu(jnp.einsum("...d,edf->...ef", x, self.up[...]))
        return jnp.einsum("...ef,efd,...e->...d", inner, self.down[...], best)


class Offset(nnx.Module):
    """RMSNorm whose scale is 1 + w (Gemma)."""

    def __init__(self, width: int):
        self.weight = nnx.Param(jnp.full(width, 0.25))

    def __call__(self, x):
        factor = jax.lax.rsqrt((x**2).mean(-1, keepdims=True) + 1e-6)
        return x * factor * jnp.expand_dims(1 + self.weight[...], tuple(range(x.ndim - 1)))


@dataclasses.dataclass(frozen=True)
class MixtureDecoder(DecoderConfig):
    def build_mlp(self, rngs):
        return Mixture(self.width, self.mlp_width, rngs=rngs)


@dataclasses.dataclass(frozen=True)
class OffsetDecoder(DecoderConfig):
    def build_norm(self, rngs):
        return Offset(self.width)


@dataclasses.dataclass(frozen=True)
class MixtureEncoder(EncoderConfig):
    def build_mlp(self, rngs):
        return Mixture(self.width, self.mlp_width, rngs=rngs)


def of(kind, **changes):
    return kind(**vars(TINY) | changes)


ENCODER = MixtureEncoder(
    vocab_size=61, width=24, depth=6, heads=4, mlp_width=40, context_length=16, num_classes=3
)
MIXTURES = [of(MixtureDecoder), of(MixtureDecoder, parallel=True, scan=True), ENCODER]


def parts(params, name):
    """Paths of all that lies in parts of a name, below it."""
    paths = (f"/{path}".split(f"/{name}/") for path in tree.flatten(params))
    return {below for _, *rest in paths for below in rest}


@pytest.mark.parametrize("config", MIXTURES)
def test_blocks_have_the_feed_forward_part_of_their_config(config):
    _, params = base.abstract(config.build)
    assert parts(params["blocks"], "mlp") == {"router/kernel", "router/bias", "up", "down"}


@pytest.mark.parametrize("config", [of(MixtureDecoder), ENCODER])
@pytest.mark.parametrize("kind", ["mlp", "layer"])
def test_heads_copy_it(config, kind):
    model = MultiExit(config, ExitConfig((2, 4), head=kind))
    backbone = base.init(config, jax.random.key(0))
    for point in (2, 4):
        head = model.init_exits(jax.random.key(1), backbone, "copy", None)[str(point)]
        source = backbone["blocks"][str(point - 1 if kind == "mlp" else config.depth - 1)]
        copy = head["mlp"] if kind == "mlp" else head["block"]["mlp"]
        assert tree.fingerprint(copy) == tree.fingerprint(source["mlp"])


def test_it_is_what_is_run():
    """The block's result, put together from its parts, and the same in a loop over blocks."""
    config = of(MixtureDecoder)
    params = base.init(config, jax.random.key(0))
    looped = dataclasses.replace(config, scan=True)

    def run(config, params):
        network = base.merge(base.abstract(config.build)[0], params)
        hidden, context = network.stem({"tokens": TOKENS})
        return hidden, network.run_blocks(hidden, 0, 2, context), context, network

    hidden, want, context, network = run(config, params)
    for i in range(2):
        block = network.blocks[str(i)]
        assert isinstance(block.mlp, Mixture)
        mixed, _ = block.attention(block.attention_norm(hidden), context)
        hidden = hidden + mixed
        hidden = hidden + block.mlp(block.mlp_norm(hidden))
    np.testing.assert_allclose(want, hidden, atol=1e-6)
    _, got, *_ = run(looped, base.stack_blocks(params))
    np.testing.assert_allclose(got, want, atol=1e-6)


def test_a_norm_of_ones_own_is_in_blocks_readout_and_heads():
    config = of(OffsetDecoder)
    model = MultiExit(config, ExitConfig((2,), head="mlp"))
    backbone = base.init(config, jax.random.key(0))
    exits = model.init_exits(jax.random.key(1), backbone, "copy", None)
    for name in ("attention_norm", "mlp_norm"):
        assert parts(backbone["blocks"], name) == {"weight"}
    assert backbone["final_norm"].keys() == exits["2"]["norm"].keys() == {"weight"}
    assert exits["2"]["mlp_norm"].keys() == {"weight"}
