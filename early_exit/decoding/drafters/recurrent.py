"""Recurrent exits as drafters: token after token, from the deep states that the last pass left.

The one idea: where a row's last pass ended, the exact deep states of the position before its newest
token are at hand. From these a chain of cheap steps goes on (`exits.recurrent`), as long as what it
may still gain is worth a step. What the head's own blocks have left of exact positions is kept;
what drafts left of themselves is forgotten with the chain.

How likely a draft stands was calibrated on other text. Each row learns what that is worth on its
own: `trust`, a factor.
"""

from typing import TYPE_CHECKING, NamedTuple

import jax
import jax.numpy as jnp

from early_exit import confidence as confidences
from early_exit import consult
from early_exit.backbones import base as networks
from early_exit.decoding import cache as caches
from early_exit.decoding.drafters import base
from early_exit.decoding.widths import in_width, pad

if TYPE_CHECKING:
    from early_exit.decoding.state import DecodeState

# How likely a further draft is taken to stand before it is made, if all before it do.
_NEXT = 0.7
_MEMORY = 8  # drafts over which a row's trust is averaged
_FORGETTING = 1 / 256  # a step, back to full trust


class _Chain(NamedTuple):
    """Chains of all rows after some steps; K at most.

    Attributes:
      steps: how many.
      before_B1D: the states that the next step begins with.
      token_B: the newest token of each.
      rows: what each block left of the drafts, by block, [B, 1, K, …].
      drafts_BK, log_probs_BK: tokens, and how likely the head held them.
      reach_BK: how likely each draft stands, with all before it; 0 where there is none.
      going_B: whether a row's chain goes on.
    """

    steps: jax.Array
    before_B1D: jax.Array
    token_B: jax.Array
    rows: tuple[networks.Rows, ...]
    drafts_BK: jax.Array
    log_probs_BK: jax.Array
    reach_BK: jax.Array
    going_B: jax.Array


