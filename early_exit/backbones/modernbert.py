"""ModernBERT (Warner et al. 2024) in the `Backbone` contract: an encoder built as decoders are now.

The one idea: norms stand in front of a block's parts, positions turn queries and keys, and most
blocks look only at near positions, to both sides; so a row may be long. A classifier reads through
a dense layer of its own, which only it has.
"""

import dataclasses
from typing import ClassVar

import jax
import jax.numpy as jnp
from flax import nnx

from early_exit.backbones import base, encoder, layers, rotary
from early_exit.backbones.encoder import Context
from early_exit.backbones.visibility import Visibility


@dataclasses.dataclass(frozen=True)
class ModernBertConfig(base.BackboneConfig):
    """A pre-norm encoder with rotary positions and alternating attention.

    Attributes:
      context_length: the most positions of a row.
      num_classes: of the classifier; 0 for a network without one.
      window: in most blocks, a position sees the window − 1 before and behind it.
      full_blocks: blocks (from 0) that see whole rows.
      rope_theta: in the blocks that see whole rows; `local_rope_theta`, in the others.
      norm_bias, attention_bias, mlp_bias, pooler_bias: which parts have biases.
      activation: of the gated feed-forward parts, and `pooler_activation` of the classifier's dense
        layer: of `layers.ACTIVATIONS`.
      pooling: what one prediction is made from: the `first` position, or the `mean` of those that
        hold real tokens.
    """

    vocab_size: int
    width: int
    depth: int
    heads: int
    mlp_width: int
    context_length: int
    num_classes: int = 0
    window: int = 65
    full_blocks: tuple[int, ...] = ()
    rope_theta: float = 160_000.0
    local_rope_theta: float = 10_000.0
    norm_bias: bool = False
    attention_bias: bool = False
    mlp_bias: bool = False
    pooler_bias: bool = False
    activation: str = "gelu"
    pooler_activation: str = "gelu"
    norm_eps: float = 1e-5
    pooling: str = "first"

    classifies: ClassVar[bool] = True
    incidental: ClassVar[tuple[str, ...]] = ("context_length",)
    head_kinds: ClassVar[tuple[str, ...]] = ("linear", "norm", "mlp", "layer")

    def __post_init__(self):
        if self.width % (2 * self.heads):
            raise ValueError(
                f"width={self.width} does not make {self.heads} heads of an even width, which "
                "rotary positions need"
            )
        options = (
            ("activation", layers.ACTIVATIONS),
            ("pooler_activation", layers.ACTIVATIONS),
            ("pooling", encoder.POOLINGS),
        )
        for name, known in options:
            if getattr(self, name) not in known:
                raise ValueError(
                    f"unknown {name} {getattr(self, name)!r}; choose one of {', '.join(known)}"
                )
        if self.window < 1:
            raise ValueError(f"window must be at least 1, a position itself, not {self.window}")

    def build(self, rngs):
        return ModernBert(self, rngs=rngs)

    def pool(self, hidden, context):
        """[B, T, D] → [B, D]."""
        return encoder.pooled(hidden, None if context is None else context.mask, self.pooling)

    def build_norm(self, rngs):
        how = {"epsilon": self.norm_eps, "use_bias": self.norm_bias}
        # The fast variance, E[x²] − E[x]², cancels where the mean is far from 0.
        return nnx.LayerNorm(self.width, use_fast_variance=False, **how, rngs=rngs)

    def build_mlp(self, rngs):
        return MLP(self, rngs=rngs)

    def build_block(self, rngs):
        """A block like the last one."""
        return Block(self, self.depth - 1, rngs=rngs)


def _linear(inputs: int, outputs: int, bias: bool, rngs: nnx.Rngs) -> nnx.Linear:
    init = nnx.initializers.normal(0.02)
    return nnx.Linear(inputs, outputs, use_bias=bias, kernel_init=init, rngs=rngs)


class Attention(nnx.Module):
    """Every position looks at real tokens: at all, or at the near ones."""

    def __init__(self, config: ModernBertConfig, index: int, *, rngs: nnx.Rngs):
        self.heads, is_full = config.heads, index in config.full_blocks
        self.window = None if is_full else config.window
        self.theta = config.rope_theta if is_full else config.local_rope_theta
        names = ("query", "key", "value", "output")
        for name in names:
            setattr(self, name, _linear(config.width, config.width, config.attention_bias, rngs))

    def __call__(self, x_BTD: jax.Array, context: Context) -> jax.Array:
        query, key, value = (
            project(x_BTD).reshape(*x_BTD.shape[:2], self.heads, -1)
            for project in (self.query, self.key, self.value)
        )
        places = jnp.arange(x_BTD.shape[1])[None]
        rotation = rotary.rotation(places, query.shape[-1], self.theta)
        query, key = (rotary.rotate(x, rotation) for x in (query, key))
        sees = Visibility(window=self.window, real=context.mask)
        return self.output(layers.attend(query, key, value, sees).reshape(x_BTD.shape))


