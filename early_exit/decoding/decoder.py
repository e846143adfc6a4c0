"""A model and how it decodes, and what a prompt got: what is around the compiled programs.

The one idea: a call takes a state and gives it further on, whoever called before: a stream, a queue
or a session with rows of its own rules.
"""

import dataclasses
import functools
import time
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from early_exit import confidence, sharding
from early_exit.backbones import base, few
from early_exit.cost.traffic import traffic
from early_exit.decoding import drafters
from early_exit.decoding.costs import Costs
from early_exit.decoding.decode import decode, prefill
from early_exit.decoding.mode import Mode
from early_exit.decoding.rules import Rules
from early_exit.decoding.sampling import GREEDY, Sampling
from early_exit.decoding.state import Counts, DecodeState, check_ids, initial_state, rows_of
from early_exit.exits import heads
from early_exit.exits.multi_exit import MultiExit
from early_exit.policy import ExitPolicy
from early_exit.storage import traces

FOREVER = np.int32(2**31 - 1)
# When this part of a batch's rows is left, they go on alone.
FEWER = 4
# What a state says of its answers; the rest stays on the devices.
_TOLD = ("tokens_BS", "exit_BS", "log_prob_BS", "newest_B", "prompt_B", "filled_BE", "counts")


@dataclasses.dataclass(frozen=True)
class Generation:
    """What one prompt got.

    Attributes:
      tokens: int32 [n], the new tokens, a stop token included.
      exits: int32 [n], index of the exit each came from; E is the final one, and what lies beyond
        marks another drafter (`drafters.places`). The first token comes out of the prefill, at full
        depth.
      depths: int [n], blocks run to propose each. For one that was drafted without any, 0 or less:
        1 − place of its drafter (`drafters.base.Drafter`).
      log_probs: float32 [n], at temperature 1: the full model's in verified decoding, otherwise
        those of the exit it left at.
      layer_tokens: blocks run after the prefill, summed over positions.
      bytes_read: weights and cache read after the prefill, by the cost model (`cost.traffic`);
        rows of a batch share what they read together.
      counts: this row's `decoding.state.Counts`, as numpy arrays.
      seconds: time spent after the prefill, on all rows of the batch together.
      prefill_seconds: time of the prefill, up to the first token, on all rows that started
        together; what a first call of its shape compiles is in it.
    """

    tokens: np.ndarray
    exits: np.ndarray
    depths: np.ndarray
    log_probs: np.ndarray
    layer_tokens: int
    bytes_read: float
    counts: Counts
    seconds: float
    prefill_seconds: float


