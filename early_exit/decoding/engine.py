"""One turn of the decoding loop, a *step*: segment by segment, shallow to deep, the rows whose
newest position waits there are run.

The one idea: depth must be proportional in time. Each segment between two exits stands in a
`lax.switch` that reads the cache and returns only new key/value rows, for as many positions as
wait there; the cache is written once, after the branches, in place.

A position that leaves at an exit gives the row its next token. The blocks that it skipped get keys
and values projected from its state ("propagate"), or it waits with its hidden state until a later
position goes deeper and takes it along ("defer"): then each position passes each block at most
once, and what deeper blocks hold is what the full model would hold. Where other rows of a batch go
deeper in the same step, it goes along with them, which costs nothing.

Each row of a batch leaves where its exits let it. A segment runs once in a step, for all rows that
need it, so its weights are read once for all of them, and each row has its next token at the end.
(Letting shallow rows run ahead while deep ones wait saves a tenth of the passes at best, where most
leave at the first exit, and elsewhere costs as much: `experiments/decoding_speed/schedules.py`.)
"""

import dataclasses

import jax
import jax.numpy as jnp

from early_exit.backbones import base
from early_exit.consult import Said
from early_exit.cost.traffic import traffic
from early_exit.decoding import cache as caches
from early_exit.decoding import drafters
from early_exit.decoding import sampling as samplings
from early_exit.decoding.costs import Costs, by_weights
from early_exit.decoding.drafters import base as drafting
from early_exit.decoding.mode import Mode
from early_exit.decoding.rules import Rules
from early_exit.decoding.state import DecodeState
from early_exit.decoding.widths import in_width, pad
from early_exit.exits.multi_exit import Bound, MultiExit
from early_exit.policy import ExitPolicy


