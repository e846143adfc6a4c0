"""When to leave: a score and a threshold per exit, the same in decoding and in evaluation.

The one idea: a policy is a small pytree (its thresholds are arrays, so changing them never
recompiles) and a small JSON file that says where they came from.
"""

import dataclasses
import functools
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from early_exit import confidence as confidences
from early_exit.storage import files

NEVER, ALWAYS = float("inf"), float("-inf")


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class DraftPolicy:
    """What the steps of a recurrent exit's chains are worth, by their scores; K steps.

    Attributes:
      thresholds_K: float32. Where drafts stand unchecked, a chain ends before the first draft whose
        score is below its step's; inf drafts nothing.
      stands_KN: float32, how often a draft stands if those before it do, by step and by which of N
        equal parts of [0, 1] its score lies in: what verified decoding weighs.
      confidence: which score (`confidence.FROM_LOGITS`, patience excepted).
    """

    thresholds_K: jax.Array
    stands_KN: jax.Array
    confidence: str = dataclasses.field(default="max_prob", metadata={"static": True})

    def leaves(self, step: jax.Array, score: jax.Array) -> jax.Array:
        """Whether drafts of a step (from 0; the last for later ones) with this score stand."""
        return score >= self.thresholds_K[jnp.minimum(step, len(self.thresholds_K) - 1)]

    def stands(self, step: jax.Array, score: jax.Array) -> jax.Array:
        """How likely they are what the full model says, float32 like the score."""
        steps, parts = self.stands_KN.shape
        part = jnp.clip(jnp.floor(score * parts), 0, parts - 1).astype(jnp.int32)
        return self.stands_KN[jnp.minimum(step, steps - 1)][part]


@dataclasses.dataclass(frozen=True)
class ExitPolicy:
    """Leave at the first exit whose score reaches its threshold.

    Attributes:
      thresholds: float32 [E], in the units of the score; inf never leaves, −inf always does.
      confidence: which score (`confidence.names`).
      decay: float32 scalar τ, or None for thresholds that stay. With it, a threshold λ falls over
        an answer: clip(0.9·λ + 0.1·exp(−τ·t/N), 0, 1) at token t of at most N (Schuster et al.
        2022, CALM, eq. 5; its published code scales λ itself by 0.9 + 0.1·exp(−τ·t/N) instead).
      budget: float32 scalar, blocks per token, or None. What a token leaves over is saved for later
        ones; a position leaves, whatever its score, where the next exit is beyond the savings.
      temperatures: float32 [E + 1], or None for ones: what each exit's logits, the final one's
        last, are divided by before they are scored. What is predicted does not change.
      reject: float32 scalar, or None: the final exit's score below which its answer is withheld.
      drafts: of the chains of a recurrent exit, or None.
      provenance: how the thresholds were chosen; kept in the file, not in the pytree.

    Example:
      >>> policy = ee.make_policy([0.9, float("inf")])  # the second exit takes nothing
      >>> policy.exit_index(np.array([[0.95, 0.5], [0.99, 0.99]]), np.array([2, 4, 6])).tolist()
      [0, 2]
    """

    thresholds: jax.Array
    confidence: str = "max_prob"
    decay: jax.Array | None = None
    budget: jax.Array | None = None
    temperatures: jax.Array | None = None
    reject: jax.Array | None = None
    drafts: DraftPolicy | None = None
    provenance: Mapping[str, Any] = dataclasses.field(default_factory=dict, compare=False)

    def threshold(self, exit_index: int, progress: jax.Array) -> jax.Array:
        """An exit's threshold [...] at `progress` t/N in [0, 1] through the answer."""
        fixed = self.thresholds[exit_index]
        if self.decay is None:
            return jnp.broadcast_to(fixed, jnp.shape(progress))
        falling = jnp.clip(0.9 * fixed + 0.1 * jnp.exp(-self.decay * progress), 0, 1)
        return jnp.where(jnp.isfinite(fixed), falling, fixed)

    def leaves(self, exit_index: int, score: jax.Array, progress: jax.Array) -> jax.Array:
        """Whether a position with this score [...] leaves at this exit: bool [...]."""
        return score >= self.threshold(exit_index, progress)

    def tempered(self, exit_index: int, logits: jax.Array) -> jax.Array:
        """An exit's logits [..., C] as they are to be scored."""
        return logits if self.temperatures is None else logits / self.temperatures[exit_index]

    def abstains(self, score: jax.Array) -> jax.Array:
        """Whether the final exit, with this score [...], withholds its answer: bool [...]."""
        if self.reject is None:
            return jnp.zeros(jnp.shape(score), bool)
        return score < self.reject

    def overdrawn(self, account: jax.Array, next_depth: int) -> jax.Array:
        """Whether the savings [...] forbid going on to the exit after `next_depth` blocks."""
        if self.budget is None:
            return jnp.zeros(jnp.shape(account), bool)
        return account + self.budget < next_depth

    def charged(self, account: jax.Array, depth: int) -> jax.Array:
        """The savings [...] after a token that took so many blocks."""
        return account if self.budget is None else account + self.budget - depth

    def consults(self, exit_index: int) -> jax.Array:
        """Whether the head here need be evaluated for its score; not where no score leaves."""
        needed = self.confidence == "patience"  # a head left out would break the row of agreements
        return needed | (self.thresholds[exit_index] < NEVER)

    def exit_index(
        self,
        scores_EN: np.ndarray,
        exit_depths: np.ndarray,
        progress_N: np.ndarray | None = None,
    ) -> np.ndarray:
        """Where positions with these scores leave, int [N]; E is the final exit.

        Args:
          scores_EN: further rows, such as the final exit's scores, are not looked at.
          exit_depths: int [E + 1], blocks run at each exit.
          progress_N: how far through its answer each position is; 0 if not given. With a budget,
            the positions are taken as one answer, in order.
        """
        scores_EN = scores_EN[: len(self.thresholds)]
        if self.decay is None and self.budget is None:  # nothing to compile for every size
            return first_exit(np.asarray(scores_EN), np.asarray(self.thresholds))
        scores_EN = jnp.asarray(scores_EN)
        progress_N = jnp.zeros(scores_EN.shape[1]) if progress_N is None else progress_N
        depths = tuple(int(depth) for depth in exit_depths)
        return np.asarray(_exit_index(self, scores_EN, jnp.asarray(progress_N), depths))

    def check(self, exit_depths: np.ndarray, scores: Sequence[str] | None = None) -> None:
        """Raises ValueError where the policy does not fit a model.

        Args:
          exit_depths: int [E + 1], blocks run at each of the model's exits.
          scores: the confidences that its exits have (`MultiExit.confidences`); all by default.
        """
        scores = confidences.names() if scores is None else scores
        (found,) = self.thresholds.shape
        if found != len(exit_depths) - 1:
            raise ValueError(
                f"the policy has {found} thresholds but the model has {len(exit_depths) - 1} "
                "exits; calibrate this model, or name its own policy"
            )
        if self.confidence not in scores:
            raise ValueError(
                f"the policy scores by {self.confidence}, which the exits of this model do not "
                f"have; fit it for one of {', '.join(scores)}"
            )
        if self.budget is not None and self.budget < exit_depths[0]:
            raise ValueError(
                f"a budget of {float(self.budget):g} blocks per token cannot be kept: the first "
                f"exit stands after block {exit_depths[0]}; raise it, or add an earlier exit"
            )


