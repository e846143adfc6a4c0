"""The one encoder: BERT and its relatives, described by a frozen config.

The one idea: a post-norm block ends normalised, so the hidden states after any block are as fit to
be read as those after the last. What is read is the first position ([CLS] or <s>), or the mean of
the real ones, through a pooler if the network has one.
"""

import dataclasses
from typing import ClassVar

import jax
import jax.numpy as jnp
from flax import nnx

from early_exit.backbones import base, layers
from early_exit.backbones.visibility import Visibility

POOLERS = {
    "tanh": jnp.tanh,
    "relu": jax.nn.relu,
    "gelu": layers.ACTIVATIONS["gelu"],
    "none": None,
}
POOLINGS = ("first", "mean")


@dataclasses.dataclass(frozen=True)
class EncoderConfig(base.BackboneConfig):
    """Post-norm encoder with learned positions (Devlin et al. 2018; Liu et al. 2019, RoBERTa).

    Attributes:
      context_length: the most positions of a row.
      num_classes: of the classifier; 0 for a network without one.
      token_types: rows of the token type table; 0 for none (DistilBERT).
      pooling: what one prediction is made from: the `first` position, or the `mean` of those that
        hold real tokens.
      pooler: `tanh`, `relu` or `gelu`, a dense layer with that activation between what is pooled
        and the classifier; `none` for no such layer.
      pad_position: None, positions count from 0 in every row; a number (RoBERTa), they count real
        tokens only, from the number after this one, and padding is at this one.
      activation: of the feed-forward part, one of `layers.ACTIVATIONS`.
      embedding_width: of the tables, from which a linear layer makes hidden states (ELECTRA); 0 for
        tables as wide as these.
    """

    vocab_size: int
    width: int
    depth: int
    heads: int
    mlp_width: int
    context_length: int
    num_classes: int = 0
    token_types: int = 2
    pooler: str = "tanh"
    pad_position: int | None = None
    activation: str = "gelu"
    norm_eps: float = 1e-12
    pooling: str = "first"
    embedding_width: int = 0

    classifies: ClassVar[bool] = True
    incidental: ClassVar[tuple[str, ...]] = ("context_length",)
    head_kinds: ClassVar[tuple[str, ...]] = ("linear", "norm", "mlp", "layer")

    def __post_init__(self):
        if self.width % self.heads:
            raise ValueError(f"width={self.width} is not a multiple of heads={self.heads}")
        options = ("activation", layers.ACTIVATIONS), ("pooler", POOLERS), ("pooling", POOLINGS)
        for name, known in options:
            if getattr(self, name) not in known:
                raise ValueError(
                    f"unknown {name} {getattr(self, name)!r}; choose one of {', '.join(known)}"
                )

    def build(self, rngs: nnx.Rngs) -> "Encoder":
        return Encoder(self, rngs=rngs)

    def pool(self, hidden, context):
        """[B, T, D] → [B, D]."""
        return pooled(hidden, context.mask, self.pooling)

    def build_norm(self, rngs: nnx.Rngs) -> nnx.LayerNorm:
        return _norm(self.width, self, rngs)

    def build_mlp(self, rngs: nnx.Rngs) -> "MLP":
        return MLP(self, rngs=rngs)

    def build_block(self, rngs: nnx.Rngs) -> "Block":
        return Block(self, rngs=rngs)


def pooled(hidden_BTD: jax.Array, mask_BT: jax.Array | None, pooling: str) -> jax.Array:
    """[B, D] as one of `POOLINGS` says, of the positions that the mask has; None for all."""
    if pooling == "first":
        return hidden_BTD[:, 0]
    if mask_BT is None:
        return hidden_BTD.mean(1)
    real = mask_BT[..., None]
    total = jnp.where(real, hidden_BTD, 0).sum(1, dtype=jnp.float32)
    return (total / jnp.maximum(real.sum(1), 1)).astype(hidden_BTD.dtype)


def check_length(tokens_BT: jax.Array, context_length: int) -> None:
    """Raises ValueError for rows that are longer than the context."""
    if (length := tokens_BT.shape[1]) > context_length:
        raise ValueError(
            f"rows of {length} tokens do not fit the encoder's {context_length} positions; "
            "truncate them"
        )


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Context:
    """What every block needs: which positions hold real tokens, bool [B, T]; None for all."""

    mask: jax.Array | None


def linear(inputs: int, outputs: int, rngs: nnx.Rngs) -> nnx.Linear:
    return nnx.Linear(inputs, outputs, kernel_init=nnx.initializers.normal(0.02), rngs=rngs)


def _norm(width: int, config: EncoderConfig, rngs: nnx.Rngs) -> nnx.LayerNorm:
    # The fast variance, E[x²] − E[x]², cancels where the mean is far from 0.
    return nnx.LayerNorm(width, epsilon=config.norm_eps, use_fast_variance=False, rngs=rngs)


def _table(rows: int, width: int, rngs: nnx.Rngs) -> nnx.Embed:
    return nnx.Embed(rows, width, embedding_init=nnx.initializers.normal(0.02), rngs=rngs)


def _rows(table: nnx.Embed, indices: jax.Array) -> jax.Array:
    """In the dtype that the table has now; calling it would give the one it was built with."""
    return jnp.take(table.embedding[...], indices, axis=0)