class MLP(nnx.Module):
    """Gated feed-forward part (Shazeer 2020)."""

    def __init__(self, config: ModernBertConfig, *, rngs: nnx.Rngs):
        self.activation = config.activation
        self.gate = _linear(config.width, config.mlp_width, config.mlp_bias, rngs)
        self.up = _linear(config.width, config.mlp_width, config.mlp_bias, rngs)
        self.down = _linear(config.mlp_width, config.width, config.mlp_bias, rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.down(layers.ACTIVATIONS[self.activation](self.gate(x)) * self.up(x))


class Block(nnx.Module):
    """One pre-norm transformer block; the first has no norm in front of attention."""

    def __init__(self, config: ModernBertConfig, index: int, *, rngs: nnx.Rngs):
        if index:
            self.attention_norm = config.build_norm(rngs)
        self.attention = Attention(config, index, rngs=rngs)
        self.mlp_norm = config.build_norm(rngs)
        self.mlp = config.build_mlp(rngs)

    def __call__(self, hidden_BTD: jax.Array, context: Context) -> jax.Array:
        normed = self.attention_norm(hidden_BTD) if hasattr(self, "attention_norm") else hidden_BTD
        hidden_BTD = hidden_BTD + self.attention(normed, context)
        return hidden_BTD + self.mlp(self.mlp_norm(hidden_BTD))


class Pooler(nnx.Module):
    """What a classifier has in front of its output matrix."""

    def __init__(self, config: ModernBertConfig, *, rngs: nnx.Rngs):
        self.activation = config.pooler_activation
        self.dense = _linear(config.width, config.width, config.pooler_bias, rngs)
        self.norm = config.build_norm(rngs)

    def __call__(self, x_BD: jax.Array) -> jax.Array:
        return self.norm(layers.ACTIVATIONS[self.activation](self.dense(x_BD)))


class ModernBert(base.Backbone):
    """Embeddings, blocks, a norm, and where the checkpoint has them a pooler and a classifier."""

    def __init__(self, config: ModernBertConfig, *, rngs: nnx.Rngs):
        c, init = config, nnx.initializers.normal(0.02)
        self.config = c
        self.words = nnx.Embed(c.vocab_size, c.width, embedding_init=init, rngs=rngs)
        self.words_norm = c.build_norm(rngs)
        self.blocks = nnx.Dict({str(i): Block(c, i, rngs=rngs) for i in range(c.depth)})
        self.final_norm = c.build_norm(rngs)
        if c.num_classes:
            self.pooler = Pooler(c, rngs=rngs)
            self.output = base.Classifier(c.num_classes, c.width, rngs=rngs)

    def stem(self, inputs: dict[str, jax.Array]) -> tuple[jax.Array, Context]:
        """Inputs:
        tokens: int32 [B, T];
        mask: bool [B, T], optional, true where a token is real; nobody looks at the others.

        Raises:
          ValueError: rows longer than the context, or token types, which it does not have.
        """
        c, tokens_BT = self.config, inputs["tokens"]
        encoder.check_length(tokens_BT, c.context_length)
        if inputs.get("token_types") is not None:
            raise ValueError("this encoder has no token types; leave token_types out")
        # In the type that the table has now; calling it would give the one it was built with.
        hidden = self.words_norm(jnp.take(self.words.embedding[...], tokens_BT, axis=0))
        return hidden, Context(inputs.get("mask"))

    def run_blocks(self, hidden, start, stop, context):
        for i in range(start, stop):
            hidden = self.blocks[str(i)](hidden, context)
        return hidden

    def features(self, hidden, context=None):
        """Hidden states [B, T, D] → [B, D]; `context` may be left out if nothing is masked."""
        pooled = self.config.pool(self.final_norm(hidden), context)
        return self.pooler(pooled) if self.config.num_classes else pooled

    def output_table(self):
        encoder.check_classifier(self.config)
        return self.output.embedding[...]

    def output_bias(self):
        encoder.check_classifier(self.config)
        return self.output.bias[...]