jax.tree_util.register_dataclass(
    ExitPolicy,
    data_fields=["thresholds", "decay", "budget", "temperatures", "reject", "drafts"],
    meta_fields=["confidence"],
    drop_fields=["provenance"],
)


def first_exit(scores_EN, thresholds_E):
    """The first exit whose score reaches its threshold, int32 [N]; E where none does.

    Args:
      scores_EN: float [E, N], of numpy or of jax, as is what is returned.
      thresholds_E: a threshold for each exit, or one for each of its positions [N].
    """
    xp = scores_EN.__array_namespace__()
    exits_N = xp.full(scores_EN.shape[1], len(scores_EN), dtype=xp.int32)
    for e in reversed(range(len(scores_EN))):
        exits_N = xp.where(scores_EN[e] >= thresholds_E[e], xp.int32(e), exits_N)
    return exits_N


@functools.partial(jax.jit, static_argnames="depths")
def _exit_index(policy: ExitPolicy, scores_EN, progress_N, depths: tuple[int, ...]) -> jax.Array:
    thresholds = [policy.threshold(e, progress_N) for e in range(len(scores_EN))]
    if policy.budget is None:
        return first_exit(scores_EN, thresholds)
    leaves_EN = [score >= limit for score, limit in zip(scores_EN, thresholds, strict=True)]
    leaves_EN = jnp.stack([*leaves_EN, jnp.ones(scores_EN.shape[1], bool)])

    def one(account, leaves_E):
        must = [policy.overdrawn(account, depth) for depth in depths[1:]]
        exit_index = jnp.argmax(leaves_E | jnp.stack([*must, True]))
        return policy.charged(account, jnp.array(depths)[exit_index]), exit_index

    return jax.lax.scan(one, jnp.float32(0), leaves_EN.T)[1]


