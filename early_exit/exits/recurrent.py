"""A recurrent exit: a head that enters the network from behind.

The one idea: the deep states that the position before has ended with, and the newest token, tell
much of what the newest position's deep state will be. So a few late blocks of its own take the
place of all those in front of them, and their result takes the place of the deep states at the next
position: token after token, for the price of a block or two each.

    taps of position p − 1 → fused ┐
                                   ├ joined → blocks → state at p → norm, output matrix
    token p ───────────────────────┘                      ↓            → token p + 1
    token p + 1 ──────────────────────────────────────── joined → blocks → state at p + 1 → …

The form is EAGLE-3's (Li et al. 2025, https://arxiv.org/abs/2503.01840), and so is tuning: all
positions at once, a few steps of every position's own chain unrolled, each of them looking at exact
rows up to its chain's beginning and at the chain's own behind it.
"""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from early_exit.backbones import base
from early_exit.backbones.base import BackboneConfig
from early_exit.backbones.cached_attention import CACHE_CHUNK

# Rows of every block of the head, first to last.
BlockRows = tuple[base.Rows, ...]


class Recurrent(nnx.Module):
    """Taps and tokens in, states out; `features` of a state are what its output matrix reads.

    Without blocks of its own it has a feed-forward part, and sees no position but its own.
    """

    def __init__(
        self, network: BackboneConfig, taps: Sequence[int], blocks: int, rows: int, *, rngs
    ):
        """Args:
        rows: of its output matrix; 0 if it shares the backbone's.
        """
        width, self.taps = network.width, tuple(taps)
        self.tap_norms = nnx.Dict({str(tap): network.build_norm(rngs) for tap in taps})
        self.fuse = _linear(len(taps) * width, width, rngs)
        self.token_norm, self.state_norm = network.build_norm(rngs), network.build_norm(rngs)
        self.join = _linear(2 * width, width, rngs)
        if blocks:
            self.blocks = nnx.Dict({str(i): network.build_block(rngs) for i in range(blocks)})
        else:
            self.mlp_norm = network.build_input_norm(rngs)
            self.mlp = network.build_mlp(rngs)
        self.norm = network.build_norm(rngs)
        if rows:
            init = nnx.initializers.normal(0.02)
            self.output = nnx.Embed(rows, width, embedding_init=init, rngs=rngs)

    @property
    def own_blocks(self) -> tuple[base.CachedBlock, ...]:
        blocks = getattr(self, "blocks", {})
        return tuple(blocks[str(i)] for i in range(len(blocks)))

    def fused(self, taps: Sequence[jax.Array]) -> jax.Array:
        """The tapped states [..., D] of a position → what its successor begins with, [..., D]."""
        found = zip(self.taps, taps, strict=True)
        normed = [self.tap_norms[str(block)](states) for block, states in found]
        return self.fuse(jnp.concatenate(normed, axis=-1))

    def joined(self, before: jax.Array, embedded: jax.Array) -> jax.Array:
        """The state of the position before, or what stands for it, and the token: [..., D]."""
        parts = [self.token_norm(embedded), self.state_norm(before)]
        return self.join(jnp.concatenate(parts, axis=-1))

    def rows(self, joined_BTD, context, past: BlockRows, past_length_B) -> BlockRows:
        """What the blocks leave of new positions that come after a past, as blocks do alone."""
        found, hidden, blocks = [], joined_BTD, self.own_blocks
        for i, block in enumerate(blocks):
            if i + 1 == len(blocks):
                found.append(block.keys_values(hidden, context))
            else:
                hidden, new = block(hidden, context, past[i], past_length_B)
                found.append(new)
        return tuple(found)

    def drafted(
        self, joined_BTD: jax.Array, context: Any, chains: Sequence[base.Chain]
    ) -> tuple[jax.Array, BlockRows]:
        """One step of chains, one per block: (states [B, T, D], rows of the blocks)."""
        hidden, found = joined_BTD, []
        for block, chain in zip(self.own_blocks, chains, strict=True):
            hidden, new = block.draft(hidden, context, chain)
            found.append(new)
        return self.deeper(hidden), tuple(found)

    def features(self, states: jax.Array) -> jax.Array:
        return self.norm(states)

    def unrolled(
        self,
        taps: Sequence[jax.Array],
        embedded_BTD: jax.Array,
        context: Any,
        starts_BT: jax.Array,
        steps: int,
    ) -> list[jax.Array]:
        """The states [B, T, D] of each of so many steps, at every position as the step's end.

        Step k at position p belongs to the chain whose first step was at p − k + 1: that began
        with the taps of p − k. Where the document has no such position, the state says nothing.

        Args:
          taps: the tapped states [B, T, D].
          starts_BT: int32, where the document of each position begins in its row.
        """
        index_BT = jnp.broadcast_to(jnp.arange(starts_BT.shape[1])[None], starts_BT.shape)
        inside_BT1 = (index_BT > starts_BT)[:, :, None]

        def after(x_BTD):
            """Each position's is that of the one before; 0 at the beginning of a document."""
            return jnp.where(inside_BT1, _later(x_BTD, 1), 0)

        hidden, first = self.joined(after(self.fused(taps)), embedded_BTD), []
        for block in self.own_blocks:
            hidden, new = block(hidden, context)
            first.append(new)
        states, steps_rows = [self.deeper(hidden)], []
        for step in range(2, steps + 1):
            chains = [
                base.Chain(
                    past=tuple(map(_as_cache, first[i])),
                    first_BT=starts_BT,
                    length_BT=jnp.maximum(index_BT - step + 2, 0),
                    drafted=_stacked([rows[i] for rows in steps_rows], like=first[i]),
                    counts_BTJ=jnp.ones((1, 1, step - 2), bool),
                    learns=True,
                )
                for i in range(len(first))
            ]
            joined = self.joined(after(states[-1]), embedded_BTD)
            state, new = self.drafted(joined, context, chains)
            states.append(state)
            steps_rows.append(new)
        return states

    def deeper(self, hidden: jax.Array) -> jax.Array:
        """What follows the blocks: the feed-forward part, where it is instead of them."""
        return hidden + self.mlp(self.mlp_norm(hidden)) if hasattr(self, "mlp") else hidden


