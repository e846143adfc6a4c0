"""Encoder–decoders: T5 and its relatives, described by a frozen config.

The one idea: a network that answers a text is a decoder with a memory. The encoder runs once, and
what the decoder's blocks look at of it, keys and values, is kept like a cache. From there on the
decoder is one like others: stem, blocks, readout, exits in between.

Attention knows distances by a bias that is learned for each head, and that all blocks of a side
share. Rows are short here, so scores are whole arrays, T × S for each head.
"""

import dataclasses
import functools
import math
from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from early_exit import sharding
from early_exit.backbones import base, layers

# Of keys that are not looked at; finite, for rows that look at nothing.
_UNSEEN = -1e30


@dataclasses.dataclass(frozen=True)
class T5Config(base.BackboneConfig):
    """An encoder–decoder with learned biases for distances (Raffel et al. 2020).

    Attributes:
      vocab_size, width: V, D.
      depth: blocks of the decoder, L, between which exits stand.
      encoder_depth: blocks of the encoder.
      heads, head_dim, mlp_width: of both.
      context_length: positions of a prompt, and of an answer, that it was made for.
      gated: the feed-forward part multiplies its inner values by an activated gate (T5 1.1).
      activation: one of `layers.ACTIVATIONS`.
      buckets: rows of the tables of biases; distances of `max_distance` and more share the last.
      tied: the output matrix is the embedding.
      scaled: logits are divided by √D (T5 1.0).
      start_id: the token that every answer is written behind.
    """

    vocab_size: int
    width: int
    depth: int
    encoder_depth: int
    heads: int
    head_dim: int
    mlp_width: int
    context_length: int = 512
    norm_eps: float = 1e-6
    gated: bool = False
    activation: str = "relu"
    buckets: int = 32
    max_distance: int = 128
    tied: bool = True
    scaled: bool = True
    start_id: int = 0

    classifies: ClassVar[bool] = False
    decodes: ClassVar[bool] = True
    encodes_prompts: ClassVar[bool] = True
    incidental: ClassVar[tuple[str, ...]] = ("context_length",)
    head_kinds: ClassVar[tuple[str, ...]] = ("embedding", "norm", "mlp")

    def __post_init__(self):
        if self.activation not in layers.ACTIVATIONS:
            raise ValueError(
                f"unknown activation {self.activation!r}; choose one of "
                f"{', '.join(layers.ACTIVATIONS)}"
            )
        if self.buckets % 4 or not self.buckets // 2 < self.max_distance:
            raise ValueError(
                f"buckets={self.buckets} must be a multiple of 4, and less than twice "
                f"max_distance={self.max_distance}"
            )
        if not 0 <= self.start_id < self.vocab_size:
            raise ValueError(f"start_id={self.start_id} is no token of {self.vocab_size}")

    @property
    def num_classes(self) -> int:
        return self.vocab_size

    @property
    def logit_rule(self) -> base.LogitRule:
        return base.LogitRule(divisor=self.width**0.5) if self.scaled else base.PLAIN

    def build(self, rngs: nnx.Rngs) -> "T5":
        return T5(self, rngs=rngs)

    def example_inputs(self):
        """A token, and one position of a prompt that has been read."""
        rows = {f"block/{i}": self.cached_rows(i) for i in range(self.depth)}
        shapes = {
            name: tuple(jax.ShapeDtypeStruct((1, heads, 1, d), jnp.float32) for heads, d in row)
            for name, row in rows.items()
        }
        memory = base.Memory(shapes, jax.ShapeDtypeStruct((1, 1), jnp.bool_))
        return super().example_inputs() | {"memory": memory}

    def cached_rows(self, index):
        return ((self.heads, self.head_dim),) * 2

    def share_read(self, path):
        """Keys and values of a prompt are made once."""
        return 0.0 if "/cross_attention/key/" in path or "/cross_attention/value/" in path else 1.0

    def build_norm(self, rngs: nnx.Rngs) -> nnx.RMSNorm:
        return nnx.RMSNorm(self.width, epsilon=self.norm_eps, rngs=rngs)

    def build_mlp(self, rngs: nnx.Rngs) -> "MLP":
        return MLP(self, rngs=rngs)