def make(
    thresholds: Sequence[float] | np.ndarray,
    confidence: str = "max_prob",
    *,
    decay: float | None = None,
    budget: float | None = None,
    temperatures: Sequence[float] | np.ndarray | None = None,
    reject: float | None = None,
    drafts: DraftPolicy | None = None,
    **provenance: Any,
) -> ExitPolicy:
    """A policy from plain numbers.

    Args:
      thresholds: E numbers.
      confidence, decay, budget, temperatures, reject, drafts: see `ExitPolicy`.
      provenance: whatever is to stand in its file.

    Example:
      >>> ee.make_policy([0.9, 0.8], "margin").confidence
      'margin'

    Raises:
      ValueError: unknown confidence, a threshold that is not a number, a decay, budget or
        temperature that is not positive, a decay of scores that are no probabilities, or a
        rejection by a score that the final exit does not have.
    """
    if confidence not in confidences.names():
        known = ", ".join(confidences.names())
        raise ValueError(f"unknown confidence {confidence!r}; choose one of {known}")
    thresholds = np.asarray(thresholds, np.float32)
    if thresholds.ndim != 1 or np.isnan(thresholds).any():
        raise ValueError(f"thresholds must be one number per exit, not {thresholds}")
    for name, value in (("decay", decay), ("budget", budget)):
        if value is not None and not 0 < value < NEVER:
            raise ValueError(f"{name} must be a positive number, not {value}")
    if decay is not None and confidence == "patience":
        raise ValueError("patience counts heads; a decay is for scores between 0 and 1")
    if temperatures is not None:
        temperatures = np.asarray(temperatures, np.float32)
        if temperatures.shape != (len(thresholds) + 1,):
            raise ValueError(
                f"temperatures must be {len(thresholds) + 1} numbers, one per exit and one for the "
                f"final exit, not {temperatures}"
            )
        if not ((temperatures > 0) & (temperatures < NEVER)).all():
            raise ValueError(f"temperatures must be positive numbers, not {temperatures}")
        temperatures = jnp.asarray(temperatures)
    if reject is not None:
        if np.isnan(reject):
            raise ValueError("reject must be a number, not nan")
        if confidence == "gate":
            raise ValueError("the final exit has no gate to reject by; use another confidence")
    return ExitPolicy(
        jnp.asarray(thresholds),
        confidence,
        None if decay is None else jnp.float32(decay),
        None if budget is None else jnp.float32(budget),
        temperatures,
        None if reject is None else jnp.float32(reject),
        drafts,
        provenance,
    )


def never(exits: int, confidence: str = "max_prob") -> ExitPolicy:
    """Runs every block for every position."""
    return make([NEVER] * exits, confidence)


def forced(exits: int, exit_index: int, confidence: str = "max_prob") -> ExitPolicy:
    """Every position leaves at one exit; the heads before it are not evaluated."""
    return make([ALWAYS if e == exit_index else NEVER for e in range(exits)], confidence)


def patient(exits: int, patience: int) -> ExitPolicy:
    """Leave where `patience` heads in a row, before this one, predicted the same (PABEE)."""
    return make([patience] * exits, "patience")


_WORDS = {NEVER: "never", ALWAYS: "always"}


def as_json(policy: ExitPolicy) -> dict[str, Any]:
    """What a policy is and where it came from, for a JSON file."""

    def numbers(array):
        return None if array is None else np.asarray(array).astype(float).tolist()

    def worded(value):
        return _WORDS.get(value, value)

    return {
        "confidence": policy.confidence,
        "thresholds": list(map(worded, numbers(policy.thresholds))),
        "decay": numbers(policy.decay),
        "budget": numbers(policy.budget),
        "temperatures": numbers(policy.temperatures),
        "reject": worded(numbers(policy.reject)),
        "drafts": policy.drafts
        and {
            "confidence": policy.drafts.confidence,
            "thresholds": list(map(worded, numbers(policy.drafts.thresholds_K))),
            "stands": numbers(policy.drafts.stands_KN),
        },
        "provenance": dict(policy.provenance),
    }


def from_json(fields: Mapping[str, Any]) -> ExitPolicy:
    """The policy that `as_json` has told.

    Raises:
      KeyError, TypeError, ValueError: it is none.
    """
    words = {word: value for value, word in _WORDS.items()}
    reject = fields["reject"]
    drafts = fields.get("drafts")  # earlier versions had none
    if drafts is not None:
        drafts = DraftPolicy(
            jnp.asarray([float(words.get(x, x)) for x in drafts["thresholds"]], jnp.float32),
            jnp.asarray(drafts["stands"], jnp.float32),
            drafts["confidence"],
        )
    return make(
        [float(words.get(x, x)) for x in fields["thresholds"]],
        fields["confidence"],
        decay=fields["decay"],
        budget=fields["budget"],
        temperatures=fields["temperatures"],
        reject=None if reject is None else float(words.get(reject, reject)),
        drafts=drafts,
        **fields["provenance"],
    )


def save(policy: ExitPolicy, path: Path, *, enabled: bool = True) -> None:
    """Writes the policy as JSON, whole or not at all."""
    files.write_json(path, {"enabled": enabled} | as_json(policy))


def load(path: Path, *, exit_depths: np.ndarray) -> ExitPolicy | None:
    """Reads a policy; None where the file says `"enabled": false`.

    Raises:
      FileNotFoundError: no such file, naming the command that writes it.
      ValueError: not a policy, or one for another number of exits.
    """
    if not path.exists():
        raise FileNotFoundError(f"no exit policy at {path}; write one with `launch.calibrate`")
    try:
        fields = json.loads(path.read_text())
        enabled = fields["enabled"]
        policy = from_json(fields)
    except (json.JSONDecodeError, KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{path} is not an exit policy: {error!r}") from error
    if not isinstance(enabled, bool):
        raise ValueError(f'{path}: "enabled" must be true or false, not {enabled!r}')
    try:
        policy.check(exit_depths)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    return policy if enabled else None
