"""The parts of a decoder's block, and the block.

The one idea: whatever stands between a part and the residual stream, a norm behind the part or a
multiplier, belongs to the part. So a block, and a head that copies one of its parts, only adds.
"""

import dataclasses
import typing
from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import nnx

from early_exit import sharding
from early_exit.backbones import base, cached_attention, layers, rotary
from early_exit.backbones.visibility import Visibility

if typing.TYPE_CHECKING:
    from early_exit.backbones.decoder import DecoderConfig


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Context:
    """What every block needs beside the hidden states.

    Attributes:
      rotation: of the new positions; None where positions are learned.
      documents: int32 [B, T], the new positions' documents, which do not see each other; None for
        one a row.
      local_rotation: that of blocks with a window, where they have one of their own.
    """

    rotation: rotary.Rotation | None
    documents: jax.Array | None
    local_rotation: rotary.Rotation | None = None


@dataclasses.dataclass(frozen=True)
class Place:
    """In what a block differs from others of its network.

    Attributes:
      window: a position sees itself and the window − 1 before it; None for all before it.
      turned: whether queries and keys are turned by their positions.
      dense: whether it has a plain feed-forward part where others have a mixture of experts.
    """

    window: int | None
    turned: bool
    dense: bool


class OffsetRMSNorm(nnx.Module):
    """RMSNorm whose factors are 1 + scale, all of it in float32 (Gemma)."""

    def __init__(self, width: int, *, epsilon: float):
        self.scale = nnx.Param(jnp.zeros(width))
        self.epsilon = epsilon

    def __call__(self, x: jax.Array) -> jax.Array:
        wide = x.astype(jnp.float32)
        wide *= jax.lax.rsqrt((wide**2).mean(-1, keepdims=True) + self.epsilon)
        factors = 1 + self.scale[...].astype(jnp.float32)
        return (wide * jnp.expand_dims(factors, tuple(range(x.ndim - 1)))).astype(x.dtype)


class Nothing(nnx.Module):
    """In place of a norm that a network has not."""

    def __call__(self, x: jax.Array) -> jax.Array:
        return x


def linear(
    config: "DecoderConfig",
    inputs: int,
    outputs: int,
    bias: bool,
    *,
    residual: bool = False,
    rngs: nnx.Rngs,
) -> nnx.Linear:
    """N(0, 0.02); projections back into the residual stream are scaled by 1/√(2·depth)."""
    deviation = 0.02 / (2 * config.depth) ** 0.5 if residual else 0.02
    return nnx.Linear(
        inputs,
        outputs,
        use_bias=bias,
        kernel_init=nnx.initializers.normal(deviation),
        rngs=rngs,
    )


class Part(nnx.Module):
    """What attention and the feed-forward part share: how they come back to the residual stream."""

    def __init__(self, config: "DecoderConfig", *, rngs: nnx.Rngs):
        self.config = config
        if config.norms != "before":
            self.after_norm = config.build_norm(rngs)

    def returned(self, x_BTD: jax.Array) -> jax.Array:
        """The part's result → what is added."""
        if self.config.norms != "before":
            x_BTD = self.after_norm(x_BTD)
        scale = self.config.residual_scale
        return x_BTD if scale == 1 else x_BTD * scale


