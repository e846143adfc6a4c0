"""The one decoder: causal language models described by a frozen config.

The one idea: families differ by a few independent choices (norm, positions, biases, what follows
what), not by classes.
"""

import dataclasses
import functools
from typing import ClassVar

import jax
import jax.numpy as jnp
from flax import nnx

from early_exit import sharding
from early_exit.backbones import base, layers, rotary
from early_exit.backbones.decoder_parts import MLP, Block, Context, Nothing, OffsetRMSNorm, Place
from early_exit.backbones.mixture import EXPERTS, Mixture, MixtureMLP
from early_exit.backbones.scoring import Scoring

# The values of each choice by name.
CHOICES = {
    "norm": ("rms", "layer", "rms_offset"),
    "norms": ("before", "after", "both"),
    "activation": tuple(layers.ACTIVATIONS),
}
# What a backward pass computes again instead of keeping it: nothing, all but the products with
# weights, or everything but each block's input.
REMAT = {
    "none": None,
    "attention": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
    "block": jax.checkpoint_policies.nothing_saveable,
}


@dataclasses.dataclass(frozen=True)
class DecoderConfig(base.BackboneConfig):
    """A causal transformer; the defaults are Llama's.

    Attributes:
      vocab_size, width, depth: V, D, L.
      heads, kv_heads, head_dim: of attention; `heads / kv_heads` queries share keys and values.
      mlp_width: inner width of the feed-forward part.
      context_length: positions the model was made for.
      norm: `rms` (scale), `layer` (mean taken off; scale and bias) or `rms_offset` (1 + scale).
      norms: where they stand around each part of a block: `before` it, `after` it, in front of the
        sum (OLMo 2), or `both` (Gemma 2).
      gated: the feed-forward part multiplies its inner values by an activated gate.
      activation: one of `layers.ACTIVATIONS`.
      parallel: both parts of a block read its input, and their sum is added (GPT-NeoX).
      qkv_bias, attention_output_bias, mlp_bias: which linear layers add a bias.
      qk_norm: queries and keys are RMS-normed, head by head, before they are turned (Qwen3).
      qk_norm_whole: all heads at once instead (OLMo 2).
      attention_scale, attention_cap: see `scoring`.
      embedding_scale, residual_scale: what embeddings, and the result of each part of a block, are
        multiplied by.
      logit_divisor, logit_cap: logits are divided by the one, then softly capped by the other.
      rotary_fraction: of each head, what is turned by its position; with 0, positions have a
        learned embedding instead (GPT-2).
      rope_theta, rope_scaling: see `rotary`.
      local_rope_theta: of blocks with a window, which then are not scaled; None for the same.
      unturned_blocks: blocks (from 0) that do not turn queries and keys (SmolLM3).
      window: a position sees itself and the window − 1 before it; None for all before it.
      full_blocks: blocks (from 0) that see everything despite the window.
      mixture: experts in place of the feed-forward part; None for none.
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
    norms: str = "before"
    norm_eps: float = 1e-5
    gated: bool = True
    activation: str = "silu"
    parallel: bool = False
    qkv_bias: bool = False
    attention_output_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False
    qk_norm_whole: bool = False
    attention_scale: float | None = None
    attention_cap: float | None = None
    embedding_scale: float = 1.0
    residual_scale: float = 1.0
    logit_divisor: float = 1.0
    logit_cap: float | None = None
    rotary_fraction: float = 1.0
    rope_theta: float = 10_000.0
    rope_scaling: rotary.Scaling | None = None
    local_rope_theta: float | None = None
    unturned_blocks: tuple[int, ...] = ()
    window: int | None = None
    full_blocks: tuple[int, ...] = ()
    mixture: Mixture | None = None
    tied: bool = True
    scan: bool = False
    remat: str = "none"

    classifies: ClassVar[bool] = False
    decodes: ClassVar[bool] = True
    drops_blocks: ClassVar[bool] = True
    incidental: ClassVar[tuple[str, ...]] = ("context_length", "scan", "remat")
    head_kinds: ClassVar[tuple[str, ...]] = ("embedding", "norm", "mlp", "layer")

    def __post_init__(self):
        for name, known in {**CHOICES, "remat": tuple(REMAT)}.items():
            if (chosen := getattr(self, name)) not in known:
                raise ValueError(f"unknown {name} {chosen!r}; choose one of {', '.join(known)}")
        if self.heads % self.kv_heads:
            raise ValueError(f"heads={self.heads} is not a multiple of kv_heads={self.kv_heads}")
        if not 0 <= self.rotary_fraction <= 1:
            raise ValueError(f"rotary_fraction must lie in 0…1, not {self.rotary_fraction}")
        if self.rotary_fraction and (self.rotary_dim % 2 or not self.rotary_dim):
            raise ValueError(
                "rotary positions turn an even number of dimensions, not "
                f"{self.rotary_dim} (head_dim={self.head_dim}, fraction {self.rotary_fraction})"
            )
        if isinstance(self.rope_scaling, rotary.PerPair | rotary.LongRope):
            scaling, pairs = self.rope_scaling, self.rotary_dim // 2
            for divisors in (scaling.divisors, getattr(scaling, "long_divisors", ())):
                if divisors and len(divisors) != pairs:
                    raise ValueError(
                        f"{len(divisors)} divisors of rotary frequencies for {pairs} pairs"
                    )
        for name in ("attention_scale", "attention_cap", "logit_divisor", "logit_cap"):
            if (value := getattr(self, name)) is not None and not value > 0:
                raise ValueError(f"{name} must be positive, not {value}")
        if self.window is not None and self.window < 1:
            raise ValueError(f"window must be at least 1 position, not {self.window}")
        if not set(self.full_blocks) <= set(range(self.depth if self.window else 0)):
            raise ValueError(
                f"full_blocks={self.full_blocks} must name blocks from 0 to {self.depth - 1} of a "
                "model with a window"
            )
        if not set(self.unturned_blocks) <= set(range(self.depth if self.rotary_fraction else 0)):
            raise ValueError(
                f"unturned_blocks={self.unturned_blocks} must name blocks from 0 to "
                f"{self.depth - 1} of a model with rotary positions"
            )
        if self.scan and len({self.place(block) for block in range(self.depth)}) > 1:
            raise ValueError(
                "blocks that differ, some with a window, rotary positions or experts and some "
                "without, cannot be one stack; use scan=False"
            )

    @property
    def num_classes(self) -> int:
        return self.vocab_size

    @property
    def rotary_dim(self) -> int:
        """How many numbers of each head are turned."""
        return int(self.head_dim * self.rotary_fraction)

    @property
    def scoring(self) -> Scoring:
        return Scoring(self.attention_scale, self.attention_cap)

    @property
    def logit_rule(self) -> base.LogitRule:
        return base.LogitRule(self.logit_divisor, self.logit_cap)

    def place(self, block: int) -> Place:
        """In what a block (from 0) differs from others."""
        return Place(
            self.window_of(block),
            turned=block not in self.unturned_blocks,
            dense=self.mixture is not None and block in self.mixture.dense_blocks,
        )

    def share_read(self, path: str) -> float:
        if self.mixture is None or EXPERTS not in path:
            return 1.0
        return self.mixture.chosen / self.mixture.experts

    def window_of(self, block: int) -> int | None:
        """The window of a block (from 0); None if it sees everything."""
        return None if block in self.full_blocks else self.window

    def cached_rows(self, index: int) -> tuple[tuple[int, int], ...]:
        return ((self.kv_heads, self.head_dim),) * 2

    def build(self, rngs: nnx.Rngs) -> "Decoder":
        return Decoder(self, rngs=rngs)

    def without_blocks(self) -> "DecoderConfig":
        none = {"full_blocks": (), "unturned_blocks": (), "mixture": None}
        return dataclasses.replace(self, depth=0, **none, scan=False)

    def build_norm(self, rngs: nnx.Rngs) -> nnx.Module:
        if self.norm == "layer":
            how = {"epsilon": self.norm_eps, "use_fast_variance": False}
            return nnx.LayerNorm(self.width, **how, rngs=rngs)
        return self._rms_norm(self.width, rngs)

    def build_input_norm(self, rngs: nnx.Rngs) -> nnx.Module:
        return Nothing() if self.norms == "after" else self.build_norm(rngs)

    def build_qk_norm(self, heads: int, rngs: nnx.Rngs) -> nnx.Module:
        """Of queries or of keys, of which there are so many heads."""
        return self._rms_norm(heads * self.head_dim if self.qk_norm_whole else self.head_dim, rngs)

    def _rms_norm(self, width: int, rngs: nnx.Rngs) -> nnx.Module:
        if self.norm == "rms_offset":
            return OffsetRMSNorm(width, epsilon=self.norm_eps)
        return nnx.RMSNorm(width, epsilon=self.norm_eps, rngs=rngs)

    def build_mlp(self, rngs: nnx.Rngs) -> MLP | MixtureMLP:
        return MLP(self, rngs=rngs) if self.mixture is None else MixtureMLP(self, rngs=rngs)

    def build_head_mlp(self, point: int, rngs: nnx.Rngs) -> MLP | MixtureMLP:
        is_dense = self.place(point - 1).dense
        return MLP(self, rngs=rngs) if is_dense else self.build_mlp(rngs)

    def build_block(self, rngs: nnx.Rngs) -> Block:
        """A block like the last one."""
        return Block(self, self.place(self.depth - 1), rngs=rngs)


def _table(rows: int, width: int, rngs: nnx.Rngs) -> nnx.Embed:
    return nnx.Embed(rows, width, embedding_init=nnx.initializers.normal(0.02), rngs=rngs)


def _stack(config: DecoderConfig, rngs: nnx.Rngs) -> Block:
    """All blocks as one, each of its parameters with a leading axis [L]."""

    @nnx.split_rngs(splits=config.depth)
    @nnx.vmap
    def blocks(rngs):
        return Block(config, config.place(0), rngs=rngs)

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
                {str(i): Block(c, c.place(i), rngs=rngs) for i in range(c.depth)}
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
        hidden = jnp.take(self.embedding.embedding[...], tokens_BT, axis=0)
        if c.embedding_scale != 1:
            hidden *= jnp.asarray(c.embedding_scale, hidden.dtype)
        rotation = local = None
        if c.rotary_fraction:
            rotation = rotary.rotation(positions, c.rotary_dim, c.rope_theta, c.rope_scaling)
            if c.window is not None and c.local_rope_theta is not None:
                local = rotary.rotation(positions, c.rotary_dim, c.local_rope_theta)
        else:
            # Padding may stand beyond the last position: it gets that one, not NaN.
            hidden += self.positions.embedding[...].at[positions].get(mode="clip")
        return sharding.by_row(hidden), Context(rotation, inputs.get("documents"), local)

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