@functools.lru_cache(maxsize=8)
def _bucket_of(buckets: int, max_distance: int) -> np.ndarray:
    """int32 [max_distance + 1]: one row for each short distance, then fewer and fewer.

    In float32, as where the weights come from: rounding decides at the edges.
    """
    exact = buckets // 2
    distance = np.arange(max_distance + 1)
    with np.errstate(divide="ignore"):
        log = np.log(distance.astype(np.float32) / np.float32(exact))
    steps = log / np.float32(math.log(max_distance / exact)) * np.float32(buckets - exact)
    wide = exact + np.maximum(steps, 0).astype(np.int32)
    return np.where(distance < exact, distance, np.minimum(wide, buckets - 1)).astype(np.int32)


def distance_bias(
    table: jax.Array, query_BT: jax.Array, key_BS: jax.Array, config: T5Config, both_ways: bool
) -> jax.Array:
    """The bias of each head for each pair of positions, [B, H, T, S].

    Args:
      table: [buckets, H].
      query_BT, key_BS: int32, positions.
      both_ways: half of the rows are for keys that come later; else those count as the same place.
    """
    ahead = key_BS[:, None, :] - query_BT[:, :, None]
    rows = config.buckets // 2 if both_ways else config.buckets
    distance = jnp.abs(ahead) if both_ways else jnp.maximum(-ahead, 0)
    known = jnp.asarray(_bucket_of(rows, config.max_distance))
    bucket = known[jnp.minimum(distance, config.max_distance)]
    if both_ways:
        bucket += jnp.where(ahead > 0, rows, 0)
    return table[bucket].transpose(0, 3, 1, 2)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Context:
    """What every block of the decoder needs beside the hidden states.

    Attributes:
      positions_BT: int32, of the new positions, from 0 at the start of each answer.
      documents_BT: int32, 0 where there is no token; None for tokens everywhere.
      distances: the table of biases, [buckets, H].
      memory: of the prompt.
    """

    positions_BT: jax.Array
    documents_BT: jax.Array | None
    distances: jax.Array
    memory: base.Memory


def linear(config: T5Config, inputs: int, outputs: int, rngs: nnx.Rngs) -> nnx.Linear:
    """As wide a start as the scores, which are not divided by √d, allow."""
    init = nnx.initializers.normal(inputs**-0.5)
    return nnx.Linear(inputs, outputs, use_bias=False, kernel_init=init, rngs=rngs)


class Attention(nnx.Module):
    """Scores are products as they are, and a bias."""

    def __init__(self, config: T5Config, *, rngs: nnx.Rngs):
        c = self.config = config
        inner = c.heads * c.head_dim
        init = nnx.initializers.normal((c.width * c.head_dim) ** -0.5)
        self.query = nnx.Linear(c.width, inner, use_bias=False, kernel_init=init, rngs=rngs)
        self.key = linear(c, c.width, inner, rngs)
        self.value = linear(c, c.width, inner, rngs)
        self.output = linear(c, inner, c.width, rngs)

    def keys_values(self, x_BSD: jax.Array) -> base.Rows:
        """Each [B, S, H, d]."""
        return self._heads(self.key(x_BSD)), self._heads(self.value(x_BSD))

    def __call__(self, x_BTD: jax.Array, *seen: tuple[base.Rows, jax.Array]) -> jax.Array:
        """Args:
        seen: keys and values, each [B, H, S, d], and what is added to their scores, [B, H, T, S] or
          what broadcasts to that.
        """
        query = self._heads(self.query(x_BTD))
        scores = [
            jnp.einsum("bthd,bhsd->bhts", query, keys, preferred_element_type=jnp.float32) + bias
            for (keys, _), bias in seen
        ]
        weights = jax.nn.softmax(jnp.concatenate(scores, axis=-1), axis=-1).astype(x_BTD.dtype)
        ends = np.cumsum([part.shape[-1] for part in scores])[:-1].tolist()
        mixed = sum(
            jnp.einsum("bhts,bhsd->bthd", part, values)
            for part, ((_, values), _) in zip(jnp.split(weights, ends, -1), seen, strict=True)
        )
        return self.output(mixed.reshape(*x_BTD.shape[:2], -1))

    def _heads(self, x_BTi: jax.Array) -> jax.Array:
        return x_BTi.reshape(*x_BTi.shape[:2], self.config.heads, self.config.head_dim)


