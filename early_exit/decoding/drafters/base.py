"""What a drafter is: a source of tokens that the full model has not chosen.

The one idea: a draft is a token at a position whose blocks have not all run, no more. It waits
with the others, the next full pass takes it along, and only the engine says whether it stood. So a
drafter decides how good its tokens are, never what the answer is, and knows nothing of segments,
caches or batches but what it is handed.

How many drafts are handed on is decided once, for all drafters and rows together, for they share a
pass: as many as are worth one so wide (`handed_on`). Whether a drafter is asked at all depends on
what it gained: its `worth`, in tokens of plain decoding.
"""

import abc
import functools
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp

from early_exit.decoding.widths import pad

if TYPE_CHECKING:
    from early_exit.decoding.engine import Engine
    from early_exit.decoding.mode import Mode
    from early_exit.decoding.state import DecodeState
    from early_exit.exits.multi_exit import MultiExit

# A drafter is asked while its `worth`, a running mean of what asking it gained, is not negative.
MEMORY = 32  # times asked over which the mean runs
INSURANCE = 0.005  # per token, back to one that is not asked: what trying again may cost
# Passes over which a row's rate of tokens is averaged.
_RATE_MEMORY = 16


class Proposed(NamedTuple):
    """What drafters have proposed before a pass; K is a mode's capacity − 1.

    Attributes:
      reach_BK: float32, how likely each draft behind the newest token stands, with all before it; 0
        where there is none.
      cost: float32 scalar, what it took to make them, in passes.
    """

    reach_BK: jax.Array
    cost: jax.Array

    @classmethod
    def nothing(cls, batch: int, most: int) -> "Proposed":
        return cls(jnp.zeros((batch, most)), jnp.float32(0))


class Drafter(abc.ABC):
    """One source of drafts.

    Attributes:
      name: what `Mode.drafters` calls it.
      place: 0 for the exits; of each other drafter a number of its own, from 1 on. It marks the
        drafts in `DecodeState.exit_BS`: exits by their index 0 … E − 1, the full model by E, other
        drafters by E + `place`.
      credit: its worth at the start; times MEMORY, what an answer may lose to a drafter that gives
        it nothing.
    """

    name: str
    place: int
    credit: float

    def serves(self, model: "MultiExit", mode: "Mode") -> bool:
        """Whether the model has what it needs, and the mode can use it."""
        return True

    def taps(self, model: "MultiExit") -> tuple[int, ...]:
        """Blocks (1-based) whose output it reads. The engine keeps them in `DecodeState.taps`."""
        return ()

    def drafts_ahead(self, engine: "Engine") -> bool:
        """Whether it may propose tokens before a pass: several meet the first segment at once."""
        return type(self).propose is not Drafter.propose

    def start(self, model: "MultiExit", batch: int, slots: int, dtype) -> Any:
        """What it keeps for each row, a pytree of [B, …]; it lies in `DecodeState.kept`.

        No array twice: they are donated from call to call.
        """
        return ()

    def read(
        self,
        engine: "Engine",
        kept: Any,
        before: dict[str, jax.Array],
        tokens_BT: jax.Array,
        positions_BT: jax.Array,
    ) -> Any:
        """What it keeps after some positions of the prompts have passed all blocks.

        Args:
          before: by tap, its output at the positions before these; 0 before the first. Where a
            prompt is shorter than others, what stands here means nothing.
        """
        return kept

    def begun(self, kept: Any, known: Any) -> Any:
        """What it keeps of unread prompts whose first positions are known from others.

        Args:
          kept: as at the start.
          known: what it kept of those others when they had been read, further positions included.
        """
        return kept

    def propose(
        self, engine: "Engine", state: "DecodeState", proposed: Proposed
    ) -> tuple["DecodeState", Proposed]:
        """Before a pass: appends drafts to rows where nothing waits (`free`), by `drafted`.

        Args:
          proposed: what drafters before this one have, which is returned with its own added.
        """
        return state, proposed

    def after_segment(
        self, engine: "Engine", state: "DecodeState", segment: int, active_B: jax.Array, before_BWD
    ) -> "DecodeState":
        """After a segment but the last: gives rows their next token, by `Engine.append`.

        Args:
          active_B: bool, rows whose newest position has just passed the segment.
          before_BWD: the hidden states of the positions under way before it did.
        """
        return state

    def settle(
        self,
        engine: "Engine",
        state: "DecodeState",
        rows_B: jax.Array,
        drafted_B: jax.Array,
        accepted_B: jax.Array,
    ) -> "DecodeState":
        """After a check: told how many drafts stood, of how many, in the rows that were checked.

        The row's newest token is the full model's then, and `taps` are exact up to the position
        before it.
        """
        return state


