"""One call of a classifier, seen by the host: which rows wait where, and which go next.

The one idea: the host learns from each exit who leaves, and runs those who stay in the smallest
bucket (1, 2, 4, … rows) that holds them, or in two smaller ones. Rows of different buckets meet in
front of deeper segments; what they carry stays on the device (see `classifying.rows`).
"""

import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np

from early_exit import sharding, tree
from early_exit.backbones import base
from early_exit.classifying.rows import (
    Answers,
    Rows,
    empty_pools,
    run_alone,
    run_segment,
    run_whole,
)
from early_exit.exits.multi_exit import MultiExit
from early_exit.policy import ExitPolicy

Inputs = Mapping[str, np.ndarray]

# Of at most so many bytes, parameters are constants of the programs for one row: handing them over
# takes 0.1 ms for 200 arrays, and far more blocks than these bytes make take no longer. Of 30 MB it
# saves less than a tenth of the time, and programs compile for twice as long.
CONSTANTS = 8 << 20


class Programs:
    """The programs of a model, its parameters and a policy, and the pools that they work on.

    Attributes:
      depths: int [E + 1], blocks run at each exit.
      consults: for each early exit, whether rows can leave there.
      used: every program that has been called, by its name and what its shapes follow from.
    """

    def __init__(self, model: MultiExit, params: base.Params, policy: ExitPolicy, largest: int):
        self.model, self.params, self.policy, self.largest = model, params, policy, largest
        self.depths = model.exit_depths
        self.consults = [bool(policy.consults(e)) for e in range(len(model.exits.points))]
        self.used: set[tuple] = set()
        self._pools: dict[tuple, list[list[Rows | None]]] = {}
        on_mesh = sharding.mesh_of(params) is not None
        self._constant = not on_mesh and tree.size_in_bytes(params) <= CONSTANTS
        self._alone: Callable | None = None

    def call(self, program, kind: tuple, bucket: int, *args, **static) -> Any:
        """What a program of `classifying.rows` returns."""
        self.used.add((program.__name__, kind, bucket, *static.values()))
        return program(self.params, self.policy, *args, model=self.model, **static)

    def call_alone(self, kind: tuple, inputs: Inputs, *, early: bool) -> jax.Array:
        """What `run_alone` returns."""
        if not self._constant:
            return self.call(run_alone, kind, 1, inputs, early=early)
        self.used.add((run_alone.__name__, kind, 1, early))
        if self._alone is None:
            # Not of `run_alone` itself: there, constants would be arguments again.
            given = functools.partial(run_alone.__wrapped__, self.params, self.policy)
            self._alone = jax.jit(functools.partial(given, model=self.model, early=early))
        return self._alone(inputs)

    def borrow(self, kind: tuple, inputs: Inputs) -> list[Rows | None]:
        """Pools for one batch; another that is under way meanwhile has its own."""
        if spare := self._pools.get(kind):
            return spare.pop()
        one = {name: x[:1] for name, x in inputs.items()}
        # Less than the largest bucket waits when at most as many come.
        size = 2 * self.largest
        return empty_pools(self.params, self.policy, one, model=self.model, size=size)

    def give_back(self, kind: tuple, pools: list[Rows | None]) -> None:
        self._pools.setdefault(kind, []).append(pools)


def read(inputs: Inputs) -> tuple[Inputs, int, tuple]:
    """(the inputs in numpy, how many rows they have, what tells them from rows of another kind).

    Raises:
      ValueError: no rows, or not the same number in all.
    """
    inputs = {name: np.asarray(x) for name, x in inputs.items()}
    counts = {name: len(x) for name, x in inputs.items()}
    if len(set(counts.values())) != 1 or not min(counts.values()):
        raise ValueError(
            f"all inputs need the same number of rows, at least one; they have {counts}"
        )
    kind = tuple((name, x.shape[1:], x.dtype.str) for name, x in sorted(inputs.items()))
    return inputs, next(iter(counts.values())), kind


def fetched(answers: Answers, count: int = 1) -> Answers:
    """The answers to the first rows, in numpy."""
    leaves, structure = jax.tree.flatten(answers)
    return jax.tree.unflatten(structure, [sharding.whole(x)[:count] for x in leaves])


