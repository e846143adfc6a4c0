"""A feed-forward part of several experts, of which each position runs a few.

The one idea: routing is exact. No expert is ever full, so no position is left out: the rows of all
positions are sorted by expert, and one product with ragged groups does them all. Where there are
fewer rows than experts, as in decoding, only the matrices of those that are chosen are read.

Shapes: N positions, D width, E experts, k of them for each position, F inner width of an expert.
"""

import dataclasses
import functools
import typing
from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import nnx

from early_exit import sharding
from early_exit.backbones import decoder_parts, layers

if typing.TYPE_CHECKING:
    from early_exit.backbones.decoder import DecoderConfig

# Of paths to parameters that are stacked by expert.
EXPERTS = "/experts/"


@dataclasses.dataclass(frozen=True)
class Mixture:
    """The experts of a network.

    Attributes:
      experts, chosen: E and k.
      width: F.
      renormalised: whether the weights of the chosen ones are made to sum to 1.
      shared_width: inner width of an expert that all positions run, weighed by a gate of its own
        (Qwen2-MoE); 0 for none.
      dense_blocks: blocks (from 0) that have a plain feed-forward part, `mlp_width` wide.
      balance: coefficient of the loss by which routers that are trained learn to give all experts
        as much (Fedus et al. 2021, eq. 4); 0 for none.
    """

    experts: int
    chosen: int
    width: int
    renormalised: bool = True
    shared_width: int = 0
    dense_blocks: tuple[int, ...] = ()
    balance: float = 0.0

    incidental: typing.ClassVar[tuple[str, ...]] = ("balance",)

    def __post_init__(self):
        if not 1 <= self.chosen <= self.experts:
            raise ValueError(
                f"each position runs 1 to {self.experts} of {self.experts} experts, not "
                f"{self.chosen}"
            )


class Stack(nnx.Module):
    """The kernels of all experts, [E, in, out]."""

    def __init__(self, experts: int, inputs: int, outputs: int, deviation: float, *, rngs):
        init = nnx.initializers.normal(deviation)
        self.kernel = nnx.Param(init(rngs.params(), (experts, inputs, outputs)))


class Experts(nnx.Module):
    """What each expert is: a gated feed-forward part without biases."""

    def __init__(self, config: "DecoderConfig", *, rngs: nnx.Rngs):
        m, back = config.mixture, 0.02 / (2 * config.depth) ** 0.5
        self.activation = layers.ACTIVATIONS[config.activation]
        self.gate = Stack(m.experts, config.width, m.width, 0.02, rngs=rngs)
        self.up = Stack(m.experts, config.width, m.width, 0.02, rngs=rngs)
        self.down = Stack(m.experts, m.width, config.width, back, rngs=rngs)

    def __call__(self, x_ND: jax.Array, ids_Nk: jax.Array, shares_Nk: jax.Array) -> jax.Array:
        """Each position's chosen experts, weighed by its shares: [N, D] in the type of x."""
        kernels = [stack.kernel[...] for stack in (self.gate, self.up, self.down)]
        experts, _, inner = kernels[0].shape
        few = ids_Nk.size < experts

        def local(first, x_ND, ids_Nk, shares_Nk, *kernels):
            """Of the experts from `first` on, float32."""
            own_Nk = ids_Nk - first
            here_Nk = (own_Nk >= 0) & (own_Nk < len(kernels[0]))
            run = _gathered if few else _sorted
            out_NkD = run(x_ND, jnp.where(here_Nk, own_Nk, -1), kernels, self.activation)
            weighed_NkD = out_NkD.astype(jnp.float32) * shares_Nk[:, :, None]
            return jnp.where(here_Nk[:, :, None], weighed_NkD, 0).sum(1)

        run = sharding.by_expert(local, experts, inner)
        return run(x_ND, ids_Nk, shares_Nk, *kernels).astype(x_ND.dtype)