@dataclasses.dataclass(frozen=True)
class Engine:
    """What stays the same from step to step.

    Attributes:
      model, mode: static.
      bound: the model with its parameters.
      drafters: what proposes tokens, in the order in which they are asked.
      taps: blocks (1-based) whose output they read.
      tables: the heads' output matrices; none without a policy.
      draft_table: the recurrent exit's; None where it does not draft.
      rules: what the rows go by.
      costs: what steps cost relative to each other.
      saved_E: what leaving early saves at each exit, as in `Costs`.
      depth_shares, head_shares: blocks before each exit, and each head, as shares of the cost of
        one token of the full model.
    """

    model: MultiExit
    mode: Mode
    bound: Bound
    drafters: tuple[drafting.Drafter, ...]
    taps: tuple[int, ...]
    tables: tuple[jax.Array, ...]
    draft_table: jax.Array | None
    rules: Rules
    costs: Costs
    saved_E: jax.Array
    depth_shares: tuple[float, ...]
    head_shares: tuple[float, ...]

    @classmethod
    def of(
        cls, params: base.Params, rules: Rules, costs: Costs, *, model: MultiExit, mode: Mode
    ) -> "Engine":
        bound, asked = model.bind(params), drafters.of(model, mode)
        # Some are gathered: here, outside any loop.
        drafts = any(drafter.name == "recurrent" for drafter in asked)
        depth_shares, head_shares = traffic(model, params).shares()
        saved_E = costs.saved_E
        if saved_E is None:
            saved_E = by_weights(depth_shares[:-1], costs.passes_N)
        return cls(
            model=model,
            mode=mode,
            bound=bound,
            drafters=asked,
            taps=drafters.taps(model, mode),
            tables=() if rules.policy is None else bound.exit_tables(),
            draft_table=bound.draft_table() if drafts else None,
            rules=rules,
            costs=costs,
            saved_E=saved_E,
            depth_shares=depth_shares,
            head_shares=head_shares,
        )

    @property
    def policy(self) -> ExitPolicy | None:
        """When positions leave; None for the full model without any exit."""
        return self.rules.policy

    @property
    def final(self) -> int:
        """Index of the last segment, and of the full model's own readout."""
        return len(self.model.segments) - 1

    def step(self, state: DecodeState) -> DecodeState:
        """Every segment in turn, for the rows that wait in front of it."""
        state = self._embed(self._propose(state))
        for segment in range(self.final + 1):
            active_B = ~state.finished_B & (state.stage_B == segment)
            before_BWD, start_B = state.hidden_BWD, state.filled_BE[:, segment]
            state = self._advance(state, segment, active_B)
            if segment == self.final:
                widths = self._widths(segment) if self.mode.verified else (1,)
                first_B = start_B if self.mode.verified else state.newest_B
                state = self.conclude(state, active_B, first_B, widths)
            else:
                for drafter in self.drafters:
                    state = drafter.after_segment(self, state, segment, active_B, before_BWD)
        return state

    def _propose(self, state: DecodeState) -> DecodeState:
        """The state with what drafters say before any pass."""
        ahead = [drafter for drafter in self.drafters if drafter.drafts_ahead(self)]
        if not ahead:
            return state
        proposed = drafting.Proposed.nothing(len(state.newest_B), self.mode.capacity - 1)
        for drafter in ahead:
            state, proposed = drafter.propose(self, state, proposed)
        return drafting.handed_on(self, state, proposed) if self.mode.verified else state

    def _widths(self, segment: int) -> tuple[int, ...]:
        """How many positions of a row can meet a segment: one compiled branch each."""
        ahead = any(drafter.drafts_ahead(self) for drafter in self.drafters)
        # Where positions leave early, they wait for each other in front of deeper segments.
        waits = segment and any(drafter.name == "exits" for drafter in self.drafters)
        return self.mode.widths if ahead or (waits and self.policy is not None) else (1,)

    def positions(self, first_B: jax.Array, state: DecodeState, width: int) -> jax.Array:
        """int32 [B, width], positions from `first_B` on; the newest again where they run out."""
        return jnp.minimum(first_B[:, None] + jnp.arange(width)[None], state.newest_B[:, None])

    def gather(self, kept_BWD: jax.Array, state: DecodeState, positions_BT: jax.Array):
        """[B, T, D] of positions under way: of `state.hidden_BWD`, or of one of its taps."""
        slots = state.pending_slots(positions_BT)
        return jnp.take_along_axis(kept_BWD, slots[:, :, None], axis=1)

    def _keep(self, state: DecodeState, first_B, until_B, hidden_BTD, taps=None) -> DecodeState:
        """The state with new hidden states of the positions from `first_B` up to `until_B`."""
        width = hidden_BTD.shape[1]
        positions = first_B[:, None] + jnp.arange(width)[None]
        nowhere = state.hidden_BWD.shape[1]
        counts = positions < until_B[:, None]
        slots = jnp.where(counts, state.pending_slots(positions), nowhere)
        rows = jnp.arange(len(first_B))[:, None]

        def stored(kept_BWD, new_BTD):
            return kept_BWD.at[rows, slots].set(new_BTD, mode="drop")

        new_taps = {name: stored(state.taps[name], new) for name, new in (taps or {}).items()}
        return state.change(
            hidden_BWD=stored(state.hidden_BWD, hidden_BTD), taps=state.taps | new_taps
        )

    def stem(self, state: DecodeState, positions_BT: jax.Array):
        """Embedded tokens at some positions, and the context for blocks there."""
        tokens = jnp.take_along_axis(state.tokens_BS, positions_BT, axis=1)
        return self.embed(state, tokens, positions_BT)

    def embed(self, state: DecodeState, tokens_BT: jax.Array, positions_BT: jax.Array):
        """The same of given tokens."""
        inputs = {"tokens": tokens_BT, "positions": positions_BT}
        memory = {} if state.encoded is None else {"memory": state.encoded.memory}
        return self.bound.backbone.stem(inputs | memory)

    def encode_prompts(self, state: DecodeState) -> DecodeState:
        """The state after an encoder has read the prompts, if there is one and it has not yet."""
        if (encoded := state.encoded) is None:
            return state

        def read(encoded):
            real_BS = encoded.memory.real_BS
            memory = self.bound.backbone.remember(encoded.tokens_BS, real_BS)
            return jax.tree.map(lambda x, like: x.astype(like.dtype), memory, encoded.memory)

        untouched = state.filled_BE.max() == 0
        memory = jax.lax.cond(untouched, read, lambda encoded: encoded.memory, encoded)
        return state.change(encoded=dataclasses.replace(encoded, memory=memory))

    def _embed(self, state: DecodeState) -> DecodeState:
        """Puts the tokens that wait in front of the first segment among the positions under way."""
        first_B = state.filled_BE[:, 0]
        embedded, _ = self.stem(state, self.positions(first_B, state, self._widths(0)[-1]))
        rows_B = ~state.finished_B & (state.stage_B == 0)
        until_B = jnp.where(rows_B, state.newest_B + 1, first_B)
        return self._keep(state, first_B, until_B, embedded)

    def _advance(self, state: DecodeState, segment: int, active_B: jax.Array) -> DecodeState:
        """Runs a segment's blocks for all positions that wait in the active rows."""
        widths = self._widths(segment)
        start_B, propagates = state.filled_BE[:, segment], self.mode.propagates

        def run(width):
            def branch(state):
                positions = self.positions(start_B, state, width)
                _, context = self.stem(state, positions)
                found = self.run_blocks(
                    segment,
                    self.gather(state.hidden_BWD, state, positions),
                    context,
                    state.cache,
                    start_B,
                    active_B if propagates else None,
                )
                return jax.tree.map(lambda x: pad(x, widths[-1]), found)

            return branch

        def skip(state):
            positions = self.positions(start_B, state, widths[-1])
            hidden = self.gather(state.hidden_BWD, state, positions)
            _, context = self.stem(state, positions)
            found = self.project(segment, hidden, context)
            # Without it nothing has come this far: what is written lies behind the filled part.
            return found if propagates else jax.tree.map(jnp.zeros_like, found)

        waiting_B = jnp.where(active_B, state.newest_B + 1 - start_B, 0)
        if segment and not (propagates or self.mode.verified):
            waiting_B = self._with_others(state, segment, active_B, waiting_B)
        (hidden, rows, taps), narrowest = in_width(widths, waiting_B, skip, run, state)
        until_B = start_B + waiting_B
        state = self._keep(state, start_B, until_B, hidden, taps)
        if propagates:  # rows that have left lack this segment's rows of their last position
            until_B = jnp.maximum(until_B, state.newest_B)
        runs_B = waiting_B > 0
        share_B = runs_B / jnp.maximum(runs_B.sum(), 1)
        width = jnp.arange(len(self.mode.widths)) == narrowest
        return state.change(
            cache=caches.write(state.cache, rows, start_B),
            filled_BE=state.filled_BE.at[:, segment].set(until_B),
        ).count(
            positions_BE=self.column(segment, waiting_B),
            read_BE=self.column(segment, jnp.where(runs_B, start_B, 0)),
            passes_BEN=self.column(segment, share_B)[:, :, None] * width[None, None],
        )

    def _with_others(self, state, segment: int, active_B, waiting_B) -> jax.Array:
        """How many positions run, int32 [B], where rows that have left go along with those that
        have not: as many as a pass has room for that is no wider for them."""
        widths = jnp.array(self._widths(segment))
        room = widths[jnp.searchsorted(widths, waiting_B.max())]
        left_B = active_B.any() & ~active_B & ~state.finished_B
        behind_B = state.filled_BE[:, segment - 1] - state.filled_BE[:, segment]
        return jnp.where(left_B, jnp.minimum(behind_B, room), waiting_B)

    def run_blocks(self, segment, hidden_BTD, context, cache, filled_B, active_B=None):
        """(hidden states after a segment's blocks, their new key and value rows, those of `taps`).

        Args:
          active_B: the other rows hold still; all run if None.
        """
        rows: caches.Cache = {}
        taps = {}
        for i in range(*self.model.segments[segment]):
            name = f"block/{i}"
            block = self.bound.backbone.cached_block(i)
            deeper, rows[name] = block(hidden_BTD, context, cache[name], filled_B)
            if active_B is not None:
                deeper = jnp.where(active_B[:, None, None], deeper, hidden_BTD)
            hidden_BTD = deeper
            if i + 1 in self.taps:
                taps[str(i + 1)] = hidden_BTD
        return hidden_BTD, rows | self._head_rows(segment, hidden_BTD, context), taps

    def project(self, segment, hidden_BTD, context):
        """The same for positions that skip the segment: rows projected from the state they have."""
        blocks = range(*self.model.segments[segment])
        rows = {
            f"block/{i}": self.bound.backbone.cached_block(i).keys_values(hidden_BTD, context)
            for i in blocks
        }
        taps = {str(i + 1): hidden_BTD for i in blocks if i + 1 in self.taps}
        return hidden_BTD, rows | self._head_rows(segment, hidden_BTD, context), taps

    def _head_rows(self, segment, hidden_BTD, context) -> caches.Cache:
        """Rows of the block in the head behind a segment, if there is one."""
        heads = self.bound.heads  # none in a bare backbone
        if segment >= len(heads) or not heads[segment].has_block:
            return {}
        point = self.model.exits.points[segment]
        return {f"exit/{point}": heads[segment].block.keys_values(hidden_BTD, context)}

    def conclude(self, state: DecodeState, active_B, first_B, widths) -> DecodeState:
        """The full model's tokens after the positions from `first_B` to the newest.

        Those that differ from what an exit had said there replace it and all that followed; after
        the newest position, or the first that differs, the row gets its next token.

        Args:
          active_B: rows whose positions have passed the last block.
          widths: how many positions may be checked at once, one compiled branch each.
        """
        waiting_B = jnp.where(active_B, state.newest_B + 1 - first_B, 0)

        def read(width):
            def branch(state):
                positions = self.positions(first_B, state, width)
                logits = self.bound.backbone.readout(
                    self.gather(state.hidden_BWD, state, positions)
                )
                drawn = self.draw(state, logits, positions, False)
                return jax.tree.map(lambda x: pad(x, widths[-1]), drawn)

            return branch

        def skip(state):
            zeros = jnp.zeros((len(active_B), widths[-1]), jnp.int32)
            return zeros, zeros.astype(jnp.float32)

        (tokens, log_probs), narrowest = in_width(widths, waiting_B, skip, read, state)
        drafted_B = jnp.maximum(waiting_B - 1, 0)
        accepted_B = jnp.zeros_like(drafted_B)
        if self.mode.verified and widths[-1] > 1:
            drafts = jnp.take_along_axis(
                state.tokens_BS, self.positions(first_B + 1, state, widths[-1] - 1), axis=1
            )
            accepted_B = drafting.accepted(drafts, tokens[:, :-1], drafted_B)
            state = drafting.booked(self, state, first_B, drafted_B, accepted_B, narrowest)
        state = state.count(
            evaluations_BE=self.column(self.final, waiting_B),
            head_passes_BE=self.column(self.final, active_B / jnp.maximum(active_B.sum(), 1)),
        )
        state = self.append(
            state,
            active_B,
            first_B=first_B,
            accepted_B=accepted_B,
            tokens_BT=tokens,
            log_probs_BT=log_probs,
            exit_index=self.final,
        )
        for drafter in self.drafters:
            state = drafter.settle(self, state, active_B, drafted_B, accepted_B)
        return state

    def append(
        self, state, rows_B, *, first_B, accepted_B, tokens_BT, log_probs_BT, exit_index: int
    ) -> DecodeState:
        """Gives the rows their next token, behind the drafts that were accepted after `first_B`.

        Args:
          tokens_BT, log_probs_BT: what was drawn after each position from `first_B` on.
        """
        batch, width = tokens_BT.shape
        rows = jnp.arange(batch)
        nowhere = state.tokens_BS.shape[1]
        newest_B = jnp.where(rows_B, first_B + accepted_B + 1, state.newest_B)
        token_B = jnp.take_along_axis(tokens_BT, accepted_B[:, None], axis=1)[:, 0]
        at = jnp.where(rows_B, newest_B, nowhere)
        steps = jnp.arange(width)[None]
        decided = rows_B[:, None] & (steps <= accepted_B[:, None])
        decided_at = jnp.where(decided, first_B[:, None] + 1 + steps, nowhere)
        ended_B = self.rules.stops(token_B) | (newest_B + 1 >= state.limit_B)
        account_B = state.account_B
        if self.policy is not None:
            account_B = self.policy.charged(account_B, self.model.exit_depths[exit_index])
        return state.change(
            tokens_BS=state.tokens_BS.at[rows, at].set(token_B, mode="drop"),
            exit_BS=state.exit_BS.at[rows, at].set(exit_index, mode="drop"),
            log_prob_BS=state.log_prob_BS.at[rows[:, None], decided_at].set(
                log_probs_BT, mode="drop"
            ),
            newest_B=newest_B,
            filled_BE=jnp.where(
                rows_B[:, None],
                jnp.minimum(state.filled_BE, newest_B[:, None]),
                state.filled_BE,
            ),
            finished_B=state.finished_B | (rows_B & ended_B),
            account_B=jnp.where(rows_B, account_B, state.account_B),
            said=Said.nothing(rows_B.shape).where(rows_B, state.said),
        )

    def draw(self, state: DecodeState, logits_BTC, positions_BT, at_exit: bool):
        """(tokens, log-probabilities at temperature 1), each [B, T], after the given positions.

        A token is drawn with its own position's key, whichever head draws it.
        """
        keys = jax.vmap(jax.vmap(jax.random.fold_in, (None, 0)))(state.keys_B, positions_BT + 1)
        log_probs = jax.nn.log_softmax(logits_BTC, axis=-1)
        ids = self.bound.token_ids if at_exit else None
        real = logits_BTC if ids is None else logits_BTC[..., :-1]  # the rest is never drawn
        vocab_size = self.model.config.vocab_size
        sampling = jax.tree.map(lambda x_B: x_B[:, None], self.rules.sampling)
        choice = samplings.choose(keys, real, sampling, ids, vocab_size)
        chosen = jnp.take_along_axis(log_probs, choice[..., None], axis=-1)[..., 0]
        return (choice if ids is None else ids[choice]), chosen

    def column(self, index: int, values_B: jax.Array) -> jax.Array:
        """[B, E + 1]: the values in one column, zeros in the others."""
        return values_B[:, None] * (jnp.arange(self.final + 1) == index)[None]