@functools.lru_cache(maxsize=4096)
def first_bucket(count: int) -> tuple[int, int]:
    """(the bucket that so many rows best begin with, what they take in all).

    Counted are the rows of the buckets and the calls: one more call has to save more than a row.
    (For a ResNet-32 of width 8 on two cores a call is worth anything from 1 to 12 rows.)
    """
    above = 1 << (count - 1).bit_length()
    if above == count:
        return above, above + 1
    below = above // 2
    rest = first_bucket(count - below)[1]
    return min((above, above + 1), (below, below + 1 + rest), key=lambda way: way[1])


class Batch:
    """Rows on their way, and what has been answered.

    Attributes:
      exits: int32 [N], where each row was answered; the final exit until then.
      padding: blocks run for rows that only fill a bucket.
    """

    def __init__(
        self, programs: Programs, inputs: Inputs, count: int, kind: tuple, everyone: bool = False
    ):
        """
        Args:
          inputs, count, kind: from `read`.
          everyone: whether heads answer rows that cannot leave, too.
        """
        self.programs, self.inputs, self.count, self.kind = programs, inputs, count, kind
        self.everyone = everyone
        self.blocks = np.diff(programs.depths, prepend=0)
        self.final = len(self.blocks) - 1
        # In front of each segment: which rows wait, and where in its pool; inputs are in none.
        nobody = np.zeros(0, int)
        self.waiting = [np.arange(count)] + [nobody] * self.final
        self.places = [np.zeros(count, int)] + [nobody] * self.final
        self.free = np.ones((self.final + 1, 2 * programs.largest), bool)
        self.pools: list[Rows | None] | None = None
        self.padding = 0
        self.exits = np.full(count, self.final, np.int32)
        self._answers = Answers(
            labels=np.zeros(count, np.int32),
            scores=np.zeros(count, np.float32),
            probabilities=np.zeros((count, programs.model.config.num_classes), np.float32),
            abstained=np.zeros(count, bool),
            leaves=np.zeros(count, bool),
        )
        self._ending: list[tuple[np.ndarray, Answers]] = []  # perhaps still being computed

    def run(self) -> None:
        """All rows to their exits; deep segments run as soon as they fill the largest bucket."""
        while some := [e for e, rows in enumerate(self.waiting) if len(rows)]:
            full = [e for e in some if e and len(self.waiting[e]) >= self.programs.largest]
            segment = full[-1] if full else some[0]
            rows, places, answers = self.run_bucket(segment)
            if segment == self.final:
                self._ending.append((rows, answers))
                continue
            leaves = np.zeros(len(rows), bool)
            if self.programs.consults[segment]:
                answers = fetched(answers, len(rows))
                leaves = answers.leaves
                self.keep(segment, rows, answers, leaves)
            self.put(segment + 1, rows, places, leaves)

    def run_within(self, budget: float) -> None:
        """All rows to their exits, at no more than so many blocks a row in the mean."""
        if budget < self.blocks[0]:
            raise ValueError(
                f"a budget of {budget:g} blocks per row cannot be kept: the first exit stands "
                f"after block {self.blocks[0]}; raise it, or add an earlier exit"
            )
        coming, left = self.waiting[0], 0.0
        while len(coming):
            self.waiting[0], coming = np.split(coming, [self.programs.largest])
            left += budget * len(self.waiting[0])
            for segment in range(self.final + 1):
                if not len(self.waiting[segment]):
                    break
                left -= self.blocks[segment] * len(self.waiting[segment])
                rows, places, answers = self.run_level(segment)
                leaves = answers.leaves
                if segment < self.final:
                    going = min((~leaves).sum(), int(left // self.blocks[segment + 1]))
                    unsure = np.argsort(np.where(leaves, np.inf, answers.scores), kind="stable")
                    leaves = np.ones(len(rows), bool)
                    leaves[unsure[:going]] = False
                    self.put(segment + 1, rows, places, leaves)
                self.keep(segment, rows, answers, leaves)

    def run_whole(self) -> None:
        """All rows through the full model."""
        while len(self.waiting[0]):
            rows, _, bucket = self._take(0)
            self.padding += (bucket - len(rows)) * int(self.blocks.sum())
            inputs = self._inputs_of(rows, bucket)
            answers = self.programs.call(run_whole, self.kind, bucket, inputs)
            self._ending.append((rows, answers))

    def run_level(self, segment: int) -> tuple[np.ndarray, np.ndarray, Answers]:
        """`run_bucket` for all rows that wait in front of a segment; the answers in numpy."""
        done = []
        while len(self.waiting[segment]):
            rows, places, answers = self.run_bucket(segment)
            done.append((rows, places, fetched(answers, len(rows))))
        return jax.tree.map(lambda *parts: np.concatenate(parts), *done)

    def run_bucket(self, segment: int) -> tuple[np.ndarray, np.ndarray, Answers]:
        """Runs a segment, and the exit behind it, on a bucket of the rows that wait.

        Returns:
          (which rows; where they are in the next pool, until `put` says who stays; the answers to
          them, and behind these to what fills the bucket, on the device).
        """
        rows, places, bucket = self._take(segment)
        self.padding += (bucket - len(rows)) * int(self.blocks[segment])
        if self.pools is None:
            self.pools = self.programs.borrow(self.kind, self.inputs)
        source = self.pools[segment] if segment else self._inputs_of(rows, bucket)
        there, beyond, into = np.zeros(len(rows), int), None, None
        if segment < self.final:
            free = self.free[segment + 1]
            there = np.flatnonzero(free)[: len(rows)]
            free[there] = False
            beyond, into = self.pools[segment + 1], _filled(there, bucket, len(free))
        beyond, answers = self.programs.call(
            run_segment,
            self.kind,
            bucket,
            source,
            _filled(places, bucket, places[0]),
            beyond,
            into,
            self.everyone,
            segment=segment,
        )
        if segment < self.final:
            self.pools[segment + 1] = beyond
        return rows, there, answers

    def keep(self, segment: int, rows, answers: Answers, which=slice(None)) -> None:
        """The exit behind a segment answers some of these rows."""
        self.exits[rows[which]] = segment
        for mine, new in zip(*map(jax.tree.leaves, (self._answers, answers)), strict=True):
            mine[rows[which]] = new[which]

    def put(self, segment: int, rows, places, leaves: np.ndarray) -> None:
        """Rows that do not leave wait in front of a segment."""
        self.free[segment][places[leaves]] = True
        self.waiting[segment] = np.append(self.waiting[segment], rows[~leaves])
        self.places[segment] = np.append(self.places[segment], places[~leaves])

    def answers(self) -> Answers:
        """All that is known so far."""
        while self._ending:
            rows, answers = self._ending.pop()
            self.keep(self.final, rows, fetched(answers, len(rows)))
        return jax.tree.map(np.copy, self._answers)

    def end(self) -> None:
        """When no row waits any more."""
        if self.pools is not None:
            self.programs.give_back(self.kind, self.pools)

    def _take(self, segment: int) -> tuple[np.ndarray, np.ndarray, int]:
        """(rows that wait, where they do, the bucket to run them in)."""
        count, largest = len(self.waiting[segment]), self.programs.largest
        bucket = largest if count >= largest else first_bucket(count)[0]
        rows, self.waiting[segment] = np.split(self.waiting[segment], [bucket])
        places, self.places[segment] = np.split(self.places[segment], [bucket])
        self.free[segment][places] = True
        return rows, places, bucket

    def _inputs_of(self, rows: np.ndarray, bucket: int) -> Inputs:
        """Inputs of neighbouring rows, the last of them again and again to fill the bucket."""
        found = {name: x[rows[0] : rows[-1] + 1] for name, x in self.inputs.items()}
        if len(rows) == bucket:
            return found
        more = bucket - len(rows)
        return {
            name: np.concatenate([x, np.repeat(x[-1:], more, axis=0)]) for name, x in found.items()
        }


def _filled(places: np.ndarray, bucket: int, filling: int) -> np.ndarray:
    """int32 [bucket]."""
    found = np.full(bucket, filling, np.int32)
    found[: len(places)] = places
    return found
