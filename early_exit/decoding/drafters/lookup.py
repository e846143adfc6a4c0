"""Prompt lookup: text that occurred before goes on as it did (Saxena 2023).

The one idea: the newest tokens are looked for in the row's own text, and what followed them there
is proposed. No weight is read for it.
"""

import jax
import jax.numpy as jnp

from early_exit.decoding.drafters import base

# Tokens compared: the longest match wins, and at least this many must match.
LONGEST_MATCH, SHORTEST_MATCH = 8, 2


class Lookup(base.Drafter):
    """Proposes what followed the longest earlier match of a row's newest tokens."""

    name, place = "lookup", 1
    credit = 0.1  # a wrong draft costs no pass of its own, and right ones are rare

    def drafts_ahead(self, engine):
        return True

    def propose(self, engine, state):
        mark = engine.final + self.place
        worth_B, free_B = state.worth_BN[:, mark], base.free(state)
        worthwhile_B = free_B & (worth_B >= 0)
        drafts, found_B = look_up(state.tokens_BS, state.newest_B, engine.mode.pending - 1)
        usable = (worthwhile_B & found_B)[:, None] & base.draftable(engine, state, drafts)
        worth_B = base.asked(worth_B, usable.any(axis=1), 0.0)
        worth_B = base.passed_over(worth_B, free_B & ~worthwhile_B)
        state = state.change(worth_BN=state.worth_BN.at[:, mark].set(worth_B))
        return base.drafted(engine, state, drafts, usable, self)


def look_up(tokens_BS: jax.Array, newest_B: jax.Array, count: int) -> tuple[jax.Array, jax.Array]:
    """What followed the longest earlier occurrence of the newest tokens (the latest of several).

    Where less text follows than asked for, it is taken to go on periodically.

    Returns:
      (int32 [B, count], bool [B] whether there is an earlier occurrence at all).
    """
    slots = tokens_BS.shape[1]
    index = jnp.arange(slots)[None]
    earlier = index < newest_B[:, None]
    matching = earlier
    length = jnp.zeros_like(tokens_BS)
    for back in range(LONGEST_MATCH):
        wanted = jnp.take_along_axis(tokens_BS, jnp.maximum(newest_B - back, 0)[:, None], axis=1)
        here = jnp.roll(tokens_BS, back, axis=1)
        matching &= (here == wanted) & (index >= back)
        length += matching
    best = jnp.argmax(length * slots + index * (length > 0), axis=1)
    found = jnp.take_along_axis(length, best[:, None], axis=1)[:, 0] >= SHORTEST_MATCH
    period = jnp.maximum(newest_B - best, 1)
    offsets = jnp.arange(count)[None] % period[:, None]
    at = jnp.minimum(best[:, None] + 1 + offsets, slots - 1)
    return jnp.take_along_axis(tokens_BS, at, axis=1), found
