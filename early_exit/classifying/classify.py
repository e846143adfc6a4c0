"""Classification at dynamic depth: rows that leave make room, the others go on together.

    stem → segment → exit → segment → exit → … → segment → readout

The one idea: a batch is as deep as its rows. Whoever leaves at an exit is gone, and the rest runs
in a smaller program (see `classifying.batch`); one row alone has a program with every segment in a
`lax.cond`. One program a segment and size of batch is all there can be, whatever leaves where.
"""

import dataclasses
from collections.abc import Iterator, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from early_exit import policy as policies
from early_exit import sharding
from early_exit.backbones import base
from early_exit.classifying.batch import Batch, Inputs, Programs, read
from early_exit.classifying.rows import Answers, unpacked
from early_exit.exits.multi_exit import MultiExit
from early_exit.policy import ExitPolicy


@dataclasses.dataclass(frozen=True)
class Classified:
    """The answers to N rows, in their order.

    Attributes:
      labels: int32 [N], the most probable class, also where the answer is withheld.
      exits: int32 [N], the exit that answered; E is the final one.
      depths: int [N], blocks run.
      scores: float32 [N], of the exit that answered, by the policy's confidence; −inf for a gate
        at the final exit, which has none.
      probabilities: float32 [N, C], of that exit, at the policy's temperature.
      abstained: bool [N], the answer is withheld (`ExitPolicy.reject`).
      padding: blocks that were run beside these for rows that only fill a bucket, in all.

    Example:
      >>> found = ee.classify(classifier, ["one text", "another"])
      >>> found.labels.shape, found.probabilities.shape
      ((2,), (2, 2))
    """

    labels: np.ndarray
    exits: np.ndarray
    depths: np.ndarray
    scores: np.ndarray
    probabilities: np.ndarray
    abstained: np.ndarray
    padding: int

    @classmethod
    def joined(cls, parts: Sequence["Classified"]) -> "Classified":
        """The answers of several calls, one behind the other."""
        names = [field.name for field in dataclasses.fields(cls) if field.name != "padding"]
        whole = {name: np.concatenate([getattr(part, name) for part in parts]) for name in names}
        return cls(**whole, padding=sum(part.padding for part in parts))


class Classifier:
    """Answers rows with a multi-exit classifier.

    A program takes about 0.1 ms a call beside what it computes, and for a batch there are one or
    more calls a segment: a network that takes the whole batch in a millisecond gains nothing by a
    policy. One row takes one call in any case.

    Args:
      policy: when rows leave; None runs the full model without consulting any exit.
      largest: the most rows that one program takes, a power of 2. Twice as many may wait in front
        of each segment, with their hidden states.

    Raises:
      ValueError: a language model, a policy that is not for this model, or another `largest`.
    """

    def __init__(
        self,
        model: MultiExit,
        params: base.Params,
        policy: ExitPolicy | None = None,
        *,
        largest: int = 256,
    ):
        if not model.config.classifies:
            raise ValueError("a language model classifies nothing; use decoding.generate")
        if largest < 1 or largest & (largest - 1):
            raise ValueError(f"largest must be a power of 2, not {largest}")
        if policy is not None:
            _check(policy, model)
        self._early = policy is not None
        policy = _uniform(policy or policies.never(len(model.exits.points)))
        if sharding.mesh_of(params) is None:
            params = jax.device_put(params)
        self._programs = Programs(model, params, policy, largest)

    @property
    def programs(self) -> int:
        """How many programs its calls have asked for; more than that were not compiled."""
        return len(self._programs.used)

    def __call__(self, inputs: Inputs, *, budget: float | None = None) -> Classified:
        """Classifies rows.

        Args:
          inputs: what the stem takes, every array [N, …] with the rows in front.
          budget: blocks that a row may take at most in the mean. It is kept whatever the scores: if
            more rows want to go on than what is left can pay the next segment for, the least sure
            do, and the others leave. Rows compete `largest` at a time; what some leave over is for
            the next.

        Raises:
          ValueError: inputs of different lengths, or a budget that does not reach the first exit.
        """
        inputs, count, kind = read(inputs)
        if count == 1 and budget is None:  # nothing to keep book of
            packed = self._programs.call_alone(kind, inputs, early=self._early)
            exits, answers = unpacked(packed)
            return self._classified(answers, exits, 0)
        batch = Batch(self._programs, inputs, count, kind, everyone=budget is not None)
        if budget is not None:
            batch.run_within(budget)
        elif self._early:
            batch.run()
        else:
            batch.run_whole()
        answers = batch.answers()
        batch.end()
        return self._classified(answers, batch.exits, batch.padding)

    def anytime(self, inputs: Inputs) -> Iterator[Classified]:
        """Yields what each exit answers, of all rows, shallow to deep; the full model comes last.

        Each step runs when it is asked for: when time is up, the newest is the best there is.

        Raises:
          ValueError: inputs of different lengths, or more than `largest` rows.
        """
        inputs, count, kind = read(inputs)
        if count > self._programs.largest:
            raise ValueError(
                f"{count} rows are too many to keep together; give at most "
                f"{self._programs.largest}, or make the classifier with a larger `largest`"
            )
        batch = Batch(self._programs, inputs, count, kind, everyone=True)
        for segment in range(batch.final + 1):
            rows, places, answers = batch.run_level(segment)
            batch.keep(segment, rows, answers)
            if segment < batch.final:
                batch.put(segment + 1, rows, places, np.zeros(count, bool))
            yield self._classified(batch.answers(), batch.exits.copy(), batch.padding)
        batch.end()

    def prepare(self, inputs: Inputs) -> None:
        """Compiles all programs that any number of rows like these can need.

        Args:
          inputs: at least one row, of which the first is run.
        """
        for power in range(self._programs.largest.bit_length()):
            rows = {name: np.repeat(x[:1], 1 << power, axis=0) for name, x in inputs.items()}
            if self._early:
                for _ in self.anytime(rows):
                    pass
            if power == 0 or not self._early:
                self(rows)

    def _classified(self, answers: Answers, exits: np.ndarray, padding: int) -> Classified:
        return Classified(
            labels=answers.labels,
            exits=exits,
            depths=self._programs.depths[exits],
            scores=answers.scores,
            probabilities=answers.probabilities,
            abstained=answers.abstained,
            padding=padding,
        )


def _check(policy: ExitPolicy, model: MultiExit) -> None:
    policy.check(model.exit_depths, model.confidences)
    if policy.budget is not None:
        raise ValueError(
            "the policy's budget is for the tokens of an answer; make the policy without, and call "
            "the classifier with budget="
        )


def _uniform(policy: ExitPolicy) -> ExitPolicy:
    """The same policy with nothing left out, so that all of one confidence share their programs."""
    exits = len(policy.thresholds)
    # A row is an answer of its own and always at its start, where a decay is but another threshold.
    thresholds = [policy.threshold(e, jnp.float32(0)) for e in range(exits)]
    return ExitPolicy(
        jnp.array(thresholds, jnp.float32),
        policy.confidence,
        temperatures=jnp.ones(exits + 1) if policy.temperatures is None else policy.temperatures,
        reject=jnp.float32(policies.ALWAYS if policy.reject is None else policy.reject),
    )
