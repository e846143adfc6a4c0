"""The programs of dynamic-depth classification: what is done to a bucket of rows on the device.

The one idea: rows wait in front of each segment in a pool of fixed shape. A program gathers some of
them from one pool, runs the segment and the exit behind it, and puts them into the next pool, in
place. So its shape depends on how many rows it takes, and on nothing that became of rows before.
"""

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from early_exit import consult, precision, sharding
from early_exit.backbones import base
from early_exit.consult import Said
from early_exit.exits.multi_exit import Bound, MultiExit
from early_exit.policy import ExitPolicy


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Rows:
    """What rows carry from a segment to the next; every array has an axis of rows in front.

    Attributes:
      hidden: the hidden states after the segment before.
      context: what the stem made beside them for the blocks.
      earlier: float32 [rows, C], the logits of each head passed; None where no other head reads
        them.
      said: what the exits passed have said, [rows].
    """

    hidden: jax.Array
    context: Any
    earlier: tuple[jax.Array | None, ...]
    said: Said


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Answers:
    """What an exit says of b rows.

    Attributes:
      labels: int32 [b].
      scores: float32 [b], by the policy's confidence.
      probabilities: float32 [b, C].
      abstained: bool [b], the final exit withholds its answer.
      leaves: bool [b], whether a row leaves here; if not, its answer may be missing (zeros).
    """

    labels: jax.Array
    scores: jax.Array
    probabilities: jax.Array
    abstained: jax.Array
    leaves: jax.Array


@dataclasses.dataclass(frozen=True)
class _Network:
    """A model with its parameters and a policy, inside a program."""

    model: MultiExit
    bound: Bound
    policy: ExitPolicy

    @classmethod
    def of(cls, model: MultiExit, params: base.Params, policy: ExitPolicy) -> "_Network":
        return cls(model, model.bind(params), policy)

    @property
    def final(self) -> int:
        return len(self.model.exits.points)

    def start(self, inputs: Mapping[str, jax.Array]) -> Rows:
        hidden, context = self.bound.backbone.stem(inputs)
        return Rows(hidden, context, (), Said.nothing((len(hidden),)))

    def advance(self, rows: Rows, segment: int) -> Rows:
        start, stop = self.model.segments[segment]
        hidden = self.bound.backbone.run_blocks(rows.hidden, start, stop, rows.context)
        return dataclasses.replace(rows, hidden=hidden)

    def consult(self, rows: Rows, e: int, everyone: jax.Array) -> tuple[Rows, Answers]:
        """Who leaves at an early exit, and with what answer; nothing is run without need.

        Args:
          everyone: bool scalar, whether to score and answer rows that cannot leave here, too.
        """
        needed, score = everyone | self.policy.consults(e), None
        if self.policy.confidence == "gate":
            score = jax.lax.cond(
                needed,
                lambda: self._hidden_score(rows, e),
                lambda: jnp.full(len(rows.hidden), -jnp.inf),
            )
            needed = everyone | self._leaves(e, score).any()
        chained = self.model.exits.cascade or self.model.exits.ensemble
        if chained:  # a head further on reads this one's logits
            for further in range(e + 1, self.final):
                needed |= self.policy.consults(further)

        def ask():
            own = self.bound.exit_logits(e, rows.hidden, rows.context, rows.earlier)
            return own, self.bound.answer((*rows.earlier, own))

        nothing = jnp.zeros((len(rows.hidden), self.model.config.num_classes))
        own, answer = jax.lax.cond(needed, ask, lambda: (nothing, nothing))
        answers, said = self._answers(rows, e, answer, score)
        rows = dataclasses.replace(
            rows,
            earlier=(*rows.earlier, own if chained else None),
            said=said,
        )
        return rows, dataclasses.replace(answers, leaves=self._leaves(e, answers.scores))

    def conclude(self, rows: Rows) -> Answers:
        """The final exit's answers."""
        score = None
        if self.policy.confidence == "gate":
            score = self._hidden_score(rows, self.final)
        answer = self.bound.backbone.readout(rows.hidden, rows.context)
        answers, _ = self._answers(rows, self.final, answer, score)
        return dataclasses.replace(answers, abstained=self.policy.abstains(answers.scores))

    def _hidden_score(self, rows: Rows, e: int) -> jax.Array:
        return consult.hidden_score(
            self.policy.confidence, self.bound, e, rows.hidden, rows.hidden, rows.context
        )

    def _leaves(self, e: int, score: jax.Array) -> jax.Array:
        return self.policy.leaves(e, score, jnp.zeros_like(score))

    def _answers(self, rows: Rows, e: int, logits: jax.Array, score: jax.Array | None):
        """(the answers that logits [b, C] give, what has been said with them)."""
        summary, said = consult.hear(logits, rows.said, e, self.policy)
        if score is None:
            score = consult.score(self.policy.confidence, summary, said)
        yes = jnp.ones(len(logits), bool)
        probabilities = jax.nn.softmax(self.policy.tempered(e, logits))
        return Answers(summary.prediction, score, probabilities, ~yes, yes), said


