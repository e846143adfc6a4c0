"""Prompt lookup: text that occurred before goes on as it did (Saxena 2023).

The one idea: the newest tokens are looked for in the row's own text, and what followed them there
is proposed. No weight is read for it. The longer the match, the more of it stands; how much is
learned row by row, so that where other drafters promise more, it is their turn.
"""

import jax
import jax.numpy as jnp

from early_exit.decoding.drafters import base

# Tokens compared: the longest match wins, and at least this many must match.
LONGEST_MATCH, SHORTEST_MATCH = 8, 2
# How many of seven drafts stand after matches of 0 to 8 tokens, before a row knows better: as
# counted in answers of SmolLM2-135M to maths problems and to programming tasks.
_STAND = (0.0, 0.0, 1.4, 1.7, 1.9, 2.1, 2.4, 2.5, 3.0)
_MEMORY = 8  # drafts over which a row's own experience is averaged


class Lookup(base.Drafter):
    """Proposes what followed the longest earlier match of a row's newest tokens."""

    name, place = "lookup", 1
    credit = 0.1  # a wrong draft costs no pass of its own, and right ones are rare

    def start(self, model, batch, slots, dtype):
        """How many drafts stand by length of match; the length that was last drafted by, or 0."""
        stand = jnp.tile(jnp.array(_STAND, jnp.float32), (batch, 1))
        return {"stand_BL": stand, "length_B": jnp.zeros(batch, jnp.int32)}

    def propose(self, engine, state):
        kept, mark = state.kept[self.name], engine.final + self.place
        worth_B, free_B = state.worth_BN[:, mark], base.free(state)
        drafts, length_B = look_up(state.tokens_BS, state.newest_B, engine.mode.pending - 1)
        found_B = length_B >= SHORTEST_MATCH
        stand_B = jnp.take_along_axis(kept["stand_BL"], length_B[:, None], axis=1)[:, 0]
        # In tokens of plain decoding: what stands, less what so wide a pass costs.
        better_B = stand_B - (engine.costs.passes_N[-1] - 1) >= base.rivals(engine, state, self)
        worthwhile_B = free_B & (worth_B >= 0)
        usable = (worthwhile_B & found_B & better_B)[:, None]
        usable &= base.draftable(engine, state, drafts)
        asked_B = usable.any(axis=1)
        worth_B = base.asked(worth_B, asked_B, 0.0)
        worth_B = base.passed_over(worth_B, free_B & ~worthwhile_B)
        kept = kept | {"length_B": jnp.where(asked_B, length_B, 0)}
        state = state.change(
            worth_BN=state.worth_BN.at[:, mark].set(worth_B),
            kept=state.kept | {self.name: kept},
        )
        return base.drafted(engine, state, drafts, usable, self)

    def settle(self, engine, state, rows_B, accepted_B):
        """Learns how many drafts stood."""
        kept = state.kept[self.name]
        told_B = rows_B & (kept["length_B"] > 0)
        is_length = jax.nn.one_hot(kept["length_B"], LONGEST_MATCH + 1)
        more = (accepted_B[:, None] - kept["stand_BL"]) * is_length / _MEMORY
        kept = {
            "stand_BL": kept["stand_BL"] + jnp.where(told_B[:, None], more, 0),
            "length_B": jnp.where(rows_B, 0, kept["length_B"]),
        }
        return state.change(kept=state.kept | {self.name: kept})


def look_up(tokens_BS: jax.Array, newest_B: jax.Array, count: int) -> tuple[jax.Array, jax.Array]:
    """What followed the longest earlier occurrence of the newest tokens (the latest of several).

    Where less text follows than asked for, it is taken to go on periodically.

    Returns:
      (int32 [B, count], int32 [B] how many tokens match, `LONGEST_MATCH` at most).
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
    matched_B = jnp.take_along_axis(length, best[:, None], axis=1)[:, 0]
    period = jnp.maximum(newest_B - best, 1)
    offsets = jnp.arange(count)[None] % period[:, None]
    at = jnp.minimum(best[:, None] + 1 + offsets, slots - 1)
    return jnp.take_along_axis(tokens_BS, at, axis=1), matched_B