def rivals(engine: "Engine", state: "DecodeState", drafter: Drafter) -> jax.Array:
    """float32 [B], what the best of the drafters that are asked after this one has been worth.

    At least 0, which is what it is worth to draft nothing.
    """
    later = engine.drafters[engine.drafters.index(drafter) + 1 :]
    worths = [state.worth_BN[:, engine.final + other.place] for other in later]
    return functools.reduce(jnp.maximum, worths, jnp.zeros(len(state.newest_B)))


def free(state: "DecodeState") -> jax.Array:
    """bool [B], rows that go on and where nothing waits but the newest token, the full model's."""
    return ~state.finished_B & (state.chosen_B == state.newest_B)


def draftable(
    engine: "Engine", state: "DecodeState", drafts_BT: jax.Array, skipped: jax.Array | int = 0
) -> jax.Array:
    """bool [B, T], which of the tokens may be drafted behind the newest one.

    None that ends the row: its last token is left to the full model, so that none is unchecked.

    Args:
      skipped: how many drafts stand between the newest token and these.
    """
    stops = engine.rules.stops(drafts_BT)
    positions = state.newest_B[:, None] + 1 + skipped + jnp.arange(drafts_BT.shape[1])[None]
    return (jnp.cumsum(stops, axis=1) == 0) & (positions + 1 < state.limit_B[:, None])


def drafted(
    engine: "Engine",
    state: "DecodeState",
    proposed: Proposed,
    drafter: Drafter,
    drafts_BT: jax.Array,
    reach_BT: jax.Array,
    log_probs_BT: jax.Array | None = None,
) -> tuple["DecodeState", Proposed]:
    """The state with drafts behind the newest token of rows that are `free`; all that is proposed.

    Args:
      drafts_BT: int32, T below `Mode.pending`.
      reach_BT: float32, how likely each stands, with all before it; 0 from the first on that is
        none, or is beyond `draftable`.
      log_probs_BT: float32, of drafts that may stand unchecked.
    """
    usable_BT = reach_BT > 0
    rows = jnp.arange(len(drafts_BT))[:, None]
    positions = state.newest_B[:, None] + 1 + jnp.arange(drafts_BT.shape[1])[None]
    at = jnp.where(usable_BT, positions, state.tokens_BS.shape[1])
    mark = engine.final + drafter.place
    if log_probs_BT is not None:
        log_probs = state.log_prob_BS.at[rows, at].set(log_probs_BT, mode="drop")
        state = state.change(log_prob_BS=log_probs)
    state = state.change(
        tokens_BS=state.tokens_BS.at[rows, at].set(drafts_BT, mode="drop"),
        exit_BS=state.exit_BS.at[rows, at].set(mark, mode="drop"),
        newest_B=state.newest_B + usable_BT.sum(axis=1),
    )
    reach_BK = jnp.maximum(proposed.reach_BK, pad(reach_BT, proposed.reach_BK.shape[1]))
    return state, proposed._replace(reach_BK=reach_BK)


def handed_on(engine: "Engine", state: "DecodeState", proposed: Proposed) -> "DecodeState":
    """The state with only those of the new drafts that are worth a pass so wide, for all rows.

    What a pass gains are the tokens of all rows; what it costs is worth as many tokens as have been
    had for that lately (Dinkelbach 1967: so the rate itself becomes the best there is).
    """
    costs, widths = engine.costs, jnp.array(engine.mode.widths)
    within_NK = jnp.arange(proposed.reach_BK.shape[1])[None] < widths[:, None] - 1
    gained_NB = 1 + (proposed.reach_BK[None] * within_NK[:, None]).sum(-1)
    gained_NB = jnp.where(state.finished_B[None], 0, gained_NB)
    paid_N = costs.passes_N + proposed.cost
    best = jnp.argmax(gained_NB.sum(-1) - rate(state) * paid_N)
    rate_B = state.rate_B + (gained_NB[best] / paid_N[best] - state.rate_B) / _RATE_MEMORY
    proposed_B = (proposed.reach_BK > 0).sum(axis=1)
    dropped_B = jnp.maximum(proposed_B - (widths[best] - 1), 0)
    return state.change(newest_B=state.newest_B - dropped_B, rate_B=rate_B)


