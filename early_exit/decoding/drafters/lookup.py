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
# How often a draft stands, if all before it do, after matches of 0 to 8 tokens, before a row knows
# better: as counted in answers of SmolLM2-135M to maths problems and to programming tasks.
_STANDS = (0.0, 0.0, 0.59, 0.64, 0.67, 0.695, 0.73, 0.74, 0.785)
_MEMORY = 32  # drafts over which a row's own experience is averaged
_FORGETTING = 1 / 256  # a step, back to what was known before


class Lookup(base.Drafter):
    """Proposes what followed the longest earlier match of a row's newest tokens."""

    name, place = "lookup", 1
    credit = 0.0

    def start(self, model, batch, slots, dtype):
        """How often drafts stand by length of match; the length that was last drafted by, or 0."""
        stands = jnp.tile(jnp.array(_STANDS, jnp.float32), (batch, 1))
        return {"stands_BL": stands, "length_B": jnp.zeros(batch, jnp.int32)}

    def propose(self, engine, state, proposed):
        kept, most = state.kept[self.name], engine.mode.pending - 1
        drafts, length_B = look_up(state.tokens_BS, state.newest_B, most)
        stands_B = jnp.take_along_axis(kept["stands_BL"], length_B[:, None], axis=1)
        reach_BK = stands_B ** (1 + jnp.arange(most, dtype=jnp.float32))[None]
        # In tokens of plain decoding, what it would gain were all rows like this one.
        within_NK = jnp.arange(most)[None] < jnp.array(engine.mode.widths)[:, None] - 1
        gained_BN = (reach_BK[:, None] * within_NK[None]).sum(-1) - (engine.costs.passes_N - 1)[
            None
        ]
        usable_B = base.free(state) & (length_B >= SHORTEST_MATCH)
        usable_B &= gained_BN.max(axis=1) >= base.rivals(engine, state, self)
        usable_BK = usable_B[:, None] & base.draftable(engine, state, drafts)
        known = jnp.array([_STANDS], jnp.float32)
        kept = {
            "stands_BL": (1 - _FORGETTING) * kept["stands_BL"] + _FORGETTING * known,
            "length_B": jnp.where(usable_BK.any(axis=1), length_B, 0),
        }
        state = state.change(kept=state.kept | {self.name: kept})
        reach_BK = jnp.where(usable_BK, reach_BK, 0)
        return base.drafted(engine, state, proposed, self, drafts, reach_BK)

    def settle(self, engine, state, rows_B, drafted_B, accepted_B):
        """Learns how many of the drafts that were tried stood."""
        kept = state.kept[self.name]
        told_B = rows_B & (kept["length_B"] > 0)
        is_length = jax.nn.one_hot(kept["length_B"], LONGEST_MATCH + 1)
        tried_B = base.tried(drafted_B, accepted_B)
        more = (accepted_B[:, None] - tried_B[:, None] * kept["stands_BL"]) * is_length / _MEMORY
        kept = {
            "stands_BL": kept["stands_BL"] + jnp.where(told_B[:, None], more, 0),
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
