"""The one decoder: causal language models described by a frozen config.

Beside the `Backbone` contract, its blocks have the two calls that cached decoding needs: a block
runs new positions against a read-only cache and returns their keys and values, or
(`keys_values`) returns only those.
"""

import dataclasses

import jax
import jax.numpy as jnp
from flax import nnx

from early_exit.backbones import base, layers

# Keys and values of one block: each [B, K, S, d] in a cache, [B, T, K, d] for new positions.
KeyValue = tuple[jax.Array, jax.Array]


@dataclasses.dataclass(frozen=True)
class DecoderConfig(base.BackboneConfig):
    """Llama-family decoder: RMSNorm, rotary positions, grouped queries, SwiGLU, no biases."""

    vocab_size: int
    width: int
    depth: int
    heads: int
    kv_heads: int
    head_dim: int
    mlp_width: int
    context_length: int
    norm_eps: float = 1e-5
    rope_theta: float = 10_000.0
    tied: bool = True

    def __post_init__(self):
        if self.heads % self.kv_heads:
            raise ValueError(f"heads={self.heads} is not a multiple of kv_heads={self.kv_heads}")
        if self.head_dim % 2:
            raise ValueError(f"rotary positions need an even head_dim, not {self.head_dim}")

    def build(self, rngs: nnx.Rngs) -> "Decoder":
        return Decoder(self, rngs=rngs)

    def build_norm(self, rngs: nnx.Rngs) -> nnx.RMSNorm:
        return nnx.RMSNorm(self.width, epsilon=self.norm_eps, rngs=rngs)

    def build_mlp(self, rngs: nnx.Rngs) -> "MLP":
        return MLP(self, rngs=rngs)

    def build_block(self, rngs: nnx.Rngs) -> "Block":
        return Block(self, rngs=rngs)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Context:
    """What every block needs: rotary angles [B, T, d/2] and the mask among the new positions."""

    angles: jax.Array
    mask: jax.Array


def _linear(inputs: int, outputs: int, depth: int, *, residual: bool = False, rngs: nnx.Rngs):
    """N(0, 0.02); projections back into the residual stream are scaled by 1/√(2·depth)."""
    deviation = 0.02 / (2 * depth) ** 0.5 if residual else 0.02
    return nnx.Linear(
        inputs,
        outputs,
        use_bias=False,
        kernel_init=nnx.initializers.normal(deviation),
        rngs=rngs,
    )


def _table(config: DecoderConfig, rngs: nnx.Rngs) -> nnx.Embed:
    init = nnx.initializers.normal(0.02)
    return nnx.Embed(config.vocab_size, config.width, embedding_init=init, rngs=rngs)


class Attention(nnx.Module):
    """Grouped-query attention with rotary positions."""

    def __init__(self, config: DecoderConfig, *, rngs: nnx.Rngs):
        c = self.config = config
        self.query = _linear(c.width, c.heads * c.head_dim, c.depth, rngs=rngs)
        self.key = _linear(c.width, c.kv_heads * c.head_dim, c.depth, rngs=rngs)
        self.value = _linear(c.width, c.kv_heads * c.head_dim, c.depth, rngs=rngs)
        self.output = _linear(c.heads * c.head_dim, c.width, c.depth, residual=True, rngs=rngs)

    def keys_values(self, x_BTD: jax.Array, context: Context) -> KeyValue:
        shape = (*x_BTD.shape[:2], self.config.kv_heads, self.config.head_dim)
        key = layers.rotate(self.key(x_BTD).reshape(shape), context.angles)
        return key, self.value(x_BTD).reshape(shape)

    def __call__(self, x_BTD, context: Context, past=None, past_length_B=None):
        batch, length, _ = x_BTD.shape
        query = self.query(x_BTD).reshape(batch, length, self.config.heads, self.config.head_dim)
        query = layers.rotate(query, context.angles)
        key, value = self.keys_values(x_BTD, context)
        mixed = layers.attend(query, key, value, context.mask, past, past_length_B)
        return self.output(mixed.reshape(batch, length, -1)), (key, value)


class MLP(nnx.Module):
    """SwiGLU feed-forward (Shazeer 2020)."""

    def __init__(self, config: DecoderConfig, *, rngs: nnx.Rngs):
        c = config
        self.gate = _linear(c.width, c.mlp_width, c.depth, rngs=rngs)
        self.up = _linear(c.width, c.mlp_width, c.depth, rngs=rngs)
        self.down = _linear(c.mlp_width, c.width, c.depth, residual=True, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.down(jax.nn.silu(self.gate(x)) * self.up(x))


class Block(nnx.Module):
    """One pre-norm transformer block."""

    def __init__(self, config: DecoderConfig, *, rngs: nnx.Rngs):
        self.attention_norm = config.build_norm(rngs)
        self.attention = Attention(config, rngs=rngs)
        self.mlp_norm = config.build_norm(rngs)
        self.mlp = MLP(config, rngs=rngs)

    def __call__(
        self,
        hidden_BTD: jax.Array,
        context: Context,
        past: KeyValue | None = None,
        past_length_B: jax.Array | None = None,
    ) -> tuple[jax.Array, KeyValue]:
        """Hidden states → (hidden states, keys and values of the new positions)."""
        mixed, rows = self.attention(self.attention_norm(hidden_BTD), context, past, past_length_B)
        hidden_BTD = hidden_BTD + mixed
        return hidden_BTD + self.mlp(self.mlp_norm(hidden_BTD)), rows

    def keys_values(self, hidden_BTD: jax.Array, context: Context) -> KeyValue:
        """Only what later positions will look at; the block itself is not run."""
        return self.attention.keys_values(self.attention_norm(hidden_BTD), context)


class Decoder(base.Backbone):
    """Embedding, blocks, final norm, output matrix (the embedding itself when tied)."""

    def __init__(self, config: DecoderConfig, *, rngs: nnx.Rngs):
        self.config = config
        self.embedding = _table(config, rngs)
        self.blocks = nnx.Dict({str(i): Block(config, rngs=rngs) for i in range(config.depth)})
        self.final_norm = config.build_norm(rngs)
        if not config.tied:
            self.output = _table(config, rngs)

    def stem(self, inputs: dict[str, jax.Array]) -> tuple[jax.Array, Context]:
        """Inputs:
        tokens: int32 [B, T];
        positions: int32 [B, T], optional, counting from 0 in each row if absent;
        segments: int32 [B, T], optional; positions see only positions of their own segment.
        """
        tokens_BT = inputs["tokens"]
        length = tokens_BT.shape[1]
        positions = inputs.get("positions")
        if positions is None:
            positions = jnp.broadcast_to(jnp.arange(length)[None], tokens_BT.shape)
        context = Context(
            angles=layers.rotary_angles(positions, self.config.head_dim, self.config.rope_theta),
            mask=layers.causal_mask(inputs.get("segments"), length),
        )
        return self.embedding(tokens_BT), context

    def run_blocks(self, hidden, start, stop, context):
        for i in range(start, stop):
            hidden, _ = self.blocks[str(i)](hidden, context)
        return hidden

    def features(self, hidden):
        return self.final_norm(hidden)

    def output_table(self):
        return (self.embedding if self.config.tied else self.output).embedding[...]