@dataclasses.dataclass(frozen=True)
class Decoder:
    """A model, and how it decodes: what every call of one `stream` or `generate` shares.

    Attributes:
      costs: what steps cost on this device, by which verified decoding weighs drafts, or a
        function that says it of so many rows; assumed where they are not given.
      sampling: how tokens are drawn.
    """

    model: MultiExit
    params: base.Params
    policy: ExitPolicy | None
    stop_ids: Sequence[int]
    mode: Mode
    costs: Costs | Callable[[int], Costs] | None = None
    sampling: Sampling = GREEDY

    def __post_init__(self):
        """Raises ValueError where the policy or the stop tokens are not for the model."""
        if self.policy is not None:
            self.policy.check(self.model.exit_depths, self.model.confidences)
        check_ids(self.model, self.stop_ids, "the stop tokens")

    @functools.cached_property
    def _traffic(self):
        return traffic(self.model, self.params)

    def params_for(self, batch: int) -> base.Params:
        """The parameters that steps of so many rows are given; prompts are read as ever."""
        are_few = batch * self.mode.capacity > 1 and batch <= few.kind().most
        return self._for_few if are_few else self.params

    @functools.cached_property
    def _for_few(self) -> base.Params:
        return self.model.for_few(self.params)

    def _is_ours(self, rules: Rules) -> bool:
        """Whether no code that was added from elsewhere has a part in the programs, and no mesh."""
        score = rules.policy and rules.policy.confidence
        added = self.model.exits.head in heads.registered() or score in confidence.registered()
        if added or sharding.mesh_of(self.params) is not None:
            return False
        return traces.is_ours(self.model.config, *drafters.of(self.model, self.mode))

    def _program(self, function: Callable, rules: Rules, *args) -> DecodeState:
        """The state, which is the second argument, after one of the two programs."""
        static = {"model": self.model, "mode": self.mode}
        if not self._is_ours(rules):
            return function(*args, **static)
        return traces.call(function, *args, like=1, **static)

    def rules(self, batch: int) -> Rules:
        """What rows go by that have no rules of their own."""
        if batch not in self._rules:
            self._rules[batch] = Rules.same(batch, self.policy, self.stop_ids, self.sampling)
        return self._rules[batch]

    @functools.cached_property
    def _rules(self) -> dict[int, Rules]:
        return {}

    def costs_of(self, batch: int) -> Costs:
        """What steps of so many rows cost."""
        if self.costs is None:
            return Costs.assumed(self.mode, batch)
        return self.costs if isinstance(self.costs, Costs) else self.costs(batch)

    def empty(self, prompts, max_new_tokens, keys, slots) -> DecodeState:
        """The state of a batch of whose prompts nothing was read yet."""
        return initial_state(
            self.model,
            prompts,
            max_new_tokens,
            mode=self.mode,
            key=keys,
            dtype=jax.tree.leaves(self.params["backbone"])[0].dtype,
            slots=slots,
            mesh=sharding.mesh_of(self.params),
        )

    def read(self, state: DecodeState, rules: Rules | None = None, *, chunks=FOREVER):
        """The state after so many more chunks of the prompts, by default after all of them."""
        rules = dataclasses.replace(rules or self.rules(len(state.prompt_B)), policy=None)
        chunks = jnp.int32(chunks)
        state = self._program(prefill, rules, self.params, state, rules, chunks)
        return jax.block_until_ready(state)

    def start(self, prompts, max_new_tokens, keys, slots) -> DecodeState:
        """The state of a batch after its prompts."""
        return self.read(self.empty(prompts, max_new_tokens, keys, slots))

    def run(
        self,
        state: DecodeState,
        rules: Rules | None = None,
        *,
        steps=FOREVER,
        finishing=FOREVER,
    ) -> DecodeState:
        """The state after so many steps, or when so many rows have ended (all, if fewer)."""
        batch = len(state.finished_B)
        rules, finishing = rules or self.rules(batch), jnp.int32(min(finishing, batch))
        costs, steps = self.costs_of(batch), jnp.int32(steps)
        given = self.params_for(batch), state, rules, costs, steps, finishing
        state = self._program(decode, rules, *given)
        return jax.block_until_ready(state)

    def finish(
        self, state: DecodeState, prefill_seconds: float = 0.0, *, whole: bool = False
    ) -> list[Generation]:
        """What every row has in the end.

        Where few rows go on, they go on alone: steps of fewer rows take less time.

        Args:
          whole: whether the batch keeps all its rows nevertheless.
        """
        answers: dict[int, Generation] = {}
        rows: list[int | None] = list(range(len(state.finished_B)))  # whose answer is in each
        seconds, going = 0.0, np.arange(len(rows))
        while len(going):
            size = len(rows)
            fewer = 0 if whole or size == 1 else -(-size // FEWER)
            state = self.run(state, steps=0)  # compiles, off the clock
            began = time.perf_counter()
            state = self.run(state, finishing=size - fewer)
            seconds += time.perf_counter() - began
            finished = sharding.fetch(state.finished_B)
            found = self.generations(state, [0.0] * size)
            ended = [(rows[row], found[row]) for row in np.flatnonzero(finished)]
            answers |= {place: answer for place, answer in ended if place is not None}
            going = np.flatnonzero(~finished)
            if len(going):
                empty = fewer - len(going)
                index = jnp.array([*going, *going[:1].repeat(empty)])
                state = rows_of(state, index, jnp.int32(len(going)))
                rows = [*(rows[row] for row in going), *[None] * empty]
        times = {"seconds": seconds, "prefill_seconds": prefill_seconds}
        return [dataclasses.replace(answers[i], **times) for i in range(len(answers))]

    def generations(
        self,
        state: DecodeState,
        seconds: Sequence[float],
        prefill_seconds: Sequence[float] | None = None,
    ) -> list[Generation]:
        """What every row of a state has so far; in verified decoding, what has been checked.

        Args:
          seconds, prefill_seconds: of each row; 0 where the prefill was not timed.
        """
        if prefill_seconds is None:
            prefill_seconds = [0.0] * len(seconds)
        state = state.change(**sharding.fetch({name: getattr(state, name) for name in _TOLD}))
        settled_B = state.filled_BE[:, -1] if self.mode.verified else state.newest_B
        others = 1 - np.arange(1, len(drafters.BY_NAME))
        depths = np.append(self.model.exit_depths, others)
        generations = []
        for row, (prompt, settled) in enumerate(zip(state.prompt_B, settled_B, strict=True)):
            new = slice(prompt, settled + 1)
            exits = state.exit_BS[row, new]
            counts = jax.tree.map(lambda x, row=row: x[row], state.counts)
            generations.append(
                Generation(
                    tokens=state.tokens_BS[row, new],
                    exits=exits,
                    depths=depths[exits],
                    log_probs=state.log_prob_BS[row, new],
                    layer_tokens=int(counts.positions_BE @ np.diff(self.model.segments)[:, 0]),
                    bytes_read=self._traffic.bytes_read(
                        counts,
                        exits[1:],
                        propagates=self.mode.propagates,
                        verifies=self.mode.verified,
                    ),
                    counts=counts,
                    seconds=seconds[row],
                    prefill_seconds=prefill_seconds[row],
                )
            )
        return generations
