"""Exits: what the heads on the way say of the newest position, where the policy lets it leave.

The one idea: an exit's token comes out of the pass that is made anyway. Where early tokens stand,
that is dynamic depth; where the full model checks them, it is a draft of one token at a time.
"""

import jax
import jax.numpy as jnp

from early_exit import confidence as confidences
from early_exit import consult
from early_exit import policy as policies
from early_exit.backbones.base import logits
from early_exit.decoding.drafters import base

# How likely another row is taken to leave where one does.
_ANOTHER = 0.5


class Exits(base.Drafter):
    """Asks the exit behind each segment about the newest position; some rows leave there."""

    name, place = "exits", 0
    credit = 0.02  # an exit shows soon what it is worth

    def serves(self, model, mode):
        return bool(model.exits.points)

    def after_segment(self, engine, state, segment, active_B, before_BWD):
        if engine.policy is None:
            return state
        e, policy, head = segment, engine.policy, engine.bound.heads[segment]
        at_newest = state.newest_B[:, None]
        hidden_B1D = engine.gather(state.hidden_BWD, state, at_newest)
        _, context = engine.stem(state, at_newest)
        past = state.cache.get(f"exit/{engine.model.exits.points[e]}")
        progress_B = state.progress_B

        must_B = policy.overdrawn(state.account_B, engine.model.exit_depths[e + 1])
        wanted_B = active_B & (policy.consults(e) | must_B) & _may_leave(engine, state)
        if engine.mode.verified:
            wanted_B = _all_or_none(wanted_B, active_B)
            state, wanted_B = _worthwhile(engine, state, e, wanted_B)
        by_hidden = policy.confidence in confidences.FROM_HIDDEN
        if by_hidden:
            before_B1D = engine.gather(before_BWD, state, at_newest)
            score_B1 = consult.hidden_score(
                policy.confidence, engine.bound, e, before_B1D, hidden_B1D
            )
            wanted_B &= policy.leaves(e, score_B1[:, 0], progress_B) | must_B

        def evaluate(state):
            features, _ = head.features(hidden_B1D, context, past, state.newest_B)
            logits_BC = logits(
                features[:, 0], engine.tables[e], rule=engine.model.config.logit_rule
            )
            has_rest = engine.bound.token_ids is not None
            summary, said = consult.hear(logits_BC, state.said, e, policy, has_rest=has_rest)
            leaving_B = wanted_B
            if not by_hidden:
                score_B = consult.score(policy.confidence, summary, said)
                leaving_B &= policy.leaves(e, score_B, progress_B) | must_B
            token_B, log_prob_B = engine.draw(state, logits_BC[:, None], at_newest, True)
            return leaving_B, token_B[:, 0], log_prob_B[:, 0], said

        def skip(state):
            zeros = jnp.zeros_like(state.newest_B)
            return jnp.zeros_like(wanted_B), zeros, zeros.astype(jnp.float32), state.said

        leaving_B, token_B, log_prob_B, said = jax.lax.cond(wanted_B.any(), evaluate, skip, state)
        if engine.mode.verified:
            leaving_B = _all_or_none(leaving_B & ~engine.rules.stops(token_B), active_B)
        state = state.change(said=said.where(wanted_B, state.said)).count(
            evaluations_BE=engine.column(e, wanted_B.astype(jnp.int32)),
            head_passes_BE=engine.column(e, wanted_B / jnp.maximum(wanted_B.sum(), 1)),
        )
        return engine.append(
            state,
            leaving_B,
            first_B=state.newest_B,
            accepted_B=jnp.zeros_like(state.newest_B),
            tokens_BT=token_B[:, None],
            log_probs_BT=log_prob_B[:, None],
            exit_index=e,
        )


def _all_or_none(leaving_B: jax.Array, active_B: jax.Array) -> jax.Array:
    """The rows that leave, if all do: a pass for the others gives each row the full model's token,
    so that a draft would only make the next one wider."""
    return leaving_B & (leaving_B | ~active_B).all()


def _may_leave(engine, state) -> jax.Array:
    """bool [B], rows where the newest position need not go all the way."""
    may_B = jnp.ones_like(state.finished_B)
    if not engine.mode.propagates:
        # The next position must still fit in beside those that wait (in a row that is alone: it
        # gets the same answer in any batch).
        may_B &= state.newest_B + 2 - state.chosen_B <= engine.mode.pending
    if engine.mode.verified:
        # The last token is the full model's, so that none is left unchecked when a row ends.
        may_B &= state.newest_B + 2 < state.limit_B
    return may_B


def _worthwhile(engine, state, e: int, wanted_B: jax.Array):
    """(state, those of the wanted rows where asking this exit has paid lately, and can pay)."""
    price = engine.head_shares[e] * engine.costs.heads
    # Each row has a token by this step anyway. If all leave here, the pass through deeper segments
    # is saved, but for the next one's being wider; if some go on, nothing is.
    at_best = engine.saved_E[e]
    always = (engine.policy.thresholds[e] == policies.ALWAYS).all()
    another = jnp.where(always, 1.0, _ANOTHER)
    at_best *= another ** jnp.maximum(wanted_B.sum() - 1, 0)
    # Where a row has a token early, nothing is drafted before its next pass; and such passes have
    # given more than one token for what one costs.
    going_on = jnp.maximum((~state.finished_B).sum(), 1)
    forgone = 1 - 1 / jnp.maximum(base.rate(state) / going_on, 1)
    refused_B = wanted_B & ~(base.worthwhile(state, e) & (at_best > price + forgone))
    wanted_B &= ~refused_B
    worth_B = base.asked(state.worth_BN[:, e], wanted_B, price)
    worth_B = base.passed_over(worth_B, refused_B)
    return state.change(worth_BN=state.worth_BN.at[:, e].set(worth_B)), wanted_B