class Recurrent(base.Drafter):
    """Proposes what the recurrent exit says, token after token."""

    name, place = "recurrent", 2
    credit = 0.1

    def serves(self, model, mode):
        return bool(model.exits.recurrent_taps) and not mode.propagates

    def taps(self, model):
        return model.exits.recurrent_taps

    def drafts_ahead(self, engine):
        fitted = engine.policy is not None and engine.policy.drafts is not None
        return engine.mode.verified or fitted

    def start(self, model, batch, slots, dtype):
        """The exact rows of its blocks, and of how many positions; each row's trust, and how likely
        the drafts of its chain are held to stand, in the mean (0 without a chain)."""
        rows = model.config.cached_rows(model.config.depth - 1)
        names = map(str, range(model.exits.recurrent_blocks))
        return {
            "rows": {
                name: tuple(jnp.zeros((batch, k, slots, d), dtype) for k, d in rows)
                for name in names
            },
            "known_B": jnp.zeros(batch, jnp.int32),
            "trust_B": jnp.ones(batch, jnp.float32),
            "promised_B": jnp.zeros(batch, jnp.float32),
        }

    def read(self, engine, kept, before, tokens_BT, positions_BT):
        def rows():
            return self._rows(engine, kept, before, tokens_BT, positions_BT)

        # Always true. Outside a branch, XLA would copy the rows that blocks read (see `decode`).
        nothing = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), jax.eval_shape(rows))
        new = jax.lax.cond(positions_BT.min() >= 0, rows, lambda: nothing)
        start_B = positions_BT[:, 0]
        return kept | {"rows": caches.write(kept["rows"], new, start_B)}

    def begun(self, kept, known):
        return kept | {"rows": known["rows"]}

    def settle(self, engine, state, rows_B, drafted_B, accepted_B):
        """Takes in the positions that have become exact, the newest token's own among them."""
        kept = state.kept[self.name]
        # After the prompt's pass, `read` has had it.
        known_B = jnp.maximum(kept["known_B"], state.prompt_B)
        widths, waiting_B = engine.mode.widths, jnp.where(rows_B, state.newest_B + 1 - known_B, 0)

        def rows(width):
            def branch(state):
                positions = engine.positions(known_B, state, width)
                before = {
                    str(tap): engine.gather(state.taps[str(tap)], state, positions - 1)
                    for tap in engine.model.exits.recurrent_taps
                }
                tokens = jnp.take_along_axis(state.tokens_BS, positions, axis=1)
                new = self._rows(engine, state.kept[self.name], before, tokens, positions)
                return jax.tree.map(lambda x: pad(x, widths[-1]), new)

            return branch

        shapes = jax.eval_shape(rows(widths[-1]), state)
        nothing = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)
        new, _ = in_width(widths, waiting_B, lambda _: nothing, rows, state)
        kept = kept | {
            # Of rows that were not checked, slots are written that are not in use yet.
            "rows": caches.write(kept["rows"], new, known_B),
            "known_B": jnp.where(rows_B, state.newest_B + 1, known_B),
            "trust_B": self._learned(kept, rows_B, drafted_B, accepted_B),
            "promised_B": jnp.where(rows_B, 0, kept["promised_B"]),
        }
        return state.change(kept=state.kept | {self.name: kept})

    @staticmethod
    def _learned(kept, rows_B, drafted_B, accepted_B) -> jax.Array:
        """Each row's trust after a check."""
        told_B = rows_B & (kept["promised_B"] > 0)
        tried_B = base.tried(drafted_B, accepted_B)
        more_B = (accepted_B - tried_B * kept["promised_B"]) / _MEMORY
        return jnp.clip(kept["trust_B"] + jnp.where(told_B, more_B, 0), 0, 2)

    def propose(self, engine, state, proposed):
        checked, mark = engine.mode.verified, engine.final + self.place
        free_B = base.free(state)
        worthwhile_B = free_B & (base.worthwhile(state, mark) | (not checked))
        chain = self._chain(engine, state, worthwhile_B)
        if checked:
            state = self._promise(state, chain)
            asked_B, cost = worthwhile_B & (chain.steps > 0), chain.steps * engine.costs.draft
            share = len(asked_B) / jnp.maximum(asked_B.sum(), 1)
            worth_B = base.asked(state.worth_BN[:, mark], asked_B, cost * share)
            worth_B = base.passed_over(worth_B, free_B & ~worthwhile_B)
            state = state.change(worth_BN=state.worth_BN.at[:, mark].set(worth_B))
            proposed = proposed._replace(cost=proposed.cost + cost)
        taken_B = worthwhile_B / jnp.maximum(worthwhile_B.sum(), 1) * chain.steps
        drafts = chain.drafts_BK, chain.reach_BK, chain.log_probs_BK
        return base.drafted(engine, state.count(draft_steps_B=taken_B), proposed, self, *drafts)

    def _promise(self, state, chain: _Chain) -> "DecodeState":
        """Notes how likely each draft of a row is held to stand, in the (geometric) mean."""
        kept = state.kept[self.name]
        made_B = (chain.reach_BK > 0).sum(axis=1)
        last_B = jnp.take_along_axis(chain.reach_BK, jnp.maximum(made_B - 1, 0)[:, None], axis=1)
        mean_B = jnp.where(made_B > 0, last_B[:, 0] ** (1 / jnp.maximum(made_B, 1)), 0)
        trust_B = kept["trust_B"] + (1 - kept["trust_B"]) * _FORGETTING
        kept = kept | {"trust_B": trust_B, "promised_B": mean_B}
        return state.change(kept=state.kept | {self.name: kept})

    def _chain(self, engine, state, rows_B) -> _Chain:
        """Chains of the given rows, as long as they are worth another step."""
        head, most = engine.bound.recurrent, engine.mode.capacity - 1
        kept, newest_B = state.kept[self.name], state.newest_B
        trust_B = kept["trust_B"]
        taps = [
            engine.gather(state.taps[str(tap)], state, newest_B[:, None] - 1)
            for tap in engine.model.exits.recurrent_taps
        ]
        batch, policy = len(newest_B), engine.policy
        fitted = None if policy is None else policy.drafts
        costs = engine.costs
        # Where a pass may be wider, its positions cost what they do in the width that suits best.
        position = ((costs.passes_N[1:] - 1) / (jnp.array(engine.mode.widths[1:]) - 1)).min()
        price = base.rate(state) * (costs.draft + position) / _NEXT
        checked = engine.mode.verified
        has_rest = engine.bound.token_ids is not None
        zeros = jnp.zeros((batch, most), jnp.float32)

        def step(chain: _Chain) -> _Chain:
            at_B1 = (newest_B + chain.steps)[:, None]
            embedded, context = engine.bound.backbone.stem(
                {"tokens": chain.token_B[:, None], "positions": at_B1}
            )
            chains = [
                networks.Chain(
                    past=past,
                    first_BT=jnp.zeros((batch, 1), jnp.int32),
                    length_BT=newest_B[:, None],
                    drafted=drafted,
                    counts_BTJ=(jnp.arange(most) < chain.steps)[None, None],
                )
                for past, drafted in zip(kept["rows"].values(), chain.rows, strict=True)
            ]
            states, new = head.drafted(head.joined(chain.before_B1D, embedded), context, chains)
            rule = engine.model.config.logit_rule
            logits = networks.logits(head.features(states), engine.draft_table, rule=rule)
            token_B1, log_prob_B1 = engine.draw(state, logits, at_B1, True)
            summary = confidences.summarize(logits[:, 0], has_rest=has_rest)
            name = "max_prob" if fitted is None else fitted.confidence
            score_B = consult.score(name, summary, consult.Said.nothing((batch,)).then(summary))
            stands_B = score_B if fitted is None else fitted.stands(chain.steps, score_B)
            usable_B = chain.going_B & ~summary.declines
            usable_B &= base.draftable(engine, state, token_B1, chain.steps)[:, 0]
            if not checked:
                usable_B &= fitted.leaves(chain.steps, score_B)
            before_B = jnp.where(
                chain.steps == 0, 1, chain.reach_BK[:, jnp.maximum(chain.steps - 1, 0)]
            )
            reach_B = jnp.where(usable_B, before_B * jnp.clip(trust_B * stands_B, 1e-6, 1), 0)
            going_B = usable_B
            if checked:
                going_B &= reach_B.sum() > price
            place = chain.steps
            return _Chain(
                steps=chain.steps + 1,
                before_B1D=states,
                token_B=token_B1[:, 0],
                rows=jax.tree.map(lambda x, y: x.at[:, :, place].set(y), chain.rows, new),
                drafts_BK=chain.drafts_BK.at[:, place].set(token_B1[:, 0]),
                log_probs_BK=chain.log_probs_BK.at[:, place].set(log_prob_B1[:, 0]),
                reach_BK=chain.reach_BK.at[:, place].set(reach_B),
                going_B=going_B,
            )

        empty = _Chain(
            steps=jnp.int32(0),
            before_B1D=head.fused(taps),
            token_B=jnp.take_along_axis(state.tokens_BS, newest_B[:, None], axis=1)[:, 0],
            rows=tuple(
                tuple(jnp.zeros((batch, 1, most, x.shape[1], x.shape[3]), x.dtype) for x in past)
                for past in kept["rows"].values()
            ),
            drafts_BK=zeros.astype(jnp.int32),
            log_probs_BK=zeros,
            reach_BK=zeros,
            going_B=rows_B & (((rows_B * trust_B).sum() > price) | (not checked)),
        )
        return jax.lax.while_loop(
            lambda chain: chain.going_B.any() & (chain.steps < most), step, empty
        )

    def _rows(self, engine, kept, before, tokens_BT, positions_BT) -> caches.Cache:
        """Exact rows of new positions, by the tapped states of those before them."""
        head = engine.bound.recurrent
        embedded, context = engine.bound.backbone.stem(
            {"tokens": tokens_BT, "positions": positions_BT}
        )
        fused = head.fused([before[str(tap)] for tap in engine.model.exits.recurrent_taps])
        fused = jnp.where((positions_BT > 0)[:, :, None], fused, 0)
        past = tuple(kept["rows"].values())
        new = head.rows(head.joined(fused, embedded), context, past, positions_BT[:, 0])
        return dict(zip(kept["rows"], new, strict=True))