def rate(state: "DecodeState") -> jax.Array:
    """float32 scalar, tokens of all rows for what a pass of one position in each costs."""
    return jnp.where(state.finished_B, 0, state.rate_B).sum()


def worthwhile(state: "DecodeState", mark: int) -> jax.Array:
    """bool scalar, whether a source of drafts is to be asked: on an average of rows that go on.

    One row's draft makes the pass wider for all, so all learn from it.
    """
    return jnp.where(state.finished_B, 0, state.worth_BN[:, mark]).sum() >= 0


def accepted(drafts_BW: jax.Array, chosen_BW: jax.Array, drafted_B: jax.Array) -> jax.Array:
    """How many drafts stand, int32 [B]: those before the first that the full model did not choose.

    The full model's token at a position is drawn with that position's own key, whether or not there
    was a draft; a draft stands if it equals that token. So verified decoding gives, draw for draw,
    what plain decoding gives. (For a draft x this accepts with the probability p(x) that
    speculative sampling prescribes for a certain draft, q(x) = 1: Leviathan et al. 2023, §2.3.)

    Args:
      drafts_BW: the drafted tokens, of which the first `drafted_B` count.
      chosen_BW: what the full model chose in the same places.
    """
    stands = (drafts_BW == chosen_BW) & (jnp.arange(drafts_BW.shape[1])[None] < drafted_B[:, None])
    return jnp.cumprod(stands.astype(jnp.int32), axis=1).sum(axis=1)


def tried(drafted_B: jax.Array, accepted_B: jax.Array) -> jax.Array:
    """Of how many drafts it is known whether they stand: up to the first that did not."""
    return accepted_B + (accepted_B < drafted_B)


def asked(worth_B: jax.Array, rows_B: jax.Array, price: float) -> jax.Array:
    """A source's worth after it was asked, at some price, in the given rows."""
    return jnp.where(rows_B, worth_B - (worth_B + price) / MEMORY, worth_B)


def passed_over(worth_B: jax.Array, rows_B: jax.Array) -> jax.Array:
    """A source's worth after it was not asked in the given rows: so that it comes back."""
    return jnp.where(rows_B, worth_B + INSURANCE / MEMORY, worth_B)


def settled(
    worth_BN: jax.Array,
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
      gains, losses: [N], what a draft of each source gains or costs.
    """
    is_source = source_BW[:, :, None] == jnp.arange(worth_BN.shape[1])[None, None]
    outcome = kept_BW[:, :, None] * gains[None, None] - dropped_BW[:, :, None] * losses[None, None]
    return worth_BN + jnp.where(is_source, outcome, 0).sum(axis=1) / MEMORY


def booked(
    engine: "Engine",
    state: "DecodeState",
    first_B: jax.Array,
    drafted_B: jax.Array,
    accepted_B: jax.Array,
    narrowest: jax.Array,
) -> "DecodeState":
    """Books which drafts stood, and what that says about where they came from.

    Args:
      narrowest: int32, which of the mode's widths the pass had.
    """
    place = jnp.arange(engine.mode.pending)[None]
    kept = place < accepted_B[:, None]
    dropped = ~kept & (place < drafted_B[:, None])
    at = engine.positions(first_B + 1, state, engine.mode.pending)
    source = jnp.take_along_axis(state.exit_BS, at, axis=1)
    # In tokens of plain decoding, where a pass gives each of the B rows one: what each draft
    # adds to this pass, as wide as it is for all rows.
    wider = engine.costs.passes_N[narrowest] - 1
    further = wider * len(drafted_B) / jnp.maximum(drafted_B.sum(), 1)
    # A draft of an exit has had a pass as deep as that; one made before the pass, none. What it
    # saves is known of a pass two positions wide.
    second = engine.costs.passes_N[1] - 1
    behind_E = 1 - jnp.array(engine.depth_shares[: engine.final])
    others = jnp.ones(state.worth_BN.shape[1] - engine.final)
    saved = jnp.append(engine.saved_E, (1 - second) * others)
    more = jnp.append(behind_E, others) * (further - second)
    worth_BN = settled(
        state.worth_BN,
        source,
        kept,
        dropped,
        gains=saved - more,
        losses=1 - saved + more,
    )
    return state.change(worth_BN=worth_BN).count(
        drafted_BW=(kept | dropped).astype(jnp.int32), accepted_BW=kept.astype(jnp.int32)
    )