class Attention(Part):
    """Grouped-query attention."""

    def __init__(self, config: "DecoderConfig", place: Place, *, rngs: nnx.Rngs):
        super().__init__(config, rngs=rngs)
        c, self.place = config, place
        inner, kv_inner = c.heads * c.head_dim, c.kv_heads * c.head_dim
        self.query = linear(c, c.width, inner, c.qkv_bias, rngs=rngs)
        self.key = linear(c, c.width, kv_inner, c.qkv_bias, rngs=rngs)
        self.value = linear(c, c.width, kv_inner, c.qkv_bias, rngs=rngs)
        if c.qk_norm:
            self.query_norm = c.build_qk_norm(c.heads, rngs)
            self.key_norm = c.build_qk_norm(c.kv_heads, rngs)
        bias = c.attention_output_bias
        self.output = linear(c, inner, c.width, bias, residual=True, rngs=rngs)

    def keys_values(self, x_BTD: jax.Array, context: Context) -> base.Rows:
        key = self._heads(self.key(x_BTD), self.config.kv_heads, "key_norm", context)
        value = self.value(x_BTD)
        return key, value.reshape(key.shape)

    def __call__(self, x_BTD, context: Context, past=None, past_length_B=None):
        visibility = Visibility(causal=True, window=self.place.window, documents=context.documents)
        scoring = self.config.scoring
        return self._attended(
            x_BTD,
            context,
            lambda *new: layers.attend(*new, visibility, past, past_length_B, scoring),
        )

    def draft(self, x_BTD: jax.Array, context: Context, chain: base.Chain):
        how = chain, self.place.window, self.config.scoring
        return self._attended(x_BTD, context, lambda *new: cached_attention.chained(*new, *how))

    def _attended(self, x_BTD, context: Context, attend: Callable) -> tuple[jax.Array, base.Rows]:
        """Args:
        attend: new queries, keys and values → what each position has mixed.
        """
        query = self._heads(self.query(x_BTD), self.config.heads, "query_norm", context)
        key, value = self.keys_values(x_BTD, context)
        mixed = attend(query, key, value)
        mixed = self.output(mixed.reshape(*x_BTD.shape[:2], -1))
        return self.returned(mixed), (key, value)

    def _heads(self, x_BTi: jax.Array, heads: int, norm: str, context: Context) -> jax.Array:
        """Projected queries or keys → [B, T, heads, d], normed and turned."""
        c = self.config
        if c.qk_norm and c.qk_norm_whole:
            x_BTi = getattr(self, norm)(x_BTi)
        x_BTNd = x_BTi.reshape(*x_BTi.shape[:2], heads, c.head_dim)
        if c.qk_norm and not c.qk_norm_whole:
            x_BTNd = getattr(self, norm)(x_BTNd)
        rotation = self._rotation(context)
        return x_BTNd if rotation is None else rotary.rotate(x_BTNd, rotation)

    def _rotation(self, context: Context) -> rotary.Rotation | None:
        if not self.place.turned:
            return None
        is_local = self.place.window is not None and context.local_rotation is not None
        return context.local_rotation if is_local else context.rotation


class MLP(Part):
    """Feed-forward part: plain, or gated (Shazeer 2020)."""

    def __init__(self, config: "DecoderConfig", *, rngs: nnx.Rngs):
        super().__init__(config, rngs=rngs)
        c = config
        if c.gated:
            self.gate = linear(c, c.width, c.mlp_width, c.mlp_bias, rngs=rngs)
        self.up = linear(c, c.width, c.mlp_width, c.mlp_bias, rngs=rngs)
        self.down = linear(c, c.mlp_width, c.width, c.mlp_bias, residual=True, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.returned(self.mixed(x))

    def mixed(self, x: jax.Array) -> jax.Array:
        """The part alone, without what stands behind it."""
        activation = layers.ACTIVATIONS[self.config.activation]
        if self.config.gated:
            return self.down(activation(self.gate(x)) * self.up(x))
        return self.down(activation(self.up(x)))


class Block(base.CachedBlock):
    """One transformer block."""

    def __init__(self, config: "DecoderConfig", place: Place, *, rngs: nnx.Rngs):
        self.parallel = config.parallel
        self.attention_norm = config.build_input_norm(rngs)
        self.attention = Attention(config, place, rngs=rngs)
        self.mlp_norm = config.build_input_norm(rngs)
        self.mlp = MLP(config, rngs=rngs) if place.dense else config.build_mlp(rngs)

    def __call__(
        self,
        hidden_BTD: jax.Array,
        context: Context,
        past: base.Rows | None = None,
        past_length_B: jax.Array | None = None,
    ) -> tuple[jax.Array, base.Rows]:
        """Hidden states → (hidden states, keys and values of the new positions)."""
        mixed, rows = self.attention(self.attention_norm(hidden_BTD), context, past, past_length_B)
        return self._rest(hidden_BTD, mixed), rows

    def draft(self, hidden_BTD, context: Context, chain: base.Chain):
        mixed, rows = self.attention.draft(self.attention_norm(hidden_BTD), context, chain)
        return self._rest(hidden_BTD, mixed), rows

    def _rest(self, hidden_BTD: jax.Array, mixed_BTD: jax.Array) -> jax.Array:
        """What follows attention."""
        mixed_BTD = sharding.by_row(hidden_BTD + mixed_BTD)
        read = hidden_BTD if self.parallel else mixed_BTD
        return sharding.by_row(mixed_BTD + self.mlp(self.mlp_norm(read)))

    def keys_values(self, hidden_BTD: jax.Array, context: Context) -> base.Rows:
        """Only what later positions will look at; the block itself is not run."""
        return self.attention.keys_values(self.attention_norm(hidden_BTD), context)
