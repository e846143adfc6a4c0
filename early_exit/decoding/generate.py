"""Prompts in, texts with their statistics out: the loop around prefill and decode.

The one idea: streaming, whole answers and queues of prompts are the same compiled program, run for
a few steps, until all rows have ended, or until one has and the next prompt can take its place.
"""

import collections
import dataclasses
import functools
import time
from collections.abc import Iterator, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from early_exit.backbones import base
from early_exit.cost.traffic import traffic
from early_exit.decoding import cache as caches
from early_exit.decoding import drafters
from early_exit.decoding.costs import Costs
from early_exit.decoding.decode import decode, prefill
from early_exit.decoding.mode import LOSSY, Mode
from early_exit.decoding.state import (
    Counts,
    DecodeState,
    check_ids,
    check_prompts,
    initial_state,
)
from early_exit.exits.multi_exit import MultiExit
from early_exit.policy import ExitPolicy

FOREVER = np.int32(2**31 - 1)
# Of a batch's rows, the part that starts together from a queue. One prompt's pass alone costs as
# much as a step of many rows; but rows that have ended wait for the others meanwhile.
JOINING = 8


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
      costs: what steps cost on this device, by which verified decoding weighs drafts; assumed
        where they are not given.
    """

    model: MultiExit
    params: base.Params
    policy: ExitPolicy | None
    stop_ids: Sequence[int]
    mode: Mode
    costs: Costs | None = None

    def __post_init__(self):
        """Raises ValueError where the policy or the stop tokens are not for the model."""
        if self.policy is not None:
            self.policy.check(self.model.exit_depths, self.model.confidences)
        check_ids(self.model, self.stop_ids, "the stop tokens")

    @functools.cached_property
    def _stops(self) -> jax.Array:
        # Padded with −1, which is no token: another length would be another program.
        padding = -len(self.stop_ids) % 8 or 8
        return jnp.array([*self.stop_ids, *[-1] * padding], jnp.int32)

    @functools.cached_property
    def _traffic(self):
        return traffic(self.model, self.params)

    def start(self, prompts, max_new_tokens, keys, slots) -> DecodeState:
        """The state of a batch after its prompts."""
        state = initial_state(
            self.model,
            prompts,
            max_new_tokens,
            mode=self.mode,
            key=keys,
            dtype=jax.tree.leaves(self.params["backbone"])[0].dtype,
            slots=slots,
        )
        state = prefill(self.params, state, self._stops, model=self.model, mode=self.mode)
        return jax.block_until_ready(state)

    def run(self, state: DecodeState, *, steps=FOREVER, finishing=FOREVER) -> DecodeState:
        """The state after so many steps, or when so many rows have ended (all, if fewer)."""
        finishing = min(finishing, len(state.finished_B))
        state = decode(
            self.params,
            state,
            self.policy,
            self._stops,
            self.costs or Costs.assumed(self.mode, len(state.finished_B)),
            jnp.int32(steps),
            jnp.int32(finishing),
            model=self.model,
            mode=self.mode,
        )
        return jax.block_until_ready(state)

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
        state = jax.device_get(dataclasses.replace(state, cache={}, keys_B=None, hidden_BWD=None))
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


def stream(
    model: MultiExit,
    params: base.Params,
    prompts: Sequence[Sequence[int]],
    *,
    policy: ExitPolicy | None,
    max_new_tokens: int | Sequence[int],
    mode: Mode = LOSSY,
    stop_ids: Sequence[int] = (),
    seed: int = 0,
    portion: int = 4,
    slots: int | None = None,
    costs: Costs | None = None,
) -> Iterator[list[Generation]]:
    """Yields what every prompt has so far, after the prefill and after every `portion` steps.

    A step gives each row of a small batch a token, and more where drafts are accepted.

    Args:
      prompts: token ids, of any lengths.
      policy: when to leave; None runs the full model without consulting any exit.
      mode: what happens to skipped blocks, whether early tokens stand, how tokens are drawn.
      stop_ids: tokens that end an answer (and stay in it).
      slots: cache slots to allocate, by default as few as the longest row needs.
      costs: by which verified decoding weighs drafts (`decoding.measure`); assumed if not given.

    Raises:
      ValueError: no prompt, an empty one, one of something else than the model's tokens, or one
        that with its answer exceeds the context; stop tokens that the model does not have; a policy
        for another number of exits or for a score that they lack, or a budget that they cannot
        keep.
    """
    decoder = Decoder(model, params, policy, stop_ids, mode, costs)
    began = time.perf_counter()
    state = decoder.start(prompts, max_new_tokens, jax.random.key(seed), slots)
    seconds, prefill_seconds = 0.0, [time.perf_counter() - began] * len(prompts)
    state = decoder.run(state, steps=0)  # compiles, off the clock
    yield decoder.generations(state, [seconds] * len(prompts), prefill_seconds)
    while not bool(state.finished_B.all()):
        began = time.perf_counter()
        state = decoder.run(state, steps=portion)
        seconds += time.perf_counter() - began
        yield decoder.generations(state, [seconds] * len(prompts), prefill_seconds)


def generate(
    model: MultiExit,
    params: base.Params,
    prompts: Sequence[Sequence[int]],
    *,
    policy: ExitPolicy | None,
    max_new_tokens: int | Sequence[int],
    mode: Mode = LOSSY,
    stop_ids: Sequence[int] = (),
    seed: int = 0,
    batch: int | None = None,
    slots: int | None = None,
    costs: Costs | None = None,
) -> list[Generation]:
    """Like `stream`, but returns once, when every prompt has its answer.

    Args:
      batch: prompts decoded together, all by default. With fewer, a row whose answer has ended
        gives its place to the next prompt. What a prompt gets does not depend on it.
    """
    if batch is not None and batch < 1:
        raise ValueError(f"a batch has at least 1 row, not {batch}")
    if batch is not None and batch < len(prompts):
        decoder = Decoder(model, params, policy, stop_ids, mode, costs)
        return _queued(decoder, prompts, max_new_tokens, seed, batch, slots)
    *_, last = stream(
        model,
        params,
        prompts,
        policy=policy,
        max_new_tokens=max_new_tokens,
        mode=mode,
        stop_ids=stop_ids,
        seed=seed,
        portion=FOREVER,
        slots=slots,
        costs=costs,
    )
    return last


def _queued(decoder: Decoder, prompts, max_new_tokens, seed, batch, slots) -> list[Generation]:
    max_new_tokens = check_prompts(decoder.model, prompts, max_new_tokens)
    keys = jax.random.split(jax.random.key(seed), len(prompts))
    sizes = [len(p) + new for p, new in zip(prompts, max_new_tokens, strict=True)]
    if slots is None:
        slots = caches.bucket(max(sizes) + decoder.mode.capacity - 1)
    # Long ones first: those that start together are alike, and short ones end together at last.
    waiting = collections.deque(sorted(range(len(prompts)), key=lambda i: -sizes[i]))
    together = -(-batch // JOINING)
    rows: list[int | None] = [None] * batch  # the prompt in each row
    seconds, prefill_seconds = np.zeros((2, batch))
    state, answers = None, {}
    while len(answers) < len(prompts):
        empty = [row for row, prompt in enumerate(rows) if prompt is None]
        while waiting and empty:
            places, empty = empty[:together], empty[together:]
            started = [waiting.popleft() for _ in places[: len(waiting)]]
            places = places[: len(started)]
            # Always as many: others would be another program. Who has no place is forgotten.
            padding = together - len(started)
            chosen = [*started, *started[:1] * padding]
            began = time.perf_counter()
            new = decoder.start(
                [prompts[i] for i in chosen],
                [max_new_tokens[i] for i in chosen],
                keys[jnp.array(chosen)],
                slots,
            )
            taken = time.perf_counter() - began
            state = _empty(new, batch) if state is None else state
            state = _insert(state, new, jnp.array([*places, *[batch] * padding]))
            for row, prompt in zip(places, started, strict=True):
                rows[row], seconds[row], prefill_seconds[row] = prompt, 0.0, taken
        state = decoder.run(state, steps=0)  # compiles, off the clock
        running = np.array([prompt is not None for prompt in rows])
        joining = min(together, len(waiting)) or 1
        began = time.perf_counter()
        state = decoder.run(state, finishing=batch - running.sum() + joining)
        seconds += (time.perf_counter() - began) * running
        finished = np.asarray(state.finished_B)
        generations = decoder.generations(state, seconds, prefill_seconds)
        for row in np.flatnonzero(finished & running):
            answers[rows[row]], rows[row] = generations[row], None
    return [answers[i] for i in range(len(prompts))]


def _empty(part: DecodeState, batch: int) -> DecodeState:
    """A batch of rows that have all ended, shaped like those given."""
    state = jax.tree.map(lambda x: jnp.broadcast_to(x[:1], (batch, *x.shape[1:])).copy(), part)
    return state.change(finished_B=jnp.ones(batch, bool))


@functools.partial(jax.jit, donate_argnames="state")
def _insert(state: DecodeState, part: DecodeState, rows: jax.Array) -> DecodeState:
    """The batch with some rows replaced; those beyond it are left out."""
    return jax.tree.map(lambda whole, new: whole.at[rows].set(new, mode="drop"), state, part)
