"""Passes just as wide as what waits for them: one compiled branch for each of a few widths."""

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
