"""The one decoder: causal language models described by a frozen config.

The one idea: families differ by a few independent choices (norm, positions, biases, what follows
what), not by classes.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import ClassVar

import jax
import jax.numpy as jnp
from flax import nnx

from early_exit import sharding
from early_exit.backbones import base, cached_attention, layers, rotary
from early_exit.backbones.visibility import Visibility

NORMS = ("rms", "layer")
# What a backward pass computes again instead of keeping it: nothing, all but the products with
# weights, or everything but each block's input.
REMAT = {
    "none": None,
    "attention": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
    "block": jax.checkpoint_policies.nothing_saveable,
}


@dataclasses.dataclass(frozen=True)
class DecoderConfig(base.BackboneConfig):
    """A pre-norm causal transformer; the defaults are Llama's.

    Attributes:
      vocab_size, width, depth: V, D, L.
      heads, kv_heads, head_dim: of attention; `heads / kv_heads` queries share keys and values.
      mlp_width: inner width of the feed-forward part.
      context_length: positions the model was made for.
      norm: `rms` (scale) or `layer` (mean taken off; scale and bias).
      gated: the feed-forward part multiplies its inner values by an activated gate.
      activation: one of `layers.ACTIVATIONS`.
      parallel: both parts of a block read its input, and their sum is added (GPT-NeoX).
      qkv_bias, attention_output_bias, mlp_bias: which linear layers add a bias.
      qk_norm: queries and keys are RMS-normed, head by head, before they are turned (Qwen3).
      rotary_fraction: of each head, what is turned by its position; with 0, positions have a
        learned embedding instead (GPT-2).
      rope_theta, rope_scaling: see `rotary`.
      window: a position sees itself and the window − 1 before it; None for all before it.
      full_blocks: blocks (from 0) that see everything despite the window.
      tied: the output matrix is the embedding.
      scan: the blocks' parameters are stacked on a leading axis [L, …], and run in a loop, so that
        the program does not grow with depth. For training; cached decoding needs them apart.
      remat: one of `REMAT`, for blocks that are trained.
    """

    vocab_size: int
    width: int
    depth: int
    heads: int
    kv_heads: int
    head_dim: int
    mlp_width: int
    context_length: int
    norm: str = "rms"
    norm_eps: float = 1e-5
    gated: bool = True
    activation: str = "silu"
    parallel: bool = False
    qkv_bias: bool = False
    attention_output_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False
    rotary_fraction: float = 1.0
    rope_theta: float = 10_000.0
    rope_scaling: rotary.Scaling | None = None
    window: int | None = None
    full_blocks: tuple[int, ...] = ()
    tied: bool = True
    scan: bool = False
    remat: str = "none"

    classifies: ClassVar[bool] = False
    decodes: ClassVar[bool] = True
    drops_blocks: ClassVar[bool] = True
    incidental: ClassVar[tuple[str, ...]] = ("context_length", "scan", "remat")
    head_kinds: ClassVar[tuple[str, ...]] = ("embedding", "norm", "mlp", "layer")

    def __post_init__(self):
        if self.norm not in NORMS:
            raise ValueError(f"unknown norm {self.norm!r}; choose one of {', '.join(NORMS)}")
        if self.activation not in layers.ACTIVATIONS:
            raise ValueError(
                f"unknown activation {self.activation!r}; choose one of "
                f"{', '.join(layers.ACTIVATIONS)}"
            )
        if self.remat not in REMAT:
            raise ValueError(f"unknown remat {self.remat!r}; choose one of {', '.join(REMAT)}")
        if self.scan and self.full_blocks:
            raise ValueError(
                "blocks with a window and blocks without cannot be one stack; use scan=False"
            )
        if self.heads % self.kv_heads:
            raise ValueError(f"heads={self.heads} is not a multiple of kv_heads={self.kv_heads}")
        if not 0 <= self.rotary_fraction <= 1:
            raise ValueError(f"rotary_fraction must lie in 0…1, not {self.rotary_fraction}")
        if self.rotary_fraction and (self.rotary_dim % 2 or not self.rotary_dim):
            raise ValueError(
                "rotary positions turn an even number of dimensions, not "
                f"{self.rotary_dim} (head_dim={self.head_dim}, fraction {self.rotary_fraction})"
            )
        if isinstance(self.rope_scaling, rotary.PerPair):
            pairs, given = self.rotary_dim // 2, len(self.rope_scaling.divisors)
            if given != pairs:
                raise ValueError(f"{given} divisors of rotary frequencies for {pairs} pairs")
        if self.window is not None and self.window < 1:
            raise ValueError(f"window must be at least 1 position, not {self.window}")
        if not set(self.full_blocks) <= set(range(self.depth if self.window else 0)):
            raise ValueError(
                f"full_blocks={self.full_blocks} must name blocks from 0 to {self.depth - 1} of a "
                "model with a window"
            )

    @property
    def num_classes(self) -> int:
        return self.vocab_size

    @property
    def rotary_dim(self) -> int:
        """How many numbers of each head are turned."""
        return int(self.head_dim * self.rotary_fraction)

    def window_of(self, block: int) -> int | None:
        """The window of a block (from 0); None if it sees everything."""
        return None if block in self.full_blocks else self.window

    def cached_rows(self, index: int) -> tuple[tuple[int, int], ...]:
        return ((self.kv_heads, self.head_dim),) * 2

    def build(self, rngs: nnx.Rngs) -> "Decoder":
        return Decoder(self, rngs=rngs)

    def build_norm(self, rngs: nnx.Rngs) -> nnx.Module:
        if self.norm == "rms":
            return nnx.RMSNorm(self.width, epsilon=self.norm_eps, rngs=rngs)
        return nnx.LayerNorm(self.width, epsilon=self.norm_eps, use_fast_variance=False, rngs=rngs)

    def build_mlp(self, rngs: nnx.Rngs) -> "MLP":
        return MLP(self, rngs=rngs)

    def build_block(self, rngs: nnx.Rngs) -> "Block":
        """A block like the last one."""
        return Block(self, self.window_of(self.depth - 1), rngs=rngs)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Context:
    """What every block needs beside the hidden states.

    Attributes:
      rotation: of the new positions; None where positions are learned.
      documents: int32 [B, T], the new positions' documents, which do not see each other; None for
        one a row.
    """

    rotation: rotary.Rotation | None
    documents: jax.Array | None


def _linear(
    config: DecoderConfig,
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


def _table(rows: int, width: int, rngs: nnx.Rngs) -> nnx.Embed:
    return nnx.Embed(rows, width, embedding_init=nnx.initializers.normal(0.02), rngs=rngs)


class Attention(nnx.Module):
    """Grouped-query attention."""

    def __init__(self, config: DecoderConfig, window: int | None, *, rngs: nnx.Rngs):
        c = self.config = config
        self.window = window
        inner, kv_inner = c.heads * c.head_dim, c.kv_heads * c.head_dim
        self.query = _linear(c, c.width, inner, c.qkv_bias, rngs=rngs)
        self.key = _linear(c, c.width, kv_inner, c.qkv_bias, rngs=rngs)
        self.value = _linear(c, c.width, kv_inner, c.qkv_bias, rngs=rngs)
        if c.qk_norm:
            self.query_norm = nnx.RMSNorm(c.head_dim, epsilon=c.norm_eps, rngs=rngs)
            self.key_norm = nnx.RMSNorm(c.head_dim, epsilon=c.norm_eps, rngs=rngs)
        bias = c.attention_output_bias
        self.output = _linear(c, inner, c.width, bias, residual=True, rngs=rngs)

    def keys_values(self, x_BTD: jax.Array, context: Context) -> base.Rows:
        shape = (*x_BTD.shape[:2], self.config.kv_heads, self.config.head_dim)
        key = self.key(x_BTD).reshape(shape)
        if self.config.qk_norm:
            key = self.key_norm(key)
        if context.rotation is not None:
            key = rotary.rotate(key, context.rotation)
        return key, self.value(x_BTD).reshape(shape)

    def __call__(self, x_BTD, context: Context, past=None, past_length_B=None):
        visibility = Visibility(causal=True, window=self.window, documents=context.documents)
        return self._attended(
            x_BTD, context, lambda *new: layers.attend(*new, visibility, past, past_length_B)
        )

    def draft(self, x_BTD: jax.Array, context: Context, chain: base.Chain):
        return self._attended(
            x_BTD, context, lambda *new: cached_attention.chained(*new, chain, self.window)
        )

    def _attended(self, x_BTD, context: Context, attend: Callable) -> tuple[jax.Array, base.Rows]:
        """Args:
        attend: new queries, keys and values → what each position has mixed.
        """
        batch, length, _ = x_BTD.shape
        query = self.query(x_BTD).reshape(batch, length, self.config.heads, self.config.head_dim)
        if self.config.qk_norm:
            query = self.query_norm(query)
        if context.rotation is not None:
            query = rotary.rotate(query, context.rotation)
        key, value = self.keys_values(x_BTD, context)
        mixed = attend(query, key, value)
        return self.output(mixed.reshape(batch, length, -1)), (key, value)


class MLP(nnx.Module):
    """Feed-forward part: plain, or gated (Shazeer 2020)."""

    def __init__(self, config: DecoderConfig, *, rngs: nnx.Rngs):
        c = self.config = config
        if c.gated:
            self.gate = _linear(c, c.width, c.mlp_width, c.mlp_bias, rngs=rngs)
        self.up = _linear(c, c.width, c.mlp_width, c.mlp_bias, rngs=rngs)
        self.down = _linear(c, c.mlp_width, c.width, c.mlp_bias, residual=True, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        activation = layers.ACTIVATIONS[self.config.activation]
        if self.config.gated:
            return self.down(activation(self.gate(x)) * self.up(x))
        return self.down(activation(self.up(x)))


class Block(base.CachedBlock):
    """One pre-norm transformer block."""

    def __init__(self, config: DecoderConfig, window: int | None, *, rngs: nnx.Rngs):
        self.parallel = config.parallel
        self.attention_norm = config.build_norm(rngs)
        self.attention = Attention(config, window, rngs=rngs)
        self.mlp_norm = config.build_norm(rngs)
        self.mlp = config.build_mlp(rngs)

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


def _stack(config: DecoderConfig, rngs: nnx.Rngs) -> Block:
    """All blocks as one, each of its parameters with a leading axis [L]."""

    @nnx.split_rngs(splits=config.depth)
    @nnx.vmap
    def blocks(rngs):
        return Block(config, config.window, rngs=rngs)

    return blocks(rngs)


class Decoder(base.Backbone):
    """Embedding, blocks, final norm, output matrix (the embedding itself when tied)."""

    def __init__(self, config: DecoderConfig, *, rngs: nnx.Rngs):
        c = self.config = config
        self.embedding = _table(c.vocab_size, c.width, rngs)
        if not c.rotary_fraction:
            self.positions = _table(c.context_length, c.width, rngs)
        if c.scan:
            self.blocks = _stack(c, rngs)
        else:
            self.blocks = nnx.Dict(
                {str(i): Block(c, c.window_of(i), rngs=rngs) for i in range(c.depth)}
            )
        self.final_norm = c.build_norm(rngs)
        if not c.tied:
            self.output = _table(c.vocab_size, c.width, rngs)

    def stem(self, inputs: dict[str, jax.Array]) -> tuple[jax.Array, Context]:
        """Inputs:
        tokens: int32 [B, T];
        positions: int32 [B, T], optional, counting from 0 in each row if absent;
        documents: int32 [B, T], optional; positions see only positions of their own document.

        Raises:
          ValueError: positions are learned, and there are fewer than T of them.
        """
        c = self.config
        tokens_BT = inputs["tokens"]
        length = tokens_BT.shape[1]
        positions = inputs.get("positions")
        if positions is None:
            if not c.rotary_fraction and length > c.context_length:
                raise ValueError(
                    f"{length} positions, but the model has learned {c.context_length}; "
                    "use shorter sequences"
                )
            positions = jnp.broadcast_to(jnp.arange(length)[None], tokens_BT.shape)
        # Calling the module would compute in the type it was built with, not that of the weights.
        hidden, rotation = jnp.take(self.embedding.embedding[...], tokens_BT, axis=0), None
        if c.rotary_fraction:
            rotation = rotary.rotation(positions, c.rotary_dim, c.rope_theta, c.rope_scaling)
        else:
            # Padding may stand beyond the last position: it gets that one, not NaN.
            hidden += self.positions.embedding[...].at[positions].get(mode="clip")
        return sharding.by_row(hidden), Context(rotation, inputs.get("documents"))

    def run_blocks(self, hidden, start, stop, context):
        if not self.config.scan:
            for i in range(start, stop):
                hidden, _ = self.blocks[str(i)](hidden, context)
            return hidden
        definition, stack = nnx.split(self.blocks)

        def run(hidden, i):
            # By index: a slice of the stack would be a copy of all the blocks in it.
            params = jax.tree.map(lambda x: jax.lax.dynamic_index_in_dim(x, i, 0, False), stack)
            return nnx.merge(definition, params)(hidden, context)[0], None

        return jax.lax.scan(run, hidden, jnp.arange(start, stop))[0]

    def run_blocks_training(self, hidden, start, stop, context, kept=None):
        def run(definition, hidden, xs):
            params, kept_B = xs
            after, _ = nnx.merge(definition, params)(hidden, context)
            if kept_B is not None:
                after = jnp.where(kept_B[:, None, None], after, hidden)
            return after, None

        if policy := REMAT[self.config.remat]:
            loops = self.config.scan
            run = jax.checkpoint(run, policy=policy, static_argnums=0, prevent_cse=not loops)
        if self.config.scan:
            definition, stack = nnx.split(self.blocks)
            # A slice: the gradient of an index would be as large as the stack, block after block.
            slices = jax.tree.map(lambda x: x[start:stop], (stack, kept))
            return jax.lax.scan(functools.partial(run, definition), hidden, slices)[0], {}
        for i in range(start, stop):
            definition, params = nnx.split(self.blocks[str(i)])
            hidden, _ = run(definition, hidden, (params, None if kept is None else kept[i]))
        return hidden, {}

    def features(self, hidden, context=None):
        return self.final_norm(hidden)

    def output_table(self):
        return (self.embedding if self.config.tied else self.output).embedding[...]
