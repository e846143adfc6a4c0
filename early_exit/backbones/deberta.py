"""DeBERTa-v3 (He et al. 2021) in the `Backbone` contract: an encoder whose positions are relative.

The one idea: a position's score for another is of three parts, what both hold, what the one holds
and how far the other is, and the reverse. Distances are counted exactly nearby and in growing
buckets further off, and share one table of vectors through all blocks.
"""

import dataclasses
from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from early_exit.backbones import base, encoder, layers
from early_exit.backbones.encoder import Context

_PARTS = 3  # of a score; it is divided by √(parts · width of a head)
_LOWEST = -1e30


@dataclasses.dataclass(frozen=True)
class DebertaConfig(base.BackboneConfig):
    """A post-norm encoder with disentangled attention.

    Attributes:
      context_length: the most positions of a row.
      buckets: of distances to one side.
      furthest: distances beyond it are in the last bucket.
      token_types: rows of the token type table; 0 for none.
      num_classes: of the classifier; 0 for a network without one.
      activation: of the feed-forward parts, and `pooler_activation` of the classifier's dense
        layer: of `layers.ACTIVATIONS`.
    """

    vocab_size: int
    width: int
    depth: int
    heads: int
    mlp_width: int
    context_length: int
    buckets: int
    furthest: int
    num_classes: int = 0
    token_types: int = 0
    activation: str = "gelu"
    pooler_activation: str = "gelu"
    norm_eps: float = 1e-7

    classifies: ClassVar[bool] = True
    incidental: ClassVar[tuple[str, ...]] = ("context_length",)
    # No whole block: it reads the table of distances, which heads do not have.
    head_kinds: ClassVar[tuple[str, ...]] = ("linear", "norm", "mlp")

    def __post_init__(self):
        if self.width % self.heads:
            raise ValueError(f"width={self.width} is not a multiple of heads={self.heads}")
        for name in ("activation", "pooler_activation"):
            if getattr(self, name) not in layers.ACTIVATIONS:
                known = ", ".join(layers.ACTIVATIONS)
                raise ValueError(f"unknown {name} {getattr(self, name)!r}; choose one of {known}")
        if not 4 <= self.buckets <= 2 * self.furthest:
            raise ValueError(
                f"buckets={self.buckets} must lie in 4…{2 * self.furthest}, twice the furthest "
                "distance"
            )

    def build(self, rngs):
        return Deberta(self, rngs=rngs)

    def pool(self, hidden, context):
        """[B, T, D] → [B, D]."""
        return hidden[:, 0]

    def build_norm(self, rngs):
        # The fast variance, E[x²] − E[x]², cancels where the mean is far from 0.
        return nnx.LayerNorm(self.width, epsilon=self.norm_eps, use_fast_variance=False, rngs=rngs)

    def build_mlp(self, rngs):
        return encoder.MLP(self, rngs=rngs)


def _rows_of_distances(length: int, buckets: int, furthest: int) -> np.ndarray:
    """int32 [T, T]: for a query and a key, the row of the table that their distance has."""
    places, middle = np.arange(length), buckets // 2
    apart = places[:, None] - places[None]
    near = np.abs(apart) < middle
    far = np.where(near, middle - 1, np.abs(apart)).astype(np.float32)
    # In float32, as in torch: what is rounded up may be a whole number but for an ulp.
    share = np.log(far / np.float32(middle)) / np.log(np.float32((furthest - 1) / middle))
    bucket = np.ceil(share * np.float32(middle - 1)) + middle
    counted = np.where(far <= middle, apart, bucket * np.sign(apart)).astype(np.int32)
    return np.clip(counted + buckets, 0, 2 * buckets - 1)