@functools.partial(jax.jit, static_argnames=("model", "segment"), donate_argnames="beyond")
@precision.exact
@sharding.laid_out
def run_segment(
    params, policy, source, chosen, beyond, places, everyone, *, model: MultiExit, segment: int
) -> tuple[Rows | None, Answers]:
    """One segment on a bucket of b rows, and the exit behind it.

    Args:
      source: the inputs [b, …] for the first segment, else the pool `Rows` [P, …] in front of it.
      chosen: int32 [b], which rows of the pool to run; not looked at in the first segment.
      beyond: the pool in front of the next segment, which is given up; None for the last.
      places: int32 [b], where in `beyond` to put each row; P for nowhere.
      everyone: bool scalar, see `_Network.consult`.

    Returns:
      (`beyond` with these rows, what the exit says).
    """
    network = _Network.of(model, params, policy)
    if segment == 0:
        rows = network.start(jax.tree.map(sharding.by_row, source))
    else:
        rows = jax.tree.map(lambda x: x.at[chosen].get(mode="promise_in_bounds"), source)
    rows = network.advance(jax.tree.map(sharding.by_row, rows), segment)
    if segment == network.final:
        return None, network.conclude(rows)
    rows, answers = network.consult(rows, segment, everyone)
    beyond = jax.tree.map(lambda x, new: x.at[places].set(new, mode="drop"), beyond, rows)
    return sharding.everywhere(beyond), answers


@functools.partial(jax.jit, static_argnames=("model", "early"))
@precision.exact
@sharding.laid_out
def run_alone(params, policy, inputs, *, model: MultiExit, early: bool) -> jax.Array:
    """One row to its exit without asking the host: float32 [C + 4], for `unpacked`.

    Args:
      early: whether it may leave before the end; if not, no other exit is consulted.
    """
    network = _Network.of(model, params, policy)

    def packed(segment: int, answers: Answers) -> jax.Array:
        # Each branch hands on what it returns, array by array, for some microseconds each.
        label, score, withheld = answers.labels, answers.scores, answers.abstained
        numbers = [x.astype(jnp.float32) for x in (label, score, withheld)]
        return jnp.concatenate([answers.probabilities[0], *numbers, jnp.float32([segment])])

    # A function of its own keeps the weights that are constants; else branch hands them to branch.
    @functools.partial(jax.jit, static_argnames="segment")
    def onwards(rows: Rows, segment: int):
        rows = network.advance(rows, segment)
        if segment == network.final:
            return packed(segment, network.conclude(rows))
        if not early:
            return onwards(rows, segment + 1)
        rows, answers = network.consult(rows, segment, jnp.bool_(False))
        return jax.lax.cond(
            answers.leaves[0],
            lambda: packed(segment, answers),
            lambda: onwards(rows, segment + 1),
        )

    return sharding.everywhere(onwards(network.start(inputs), 0))


def unpacked(packed: jax.Array) -> tuple[np.ndarray, Answers]:
    """(int32 [1], the exit that answered; its answer, in numpy) from what `run_alone` returns."""
    probabilities, (label, score, withheld, segment) = np.split(np.asarray(packed), [-4])
    answers = Answers(
        labels=np.array([label], np.int32),
        scores=np.array([score]),
        probabilities=probabilities[None],
        abstained=np.array([withheld > 0]),
        leaves=np.ones(1, bool),
    )
    return np.array([segment], np.int32), answers


@functools.partial(jax.jit, static_argnames="model")
@precision.exact
@sharding.laid_out
def run_whole(params, policy, inputs, *, model: MultiExit) -> Answers:
    """All rows to the final exit, no other being consulted."""
    network = _Network.of(model, params, policy)
    rows = network.start(jax.tree.map(sharding.by_row, inputs))
    for segment in range(network.final + 1):
        rows = network.advance(rows, segment)
    return network.conclude(rows)


def _of_pools(params) -> jax.sharding.Sharding:
    mesh = sharding.mesh_of(params)
    if mesh is not None:
        return sharding.replicated(mesh)
    return jax.sharding.SingleDeviceSharding(*jax.tree.leaves(params)[0].devices())


def empty_pools(params, policy, inputs, *, model: MultiExit, size: int) -> list[Rows | None]:
    """Empty pools of so many rows in front of all segments; None for the first.

    They are committed to a device, as the programs return them: else each would compile twice. On a
    mesh, each device has all of them, and buckets are split (`sharding.by_row`): who is in the next
    bucket is not known before.
    """

    def between(params, inputs):
        network = _Network.of(model, params, policy)
        rows, found = network.start(inputs), [None]
        for e in range(network.final):
            rows, _ = network.consult(network.advance(rows, e), e, jnp.bool_(True))
            found.append(rows)
        return found

    where = _of_pools(params)
    return jax.tree.map(
        lambda x: jnp.zeros((size, *x.shape[1:]), x.dtype, device=where),
        jax.eval_shape(between, params, inputs),
    )
