"""The key/value cache: one pair of arrays per block, written once per step, outside any branch.

    {"block/0": (key, value), …, "exit/12": (key, value)}      each [B, K, S, d]

Blocks inside heads (`layer` heads) cache too, under the exit's name. What a block leaves of a
position is its own to say (`BackboneConfig.cached_rows`). S is a bucket: a multiple of the chunk
in which attention reads, so that few programs are compiled.
"""

import jax
import jax.numpy as jnp

from early_exit import sharding
from early_exit.backbones import base
from early_exit.backbones.cached_attention import CACHE_CHUNK

Cache = dict[str, base.Rows]


def empty(
    config: base.BackboneConfig, block_head_points: tuple[int, ...], batch: int, slots: int, dtype
) -> Cache:
    """A cache of zeros for the backbone's blocks, and for those of heads after some exit points."""
    rows = {f"block/{i}": config.cached_rows(i) for i in range(config.depth)}
    # A head's block is like the last one.
    rows |= {f"exit/{point}": config.cached_rows(config.depth - 1) for point in block_head_points}
    return {
        name: tuple(jnp.zeros((batch, heads, slots, size), dtype) for heads, size in shapes)
        for name, shapes in rows.items()
    }


def write(cache: Cache, rows: Cache, start_B: jax.Array) -> Cache:
    """The cache with new rows [B, T, K, d] stored from slot `start_B` of each batch row on.

    Blocks of which there are no new rows stay as they are.
    """

    def store(slots_BKSd, rows_BTKd):
        rows_BKTd = sharding.as_cached(rows_BTKd.swapaxes(1, 2).astype(slots_BKSd.dtype))
        if slots_BKSd.shape[0] == 1:  # one slice update in place instead of a scatter
            return jax.lax.dynamic_update_slice(slots_BKSd, rows_BKTd, (0, 0, start_B[0], 0))
        return jax.vmap(
            lambda slots, new, start: jax.lax.dynamic_update_slice(slots, new, (0, start, 0))
        )(slots_BKSd, rows_BKTd, start_B)

    return cache | {
        name: tuple(store(slots, new) for slots, new in zip(cache[name], new_rows, strict=True))
        for name, new_rows in rows.items()
    }


def bucket(positions: int) -> int:
    """Slots to allocate for so many positions: powers of two from 2·CACHE_CHUNK up."""
    slots = 2 * CACHE_CHUNK
    while slots < positions:
        slots *= 2
    return slots