class Attention(nnx.Module):
    """Every position looks at every real token, and at how far it is."""

    def __init__(self, config: DebertaConfig, *, rngs: nnx.Rngs):
        self.heads, self.buckets, self.furthest = config.heads, config.buckets, config.furthest
        for name in ("query", "key", "value", "output"):
            setattr(self, name, encoder.linear(config.width, config.width, rngs))

    def __call__(self, x_BTD: jax.Array, table_RD: jax.Array, context: Context) -> jax.Array:
        def heads(x):
            return x.reshape(*x.shape[:-1], self.heads, -1)

        query, key, value = (heads(part(x_BTD)) for part in (self.query, self.key, self.value))
        far_query, far_key = heads(self.query(table_RD)), heads(self.key(table_RD))
        rows = _rows_of_distances(x_BTD.shape[1], self.buckets, self.furthest)

        def product(spec, x, y):
            return jnp.einsum(spec, x, y, preferred_element_type=jnp.float32)

        scores = product("bqhd,bkhd->bhqk", query, key)
        by_query = product("bqhd,rhd->bhqr", query, far_key)
        scores += jnp.take_along_axis(by_query, jnp.asarray(rows)[None, None], axis=-1)
        by_key = product("bkhd,rhd->bhkr", key, far_query)
        # Of a key, the row that its query's distance has: the table is read the other way round.
        read = jnp.take_along_axis(by_key, jnp.asarray(rows.T)[None, None], axis=-1)
        scores += read.swapaxes(-1, -2)
        scores /= np.sqrt(_PARTS * query.shape[-1])
        if context.mask is not None:
            # Padding that asks gets the mean of all, as in transformers; nobody reads it.
            seen = context.mask[:, None, None] & context.mask[:, None, :, None]
            scores = jnp.where(seen, scores, _LOWEST)
        weights = jax.nn.softmax(scores, axis=-1).astype(value.dtype)
        mixed = jnp.einsum("bhqk,bkhd->bqhd", weights, value)
        return self.output(mixed.reshape(x_BTD.shape))


class Block(nnx.Module):
    """One post-norm transformer block."""

    def __init__(self, config: DebertaConfig, *, rngs: nnx.Rngs):
        self.attention = Attention(config, rngs=rngs)
        self.attention_norm = config.build_norm(rngs)
        self.mlp = config.build_mlp(rngs)
        self.mlp_norm = config.build_norm(rngs)

    def __call__(self, hidden_BTD: jax.Array, table_RD: jax.Array, context: Context) -> jax.Array:
        mixed = self.attention(hidden_BTD, table_RD, context)
        hidden_BTD = self.attention_norm(hidden_BTD + mixed)
        return self.mlp_norm(hidden_BTD + self.mlp(hidden_BTD))


class Deberta(base.Backbone):
    """Embeddings, blocks, and where the checkpoint has them a pooler and a classifier."""

    def __init__(self, config: DebertaConfig, *, rngs: nnx.Rngs):
        c, init = config, nnx.initializers.normal(0.02)
        self.config = c
        self.words = nnx.Embed(c.vocab_size, c.width, embedding_init=init, rngs=rngs)
        if c.token_types:
            self.token_types = nnx.Embed(c.token_types, c.width, embedding_init=init, rngs=rngs)
        self.words_norm = c.build_norm(rngs)
        self.distances = nnx.Embed(2 * c.buckets, c.width, embedding_init=init, rngs=rngs)
        self.distances_norm = c.build_norm(rngs)
        self.blocks = nnx.Dict({str(i): Block(c, rngs=rngs) for i in range(c.depth)})
        if c.num_classes:
            self.pooler = encoder.linear(c.width, c.width, rngs)
            self.output = base.Classifier(c.num_classes, c.width, rngs=rngs)

    def stem(self, inputs: dict[str, jax.Array]) -> tuple[jax.Array, Context]:
        """Inputs:
        tokens: int32 [B, T];
        mask: bool [B, T], optional, true where a token is real; nobody looks at the others;
        token_types: int32 [B, T], optional, 0 everywhere if absent.

        Raises:
          ValueError: rows longer than the context, or token types for a network without them.
        """
        c, tokens_BT, mask_BT = self.config, inputs["tokens"], inputs.get("mask")
        encoder.check_length(tokens_BT, c.context_length)
        types_BT = inputs.get("token_types")
        # In the type that tables have now; calling them would give the one they were built with.
        hidden = jnp.take(self.words.embedding[...], tokens_BT, axis=0)
        if c.token_types:
            types_BT = jnp.zeros_like(tokens_BT) if types_BT is None else types_BT
            hidden += jnp.take(self.token_types.embedding[...], types_BT, axis=0)
        elif types_BT is not None:
            raise ValueError("this encoder has no token types; leave token_types out")
        hidden = self.words_norm(hidden)
        if mask_BT is not None:
            hidden = jnp.where(mask_BT[..., None], hidden, 0)
        return hidden, Context(mask_BT)

    def run_blocks(self, hidden, start, stop, context):
        table = self.distances_norm(self.distances.embedding[...])
        for i in range(start, stop):
            hidden = self.blocks[str(i)](hidden, table, context)
        return hidden

    def features(self, hidden, context=None):
        """Hidden states [B, T, D] → [B, D]."""
        pooled = self.config.pool(hidden, context)
        if not self.config.num_classes:
            return pooled
        return layers.ACTIVATIONS[self.config.pooler_activation](self.pooler(pooled))

    def output_table(self):
        encoder.check_classifier(self.config)
        return self.output.embedding[...]

    def output_bias(self):
        encoder.check_classifier(self.config)
        return self.output.bias[...]