def starts(documents_BT: jax.Array) -> jax.Array:
    """The index in its row at which the document of each position begins, int32 [B, T]."""
    index_T = jnp.arange(documents_BT.shape[1], dtype=jnp.int32)
    begins_BT = jnp.diff(documents_BT, axis=1, prepend=-1) != 0
    return jax.lax.cummax(jnp.where(begins_BT, index_T[None], 0), axis=1)


def _linear(inputs: int, outputs: int, rngs) -> nnx.Linear:
    init = nnx.initializers.normal(0.02)
    return nnx.Linear(inputs, outputs, use_bias=False, kernel_init=init, rngs=rngs)


def _later(x: jax.Array, by: int) -> jax.Array:
    """[B, T, …] moved to later positions; zeros come in."""
    return jnp.pad(x, ((0, 0), (by, 0), *[(0, 0)] * (x.ndim - 2)))[:, : x.shape[1]]


def _as_cache(rows_BTKd: jax.Array) -> jax.Array:
    """New positions' rows as a cache holds them, [B, K, S, d]."""
    more = -rows_BTKd.shape[1] % CACHE_CHUNK
    return jnp.pad(rows_BTKd, ((0, 0), (0, more), (0, 0), (0, 0))).swapaxes(1, 2)


def _stacked(steps_rows: Sequence[base.Rows], like: base.Rows) -> base.Rows:
    """Rows of the steps before [B, T, K, d] → at each position those of its chain [B, T, J, K, d].

    The last step before was one position earlier, the one before that two, and so on.
    """
    count = len(steps_rows)
    return tuple(
        jnp.stack([_later(rows[part], count - j) for j, rows in enumerate(steps_rows)], axis=2)
        if count
        else jnp.zeros((*x.shape[:2], 0, *x.shape[2:]), x.dtype)
        for part, x in enumerate(like)
    )
