"""Requests that come and go, decoded together: rows join a running batch and leave it.

The one idea: a row of a batch knows nothing of the others, so whoever takes its place gets the
answer that it would get alone. Prompts are read beside the batch, a chunk at a time between steps,
and join it when they are through. What a row is asked for (stops, temperature, thresholds) are
arrays; how many rows and slots there are comes in a few sizes. So what can be compiled is soon
compiled.
"""

import collections
import dataclasses
import functools
import itertools
import time
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from early_exit import policy as policies
from early_exit import sharding
from early_exit.data.pairs import row_of
from early_exit.decoding import cache as caches
from early_exit.decoding.decode import chunk_size
from early_exit.decoding.decoder import FOREVER, Decoder, Generation
from early_exit.decoding.prefixes import Prefixes, Taps
from early_exit.decoding.rules import Rules
from early_exit.decoding.sampling import GREEDY, Sampling
from early_exit.decoding.state import (
    DecodeState,
    check_ids,
    check_prompts,
    in_place,
    initial_state,
    placed,
    rows_of,
)

# Of a batch's rows, the part that starts together. One prompt's pass alone costs as much as a step
# of many rows; but rows that have ended wait for the others meanwhile.
JOINING = 8
# Why an answer ended.
STOP, LENGTH, CANCELLED = "stop", "length", "cancelled"


@dataclasses.dataclass(frozen=True)
class Request:
    """A prompt and how it is to be answered.

    Attributes:
      prompt: token ids.
      max_new_tokens: at most so many tokens of an answer.
      sampling: how they are drawn.
      stop_ids: tokens that end the answer (and stay in it); the decoder's if None.
      thresholds: of each exit, in place of those of the decoder's policy; inf never leaves.
      seed: of what is drawn.
    """

    prompt: Sequence[int]
    max_new_tokens: int
    sampling: Sampling = GREEDY
    stop_ids: Sequence[int] | None = None
    thresholds: Sequence[float] | None = None
    seed: int = 0


@dataclasses.dataclass(frozen=True)
class Event:
    """What a step gave a request.

    Attributes:
      id: what `Session.add` called it.
      answer: all that it has so far; None where it was cancelled before its first token.
      first: the place in the answer of its first token that is new.
      ended: why it ended, or None: `stop` (a stop token), `length` (as many as it asked for) or
        `cancelled`.
    """

    id: int
    answer: Generation | None
    first: int
    ended: str | None


@dataclasses.dataclass(eq=False)
class _Ticket:
    """A request on its way: what of it has been told, and what it has taken."""

    id: int
    request: Request
    key: jax.Array
    stop_ids: Sequence[int]
    answer: Generation | None = None
    seconds: float = 0.0
    prefill_seconds: float = 0.0
    cancelled: bool = False

    @property
    def positions(self) -> int:
        return len(self.request.prompt) + self.request.max_new_tokens

    @property
    def told(self) -> int:
        return 0 if self.answer is None else len(self.answer.tokens)


@dataclasses.dataclass
class _Group:
    """Prompts that are being read together, before they join.

    Attributes:
      tickets: one for each of the first rows; the rows behind are padding.
      taps: by how many positions had been read, what drafters' taps were.
    """

    tickets: list[_Ticket]
    state: DecodeState
    read: int
    taps: Taps