def _gathered(x_ND, ids_Nk, kernels, activation: Callable) -> jax.Array:
    """[N, k, D]; the matrices of chosen experts are read, and no others.

    Args:
      ids_Nk: which experts; −1 for none, of which the result says nothing.
    """
    gate, up, down = (kernel[ids_Nk] for kernel in kernels)
    inner = activation(jnp.einsum("nd,nkdf->nkf", x_ND, gate))
    inner *= jnp.einsum("nd,nkdf->nkf", x_ND, up)
    return jnp.einsum("nkf,nkfd->nkd", inner, down)


def _sorted(x_ND, ids_Nk, kernels, activation: Callable) -> jax.Array:
    """The same; every expert's rows stand together, those of none behind them."""
    (count, chosen), experts = ids_Nk.shape, len(kernels[0])
    group = jnp.where(ids_Nk < 0, experts, ids_Nk).reshape(-1)
    order = jnp.argsort(group)
    sizes = jnp.bincount(group, length=experts + 1)[:experts].astype(jnp.int32)
    gate, up, down = kernels
    rows = x_ND[order // chosen]
    inner = activation(jax.lax.ragged_dot(rows, gate, sizes))
    inner *= jax.lax.ragged_dot(rows, up, sizes)
    out = jax.lax.ragged_dot(inner, down, sizes)
    return out[jnp.argsort(order)].reshape(count, chosen, -1)


class MixtureMLP(decoder_parts.Part):
    """Feed-forward part: a router, its experts, and what they share."""

    def __init__(self, config: "DecoderConfig", *, rngs: nnx.Rngs):
        super().__init__(config, rngs=rngs)
        m = config.mixture
        self.router = decoder_parts.linear(config, config.width, m.experts, False, rngs=rngs)
        self.experts = Experts(config, rngs=rngs)
        if m.shared_width:
            plain = dataclasses.replace(config, mlp_width=m.shared_width, mixture=None)
            self.shared = decoder_parts.MLP(plain, rngs=rngs)
            self.shared_gate = decoder_parts.linear(config, config.width, 1, False, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        x_ND = x.reshape(-1, x.shape[-1])
        ids_Nk, shares_Nk = self.routed(x_ND)
        out_ND = self.experts(x_ND, ids_Nk, shares_Nk)
        if hasattr(self, "shared"):
            out_ND += jax.nn.sigmoid(self.shared_gate(x_ND)) * self.shared.mixed(x_ND)
        return self.returned(out_ND.reshape(x.shape))

    def routed(self, x_ND: jax.Array) -> tuple[jax.Array, jax.Array]:
        """(which experts each position runs, int32 [N, k]; what each weighs, float32 [N, k])."""
        m = self.config.mixture
        probs_NE = jax.nn.softmax(self.router(x_ND).astype(jnp.float32))
        shares_Nk, ids_Nk = jax.lax.top_k(probs_NE, m.chosen)
        if m.balance:
            shares_Nk = _balanced(m.balance)(shares_Nk, probs_NE, ids_Nk)
        if m.renormalised:
            shares_Nk /= shares_Nk.sum(-1, keepdims=True)
        return ids_Nk, shares_Nk


@functools.cache
def _balanced(coefficient: float) -> Callable:
    """Passes the shares on as they are; backwards, adds the gradient of the balancing loss,

        coefficient · E · Σ_e (assignments to e, per position) · (mean probability of e),

    so that it is learned by whatever trains the router, and no loss has to be carried there.
    """

    @jax.custom_vjp
    def passed(shares_Nk, probs_NE, ids_Nk):
        return shares_Nk

    def forward(shares_Nk, probs_NE, ids_Nk):
        count, experts = probs_NE.shape
        assigned_E = jnp.bincount(ids_Nk.reshape(-1), length=experts) / count
        return shares_Nk, (assigned_E, count, experts)

    def backward(kept, gradient):
        assigned_E, count, experts = kept
        by_prob_E = coefficient * experts * assigned_E / count
        by_probs_NE = jnp.broadcast_to(by_prob_E[None], (count, experts)).astype(jnp.float32)
        return gradient, by_probs_NE, None

    passed.defvjp(forward, backward)
    return passed
