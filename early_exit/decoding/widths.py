"""Passes just as wide as what waits for them: one compiled branch for each of a few widths; and
where what they yield is put.
"""

import jax
import jax.numpy as jnp


def in_width(widths: tuple[int, ...], waiting_B: jax.Array, skip, run, state):
    """(result of a pass just wide enough for the positions that wait, index of that width).

    Args:
      skip: what is done with the state where no row waits.
      run: width → what is done in a pass that wide; one compiled branch each.
    """
    most = waiting_B.max()
    narrowest = jnp.searchsorted(jnp.array(widths), most)
    branch = jnp.where(most > 0, 1 + narrowest, 0)
    return jax.lax.switch(branch, [skip, *map(run, widths)], state), narrowest


def pad(x: jax.Array, length: int) -> jax.Array:
    """[B, T, …] → [B, length, …], zeros behind."""
    return jnp.pad(x, ((0, 0), (0, length - x.shape[1]), *[(0, 0)] * (x.ndim - 2)))


def placed(
    kept: jax.Array, new: jax.Array, first_B: jax.Array, counts_BT: jax.Array, *, ring: bool = False
) -> jax.Array:
    """[B, S, …] with those of [B, T, …] that count at the places from `first_B` on.

    Every place looks for what belongs to it. A scatter would go from index to index, which on CPUs
    takes longer than a small pass.

    Args:
      ring: whether place p lies at p mod S.
    """
    offset_BS = jnp.arange(kept.shape[1])[None] - first_B[:, None]
    offset_BS = offset_BS % kept.shape[1] if ring else offset_BS
    inside_BS = (offset_BS >= 0) & (offset_BS < new.shape[1])
    at_BS = offset_BS.clip(0, new.shape[1] - 1)
    inside_BS &= jnp.take_along_axis(counts_BT, at_BS, axis=1)
    inner = (...,) + (None,) * (kept.ndim - 2)
    return jnp.where(inside_BS[inner], jnp.take_along_axis(new, at_BS[inner], axis=1), kept)