class Session:
    """Requests are added and cancelled at any time; each `step` tells what they got.

    Example:
      >>> session = Session(decoder, rows=8)  # doctest: +SKIP
      >>> session.add(Request([1, 2, 3], max_new_tokens=8))
      0
      >>> while session.busy:
      ...     for event in session.step():
      ...         print(event.id, event.answer.tokens[event.first :], event.ended)
    """

    def __init__(
        self,
        decoder: Decoder,
        rows: int = 8,
        *,
        sizes: Sequence[int] | None = None,
        slots: int | None = None,
        draws: bool = True,
        prefix_bytes: int = 0,
    ):
        """
        Args:
          decoder: the model, its mode, and what requests go by that say nothing else.
          rows: most requests that are decoded together; others wait.
          sizes: numbers of rows that a batch may have, each a program: powers of two by default.
          slots: of each row's cache; by default as many as the longest request needs, by and by.
          draws: whether requests may sample; without, nothing about it is compiled.
          prefix_bytes: of keys and values that are kept of prompts, so that a later prompt that
            begins alike need not be read from its beginning.

        Raises:
          ValueError: no rows, or sizes that do not go up to them.
        """
        if rows < 1:
            raise ValueError(f"a batch has at least 1 row, not {rows}")
        powers = itertools.takewhile(lambda size: size < rows, (2**n for n in itertools.count()))
        self._sizes = sorted(sizes) if sizes else [*powers, rows]
        if self._sizes[-1] != rows:
            raise ValueError(f"the largest of sizes={self._sizes} must be rows={rows}")
        self._decoder, self._slots, self._draws = decoder, slots, draws
        self._together = -(-rows // JOINING)
        self._chunk = chunk_size(self._together)
        self._prefixes = Prefixes(decoder.model, decoder.mode, prefix_bytes, self._chunk)
        self._ids = itertools.count()
        self._waiting: collections.deque[_Ticket] = collections.deque()
        self._group: _Group | None = None
        self._state: DecodeState | None = None
        self._places: list[_Ticket | None] = []  # of the state's rows
        self._rules: Rules | None = None  # of the state's rows; None when they have changed
        self._known: set = set()  # sizes that have been compiled
        self._cancelled: list[_Ticket] = []

    @property
    def busy(self) -> bool:
        """Whether a step has anything to do or to tell."""
        return bool(self._waiting or self._group or self._running() or self._cancelled)

    @property
    def waiting(self) -> int:
        """Requests of which nothing has been read."""
        return len(self._waiting)

    @property
    def running(self) -> int:
        """Requests that are being read or decoded."""
        return len(self._running()) + len(self._group.tickets if self._group else ())

    def add(self, request: Request, key: jax.Array | None = None) -> int:
        """Takes a request in; returns its number.

        Args:
          key: a PRNG key in place of that of the request's seed.

        Raises:
          ValueError: a prompt or stop tokens that are not the model's, one that is too long with
            its answer, thresholds for another number of exits or without a policy, or a request
            that samples where the session does not.
        """
        self.check(request)
        if key is None:
            key = jax.random.split(jax.random.key(request.seed), 1)[0]
        stop_ids = self._decoder.stop_ids if request.stop_ids is None else request.stop_ids
        ticket = _Ticket(next(self._ids), request, key, stop_ids)
        self._waiting.append(ticket)
        return ticket.id

    def warm(self) -> None:
        """Compiles the steps of all numbers of rows, so that no later request waits for it.

        Of a session that makes its own slots, those of the shortest requests.

        Raises:
          ValueError: requests are on their way already.
        """
        if self.busy:
            raise ValueError("warm a session before its first request")
        for size in self._sizes:
            for _ in range(size):
                self.add(Request([0], max_new_tokens=2))
            while self.busy:
                self.step(1, chunks=size)

    def check(self, request: Request) -> None:
        """Raises ValueError where `add` would; any thread may ask."""
        decoder, model = self._decoder, self._decoder.model
        check_prompts(model, [request.prompt], request.max_new_tokens)
        check_ids(model, request.stop_ids or (), "the stop tokens")
        if request.sampling.temperature and not self._draws:
            raise ValueError("this session is greedy; make one with draws=True")
        if request.thresholds is not None:
            if decoder.policy is None:
                raise ValueError("there is no policy whose thresholds a request could change")
            policies.make(request.thresholds, decoder.policy.confidence).check(
                model.exit_depths, model.confidences
            )
        needed = len(request.prompt) + request.max_new_tokens + decoder.mode.capacity - 1
        if self._slots is not None and needed > self._slots:
            raise ValueError(
                f"the prompt and its answer need {needed} slots, but the session has {self._slots}"
            )

    def cancel(self, id: int) -> bool:
        """Ends a request early; its last event comes with the next step. False if it has ended."""
        on_the_way = [*self._waiting, *(self._group.tickets if self._group else ())]
        for ticket in [*on_the_way, *(t for t in self._places if t)]:
            if ticket.id == id and not ticket.cancelled:
                ticket.cancelled = True
                self._cancelled.append(ticket)
                return True
        return False

    def step(self, steps: int = 4, *, chunks: int = 1) -> list[Event]:
        """Reads and decodes a little further; what each request that moved got.

        Args:
          steps: of decoding, at most; it ends earlier where rows have ended that others wait for.
          chunks: of waiting prompts, at most, that are read before; all if nothing runs.
        """
        told = self._drop_cancelled()
        left = chunks if self._running() else FOREVER
        while left > 0 and self._admit():
            left -= self._read(left)
        if self._running():
            self._decode(steps)
            told += self._tell()
        if not self._running():
            self._state, self._places = None, []  # and their memory
        elif not (self._waiting or self._group):
            self._shrink()
        return told

    def _running(self) -> list[int]:
        return [row for row, ticket in enumerate(self._places) if ticket is not None]

    def _drop_cancelled(self) -> list[Event]:
        dropped, self._cancelled = self._cancelled, []
        gone = set(map(id, dropped))
        self._waiting = collections.deque(t for t in self._waiting if id(t) not in gone)
        rows = [row for row in self._running() if id(self._places[row]) in gone]
        for row in rows:
            self._places[row] = None
        if self._group and all(ticket.cancelled for ticket in self._group.tickets):
            self._group = None
        if rows:
            finished_B = self._state.finished_B.at[jnp.array(rows)].set(True)
            self._state, self._rules = self._state.change(finished_B=finished_B), None
        return [Event(t.id, t.answer, t.told, CANCELLED) for t in dropped]

    def _admit(self) -> bool:
        """Whether prompts are being read: those that were, or the next that find a place."""
        places = min(self._sizes[-1] - len(self._running()), self._together, len(self._waiting))
        if self._group is not None or places <= 0:
            return self._group is not None
        tickets = [self._waiting.popleft() for _ in range(places)]
        # Always as many: others would be another program.
        chosen = [*tickets, *tickets[:1] * (self._together - places)]
        prompts = [ticket.request.prompt for ticket in chosen]
        state = self._decoder.empty(
            prompts,
            [ticket.request.max_new_tokens for ticket in chosen],
            jnp.stack([ticket.key for ticket in chosen]),
            self._slots or self._bucket(tickets),
        )
        state, read, taps = self._prefixes.begun(state, prompts)
        self._group = _Group(tickets, state, read, taps)
        return True

    def _read(self, chunks: int) -> int:
        """Reads the group further; it joins when it is through. Returns how many chunks it took."""
        group, size = self._group, self._chunk
        network = self._decoder.model.config
        longest = max(len(row_of(network, ticket.request.prompt)) for ticket in group.tickets)
        # What is kept of a prompt needs its taps after each chunk.
        chunks = min(chunks, -(-(longest - group.read) // size))
        chunks = 1 if self._prefixes.keeps and group.state.taps else int(chunks)
        tickets = [*group.tickets, *group.tickets[:1] * (self._together - len(group.tickets))]
        began = time.perf_counter()
        group.state = self._decoder.read(group.state, self._rules_of(tickets), chunks=chunks)
        taken = time.perf_counter() - began
        for ticket in group.tickets:
            ticket.prefill_seconds += taken
        group.read += chunks * size
        if self._prefixes.keeps:
            slot = (group.read - 1) % group.state.hidden_BWD.shape[1]
            group.taps[group.read] = {n: x[:, slot] for n, x in group.state.taps.items()}
        if group.read >= longest:
            self._group = None
            self._join(group)
        return chunks

    def _join(self, group: _Group) -> None:
        """Gives the prompts that were read rows of the batch."""
        for row, ticket in enumerate(group.tickets):
            self._prefixes.keep(ticket.request.prompt, group.state, row, group.taps)
        joining = {i: ticket for i, ticket in enumerate(group.tickets) if not ticket.cancelled}
        if not joining:
            return
        size = self._size(len(self._running()) + len(joining))
        if self._state is None:
            self._state = rows_of(group.state, jnp.zeros(size, jnp.int32), jnp.int32(0))
            self._places = [None] * size
        elif size > len(self._places):
            self._gather(size)
        slots = max(state.tokens_BS.shape[1] for state in (self._state, group.state))
        free = (row for row, place in enumerate(self._places) if place is None)
        rows = [len(self._places)] * self._together  # beyond it: forgotten
        for i, row in zip(joining, list(free), strict=False):
            rows[i], self._places[row] = row, joining[i]
        whole, part = self._fitted(self._state, slots), self._fitted(group.state, slots)
        self._state, self._rules = _insert(whole, part, jnp.array(rows)), None

    def _bucket(self, tickets: Sequence[_Ticket]) -> int:
        longest = max(ticket.positions for ticket in tickets)
        return caches.bucket(longest + self._decoder.mode.capacity - 1)

    def _size(self, rows: int) -> int:
        return next(size for size in self._sizes if size >= rows)

    def _shrink(self) -> None:
        """Gives back rows and slots that nobody needs."""
        running = [ticket for ticket in self._places if ticket]
        if self._size(len(running)) < len(self._places):
            self._gather(self._size(len(running)))
        self._state = self._fitted(self._state, self._slots or self._bucket(running))

    def _gather(self, size: int) -> None:
        """Makes the batch one of so many rows, those that are running first."""
        running = self._running()
        index = [*running, *[0] * (size - len(running))]
        self._state = rows_of(self._state, jnp.array(index), jnp.int32(len(running)))
        tickets = [self._places[row] for row in running]
        self._places = [*tickets, *[None] * (size - len(running))]
        self._rules = None

    def _fitted(self, state: DecodeState, slots: int) -> DecodeState:
        """A state with more slots, or fewer."""
        if state.tokens_BS.shape[1] == slots:
            return state
        decoder, batch = self._decoder, len(state.prompt_B)
        dtype = jax.tree.leaves(decoder.params["backbone"])[0].dtype
        how = {"mode": decoder.mode, "dtype": dtype, "slots": slots}
        prompts = [[0]] * batch
        shapes = jax.eval_shape(
            lambda key: initial_state(decoder.model, prompts, 1, key=key, **how), jax.random.key(0)
        )
        mesh = sharding.mesh_of(state)
        state = jax.tree.map(lambda x, shape: _cut_or_filled(x, shape.shape), state, shapes)
        return state if mesh is None else sharding.place(state, placed(state, mesh))

    def _rules_of(self, tickets: Sequence[_Ticket | None]) -> Rules:
        """What rows go by; those without a ticket by nothing that takes time."""
        policy = self._decoder.policy
        if policy is not None:
            own = [
                policy.thresholds
                if ticket is None or ticket.request.thresholds is None
                else ticket.request.thresholds
                for ticket in tickets
            ]
            thresholds_EB = jnp.asarray(np.array(own, np.float32).T)
            policy = dataclasses.replace(policy, thresholds=thresholds_EB)
        return Rules.of(
            policy,
            [ticket.stop_ids if ticket else () for ticket in tickets],
            [ticket.request.sampling if ticket else GREEDY for ticket in tickets],
            draws=self._draws,
        )

    def _decode(self, steps: int) -> None:
        running = self._running()
        if self._rules is None:
            self._rules = self._rules_of(self._places)
        joining = min(self._together, len(self._waiting)) or 1
        size = self._state.tokens_BS.shape, jax.tree.map(jnp.shape, self._rules)
        if str(size) not in self._known:  # compiled off the clock
            self._known.add(str(size))
            self._state = self._decoder.run(self._state, self._rules, steps=0)
        began = time.perf_counter()
        self._state = self._decoder.run(
            self._state,
            self._rules,
            steps=steps,
            finishing=len(self._places) - len(running) + joining,
        )
        taken = time.perf_counter() - began
        for row in running:
            self._places[row].seconds += taken

    def _tell(self) -> list[Event]:
        """What rows have got; those that have ended give their place away."""
        finished_B = sharding.fetch(self._state.finished_B)
        seconds = np.array([(t.seconds, t.prefill_seconds) if t else (0, 0) for t in self._places])
        answers = self._decoder.generations(self._state, *seconds.T)
        events = []
        for row in self._running():
            ticket, answer = self._places[row], answers[row]
            first, ticket.answer, ended = ticket.told, answer, None
            if finished_B[row]:
                ended = STOP if answer.tokens[-1] in ticket.stop_ids else LENGTH
                self._places[row], self._rules = None, None
            if ended or len(answer.tokens) > first:
                events.append(Event(ticket.id, answer, first, ended))
        return events


@functools.partial(jax.jit, donate_argnames="state")
@sharding.laid_out
def _insert(state: DecodeState, part: DecodeState, rows: jax.Array) -> DecodeState:
    """The batch with some rows replaced; those beyond it are left out."""
    put = functools.partial(jax.tree.map, lambda whole, new: whole.at[rows].set(new, mode="drop"))
    return in_place(put(state, part))


def _cut_or_filled(x: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """An array of another length along some axes; what is new is 0."""
    if x.shape == shape:
        return x
    x = x[tuple(slice(0, size) for size in shape)]
    return jnp.pad(x, [(0, size - had) for size, had in zip(shape, x.shape, strict=True)])
