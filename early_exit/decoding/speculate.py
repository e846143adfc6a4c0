"""Drafts: where they come from, which of them stand, and whether they are worth their cost.

The one idea: the full model's token at a position is drawn with that position's own key, whether
or not there was a draft. A draft stands if it equals that token. So verified decoding gives, draw
for draw, what plain decoding gives, greedy or sampled; how good the drafts are decides the speed
alone. (For a draft x this accepts with the probability p(x) that speculative sampling prescribes
for a certain draft, q(x) = 1: Leviathan et al. 2023, §2.3.)
"""

import jax
import jax.numpy as jnp

# An exit is consulted while its `worth`, a running mean of what a consultation gained, is not
# negative. All in units of one token of plain decoding.
# Where it starts: times MEMORY, what an answer may lose to a source that gives it nothing. An exit
# shows soon what it is worth, while a lookup is dear and rare.
EXIT_CREDIT, LOOKUP_CREDIT = 0.02, 0.1
MEMORY = 32  # consultations over which the mean runs
INSURANCE = 0.005  # per token, back to an exit that is not consulted: what trying again may cost

# Tokens compared by a lookup: the longest match wins, and at least this many must match.
LONGEST_MATCH, SHORTEST_MATCH = 8, 2


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


def accepted(drafts_BW: jax.Array, chosen_BW: jax.Array, drafted_B: jax.Array) -> jax.Array:
    """How many drafts stand, int32 [B]: those before the first that the full model did not choose.

    Args:
      drafts_BW: the drafted tokens, of which the first `drafted_B` count.
      chosen_BW: what the full model chose in the same places.
    """
    stands = (drafts_BW == chosen_BW) & (jnp.arange(drafts_BW.shape[1])[None] < drafted_B[:, None])
    return jnp.cumprod(stands.astype(jnp.int32), axis=1).sum(axis=1)


def consulted(worth: jax.Array, rows_B: jax.Array, price: float) -> jax.Array:
    """A source's worth [B] after it was consulted, at some price, in the given rows."""
    return jnp.where(rows_B, worth - (worth + price) / MEMORY, worth)


def refused(worth: jax.Array, rows_B: jax.Array) -> jax.Array:
    """A source's worth [B] after it was not consulted in the given rows: so that it comes back."""
    return jnp.where(rows_B, worth + INSURANCE / MEMORY, worth)


def settled(
    worth_BE: jax.Array,
    source_BW: jax.Array,
    kept_BW: jax.Array,
    dropped_BW: jax.Array,
    gains: jax.Array,
    losses: jax.Array,
) -> jax.Array:
    """Every source's worth after the full model has checked its drafts.

    Args:
      source_BW: which source each draft came from.
      kept_BW, dropped_BW: bool, drafts that stand and drafts that do not.
      gains, losses: [E + 1], what a draft of each source gains or costs.
    """
    is_source = source_BW[:, :, None] == jnp.arange(worth_BE.shape[1])[None, None]
    outcome = kept_BW[:, :, None] * gains[None, None] - dropped_BW[:, :, None] * losses[None, None]
    return worth_BE + jnp.where(is_source, outcome, 0).sum(axis=1) / MEMORY