class Attention(nnx.Module):
    """Every position looks at every real token."""

    def __init__(self, config: EncoderConfig, *, rngs: nnx.Rngs):
        self.heads = config.heads
        self.query = linear(config.width, config.width, rngs)
        self.key = linear(config.width, config.width, rngs)
        self.value = linear(config.width, config.width, rngs)
        self.output = linear(config.width, config.width, rngs)

    def __call__(self, x_BTD: jax.Array, context: Context) -> jax.Array:
        query, key, value = (
            project(x_BTD).reshape(*x_BTD.shape[:2], self.heads, -1)
            for project in (self.query, self.key, self.value)
        )
        mixed = layers.attend(query, key, value, Visibility(real=context.mask))
        return self.output(mixed.reshape(x_BTD.shape))


class MLP(nnx.Module):
    """Feed-forward with one hidden layer, of any config with these sizes and an activation."""

    def __init__(self, config: base.BackboneConfig, *, rngs: nnx.Rngs):
        self.activation = config.activation
        self.up = linear(config.width, config.mlp_width, rngs)
        self.down = linear(config.mlp_width, config.width, rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.down(layers.ACTIVATIONS[self.activation](self.up(x)))


class Block(nnx.Module):
    """One post-norm transformer block (Vaswani et al. 2017)."""

    def __init__(self, config: EncoderConfig, *, rngs: nnx.Rngs):
        self.attention = Attention(config, rngs=rngs)
        self.attention_norm = config.build_norm(rngs)
        self.mlp = config.build_mlp(rngs)
        self.mlp_norm = config.build_norm(rngs)

    def __call__(self, hidden_BTD: jax.Array, context: Context) -> jax.Array:
        hidden_BTD = self.attention_norm(hidden_BTD + self.attention(hidden_BTD, context))
        return self.mlp_norm(hidden_BTD + self.mlp(hidden_BTD))


class Embeddings(nnx.Module):
    """Word, position and token type, summed and normalised; made as wide as hidden states are."""

    def __init__(self, config: EncoderConfig, *, rngs: nnx.Rngs):
        first = 0 if config.pad_position is None else config.pad_position + 1
        width = config.embedding_width or config.width
        self.words = _table(config.vocab_size, width, rngs)
        self.positions = _table(first + config.context_length, width, rngs)
        if config.token_types:
            self.token_types = _table(config.token_types, width, rngs)
        self.norm = _norm(width, config, rngs)
        if config.embedding_width:
            self.project = linear(width, config.width, rngs)


class Encoder(base.Backbone):
    """Embeddings, blocks, and where the checkpoint has them a pooler and a classifier."""

    def __init__(self, config: EncoderConfig, *, rngs: nnx.Rngs):
        self.config = config
        self.embeddings = Embeddings(config, rngs=rngs)
        self.blocks = nnx.Dict({str(i): Block(config, rngs=rngs) for i in range(config.depth)})
        if config.pooler != "none":
            self.pooler = linear(config.width, config.width, rngs)
        if config.num_classes:
            self.output = base.Classifier(config.num_classes, config.width, rngs=rngs)

    def stem(self, inputs: dict[str, jax.Array]) -> tuple[jax.Array, Context]:
        """Inputs:
        tokens: int32 [B, T];
        mask: bool [B, T], optional, true where a token is real; nobody looks at the others;
        token_types: int32 [B, T], optional, 0 everywhere if absent.

        Raises:
          ValueError: rows longer than the context, or token types for a network without them.
        """
        tokens_BT, mask_BT = inputs["tokens"], inputs.get("mask")
        check_length(tokens_BT, self.config.context_length)
        hidden = _rows(self.embeddings.words, tokens_BT)
        token_types_BT = inputs.get("token_types")
        if self.config.token_types:
            if token_types_BT is None:
                token_types_BT = jnp.zeros_like(tokens_BT)
            hidden += _rows(self.embeddings.token_types, token_types_BT)
        elif token_types_BT is not None:
            raise ValueError("this encoder has no token types; leave token_types out")
        hidden += _rows(self.embeddings.positions, self._positions(tokens_BT, mask_BT))
        hidden = self.embeddings.norm(hidden)
        if self.config.embedding_width:
            hidden = self.embeddings.project(hidden)
        return hidden, Context(mask_BT)

    def _positions(self, tokens_BT: jax.Array, mask_BT: jax.Array | None) -> jax.Array:
        """Rows of the position table, int32 [B, T].

        RoBERTa's count the real tokens, by the mask here (transformers looks for the padding token
        instead, which is the same where the mask is false exactly at the padding).
        """
        places = jnp.broadcast_to(jnp.arange(tokens_BT.shape[1])[None], tokens_BT.shape)
        if self.config.pad_position is None:
            return places
        counted = places + 1 if mask_BT is None else jnp.cumsum(mask_BT, axis=1) * mask_BT
        return self.config.pad_position + counted

    def run_blocks(self, hidden, start, stop, context):
        for i in range(start, stop):
            hidden = self.blocks[str(i)](hidden, context)
        return hidden

    def features(self, hidden, context=None):
        """Hidden states [B, T, D] → [B, D]; `context` may be left out if nothing is masked."""
        pooled = self.config.pool(hidden, Context(None) if context is None else context)
        activation = POOLERS[self.config.pooler]
        return pooled if activation is None else activation(self.pooler(pooled))

    def output_table(self):
        check_classifier(self.config)
        return self.output.embedding[...]

    def output_bias(self):
        check_classifier(self.config)
        return self.output.bias[...]


def check_classifier(config: base.BackboneConfig) -> None:
    """Raises ValueError for an encoder without a classifier."""
    if not config.num_classes:
        raise ValueError(
            "this encoder has no classifier (num_classes is 0), so it gives features, not logits; "
            "set num_classes in its config and tune one, or load a checkpoint that has one"
        )