def _turned(rows: base.Rows) -> base.Rows:
    """[B, T, K, d] → [B, K, T, d], as a cache has them."""
    return tuple(x.swapaxes(1, 2) for x in rows)


class MLP(nnx.Module):
    """Feed-forward part: plain, or gated (Shazeer 2020)."""

    def __init__(self, config: T5Config, *, rngs: nnx.Rngs):
        c = self.config = config
        if c.gated:
            self.gate = linear(c, c.width, c.mlp_width, rngs)
        self.up = linear(c, c.width, c.mlp_width, rngs)
        self.down = linear(c, c.mlp_width, c.width, rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        activation = layers.ACTIVATIONS[self.config.activation]
        if self.config.gated:
            return self.down(activation(self.gate(x)) * self.up(x))
        return self.down(activation(self.up(x)))


class EncoderBlock(nnx.Module):
    """A block of the encoder."""

    def __init__(self, config: T5Config, *, rngs: nnx.Rngs):
        self.attention_norm = config.build_norm(rngs)
        self.attention = Attention(config, rngs=rngs)
        self.mlp_norm = config.build_norm(rngs)
        self.mlp = MLP(config, rngs=rngs)

    def __call__(self, hidden_BSD: jax.Array, bias: jax.Array) -> jax.Array:
        x = self.attention_norm(hidden_BSD)
        mixed = self.attention(x, (_turned(self.attention.keys_values(x)), bias))
        hidden_BSD = sharding.by_row(hidden_BSD + mixed)
        return sharding.by_row(hidden_BSD + self.mlp(self.mlp_norm(hidden_BSD)))


class Encoder(nnx.Module):
    """Embedded prompt → what the decoder's blocks look at, after a norm of its own."""

    def __init__(self, config: T5Config, *, rngs: nnx.Rngs):
        self.config = config
        self.distances = nnx.Param(_first_distances(config, rngs))
        self.blocks = nnx.Dict(
            {str(i): EncoderBlock(config, rngs=rngs) for i in range(config.encoder_depth)}
        )
        self.final_norm = config.build_norm(rngs)

    def __call__(self, hidden_BSD: jax.Array, real_BS: jax.Array) -> jax.Array:
        positions = jnp.arange(hidden_BSD.shape[1])[None]  # the same in all rows
        bias = distance_bias(self.distances[...], positions, positions, self.config, True)
        bias += jnp.where(real_BS, 0, _UNSEEN)[:, None, None]
        for i in range(self.config.encoder_depth):
            hidden_BSD = self.blocks[str(i)](hidden_BSD, bias)
        return self.final_norm(hidden_BSD)


class Block(base.CachedBlock):
    """A block of the decoder: earlier positions, the prompt, the feed-forward part."""

    def __init__(self, config: T5Config, index: int, *, rngs: nnx.Rngs):
        self.config, self.name = config, f"block/{index}"
        self.attention_norm = config.build_norm(rngs)
        self.attention = Attention(config, rngs=rngs)
        self.cross_norm = config.build_norm(rngs)
        self.cross_attention = Attention(config, rngs=rngs)
        self.mlp_norm = config.build_norm(rngs)
        self.mlp = MLP(config, rngs=rngs)

    def __call__(self, hidden_BTD, context: Context, past=None, past_length_B=None):
        x = self.attention_norm(hidden_BTD)
        rows = self.attention.keys_values(x)
        seen = [(_turned(rows), self._among_new(context))]
        if past is not None:
            seen.insert(0, (past, self._of_past(context, past[0].shape[2], past_length_B)))
        hidden_BTD = sharding.by_row(hidden_BTD + self.attention(x, *seen))
        memory = context.memory
        of_prompt = memory.rows[self.name], jnp.where(memory.real_BS, 0, _UNSEEN)[:, None, None]
        mixed = self.cross_attention(self.cross_norm(hidden_BTD), of_prompt)
        hidden_BTD = sharding.by_row(hidden_BTD + mixed)
        return sharding.by_row(hidden_BTD + self.mlp(self.mlp_norm(hidden_BTD))), rows

    def keys_values(self, hidden_BTD, context: Context) -> base.Rows:
        return self.attention.keys_values(self.attention_norm(hidden_BTD))

    def draft(self, hidden_BTD, context, chain):
        raise NotImplementedError("an encoder–decoder has no recurrent exit")

    def _among_new(self, context: Context) -> jax.Array:
        places = context.positions_BT
        bias = distance_bias(context.distances, places, places, self.config, False)
        index = jnp.arange(places.shape[1])
        sees = (index[None, :] <= index[:, None])[None]
        if context.documents_BT is not None:
            sees &= context.documents_BT[:, :, None] == context.documents_BT[:, None, :]
        return bias + jnp.where(sees, 0, _UNSEEN)[:, None]

    def _of_past(self, context: Context, slots: int, past_length_B: jax.Array) -> jax.Array:
        """A slot holds the position of its number."""
        places = jnp.arange(slots)[None]
        bias = distance_bias(context.distances, context.positions_BT, places, self.config, False)
        sees = places < past_length_B[:, None]
        return bias + jnp.where(sees, 0, _UNSEEN)[:, None, None]


def _first_distances(config: T5Config, rngs: nnx.Rngs) -> jax.Array:
    return 0.02 * jax.random.normal(rngs.params(), (config.buckets, config.heads))


def _table(config: T5Config, rngs: nnx.Rngs) -> nnx.Embed:
    init = nnx.initializers.normal(1.0 if config.scaled else 0.02)
    return nnx.Embed(config.vocab_size, config.width, embedding_init=init, rngs=rngs)


class T5(base.Backbone):
    """Embedding, encoder, the decoder's blocks, final norm, output matrix."""

    def __init__(self, config: T5Config, *, rngs: nnx.Rngs):
        c = self.config = config
        self.embedding = _table(c, rngs)
        self.encoder = Encoder(c, rngs=rngs)
        self.distances = nnx.Param(_first_distances(c, rngs))
        self.blocks = nnx.Dict({str(i): Block(c, i, rngs=rngs) for i in range(c.depth)})
        self.final_norm = c.build_norm(rngs)
        if not c.tied:
            self.output = _table(c, rngs)

    def remember(self, prompt_BS: jax.Array, real_BS: jax.Array) -> base.Memory:
        encoded = self.encoder(self._embedded(prompt_BS), real_BS)
        rows = {
            block.name: _turned(block.cross_attention.keys_values(encoded))
            for block in (self.blocks[str(i)] for i in range(self.config.depth))
        }
        return base.Memory(rows, real_BS)

    def stem(self, inputs: dict[str, jax.Array]) -> tuple[jax.Array, Context]:
        """Inputs:
        tokens: int32 [B, T], of answers, `start_id` in front;
        positions: int32 [B, T], optional, counting from 0 in each row if absent;
        documents: int32 [B, T], optional; positions see only positions of their own document;
        prompt, prompt_real: int32 and bool [B, S], what is answered, and where it has tokens; or
        memory: what `remember` made of them.
        """
        tokens_BT, memory = inputs["tokens"], inputs.get("memory")
        if memory is None:
            memory = self.remember(inputs["prompt"], inputs["prompt_real"])
        positions = inputs.get("positions")
        if positions is None:
            positions = jnp.broadcast_to(jnp.arange(tokens_BT.shape[1])[None], tokens_BT.shape)
        hidden = sharding.by_row(self._embedded(tokens_BT))
        distances = self.distances[...]
        return hidden, Context(positions, inputs.get("documents"), distances, memory)

    def _embedded(self, tokens: jax.Array) -> jax.Array:
        """In the dtype that the table has now; calling it would give the one it was built with."""
        return jnp.take(self.embedding.embedding[...], tokens, axis=0)

    def run_blocks(self, hidden, start, stop, context):
        for i in range(start, stop):
            hidden, _ = self.blocks[str(i)](hidden, context)
        return hidden

    def features(self, hidden, context=None):
        return self.final_norm(hidden)

    def output_table(self):
        return (self.embedding if self.config.tied else self.output).embedding[...]
