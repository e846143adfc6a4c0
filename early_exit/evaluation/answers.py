"""Calibration on decoded answers: a policy that keeps what it promises in the mode it is used in.

The one idea: few answers need decoding. The full model's answer is given text, and `scoring` says
exactly, in one pass, which of its tokens a mode and a policy would not have chosen. Where there is
none, the answer would have been the same, and is not decoded; and where there is one, it is known
at which token the answer goes its own way.
"""

import dataclasses
from collections.abc import Callable, Iterator, Sequence

import jax
import numpy as np

from early_exit import policy as policies
from early_exit.calibration import answers, certify, promise, risk
from early_exit.decoding import cache as caches
from early_exit.decoding.decoder import Generation
from early_exit.decoding.generate import generate
from early_exit.decoding.mode import LOSSY, Mode
from early_exit.decoding.state import check_prompts
from early_exit.evaluation import run, scoring
from early_exit.policy import ExitPolicy
from early_exit.runs import layout, lock, progress
from early_exit.runs.assemble import Tuned
from early_exit.settings.sections import CalibrateSettings

# How many policies are there to be tried, and answers between two looks at a test.
CANDIDATES, PORTION = 20, 32


@dataclasses.dataclass(frozen=True)
class Questions:
    """Prompts, and the full model's answers to them.

    Attributes:
      tuned: who is asked.
      prompts: token ids, in an order drawn at random.
      references: int32 [n] each, greedy, a stop token included.
      new_tokens: that an answer may have at most.
      batch: how many are answered together.
    """

    tuned: Tuned
    prompts: Sequence[Sequence[int]]
    references: Sequence[np.ndarray]
    new_tokens: int
    batch: int

    @classmethod
    def ask(
        cls, tuned: Tuned, prompts: Sequence[Sequence[int]], new_tokens: int, batch: int, seed: int
    ) -> "Questions":
        """The full model is asked, in an order drawn from the seed.

        Raises:
          ValueError: no prompts, or one that cannot be answered.
        """
        check_prompts(tuned.model, prompts, new_tokens)
        order = np.random.default_rng(seed).permutation(len(prompts))
        prompts = [prompts[i] for i in order]
        asked = cls(tuned, prompts, [], new_tokens, batch)
        with progress.waiting("answering with all blocks"):
            answered = asked.decoded(range(len(prompts)), None)
        return dataclasses.replace(asked, references=[answer.tokens for answer in answered])

    def changes(self, rows: Sequence[int], policy: ExitPolicy, mode: Mode) -> np.ndarray:
        """Which token of an answer is the first that is not the full model's, int [n].

        The length of the full model's answer where there is none: then it is this answer. To
        float32 rounding, for this is another program than decoding.
        """
        found = scoring.score(
            self.tuned.model,
            self.tuned.params,
            [(self.prompts[i], self.references[i]) for i in rows],
            policy=policy,
            mode=mode,
            batch=self.batch,
            limits=[self.new_tokens] * len(rows),
        )
        return np.array([np.append(~x.chosen, True).argmax() for x in found])

    def losses(
        self, rows: Sequence[int], policy: ExitPolicy, mode: Mode, loss: answers.Loss
    ) -> tuple[np.ndarray, int]:
        """(the loss of each of these answers, float64 [n]; how many had to be decoded).

        Raises:
          ValueError: a loss outside [0, 1].
        """
        firsts = self.changes(rows, policy, mode)
        other = [i for i, at in zip(rows, firsts, strict=True) if at < len(self.references[i])]
        if loss is answers.changed:  # nothing else need be known
            return np.isin(rows, other).astype(np.float64), 0
        said = dict(zip(rows, (self.references[i] for i in rows), strict=True))
        said |= {i: x.tokens for i, x in zip(other, self.decoded(other, policy, mode), strict=True)}
        pairs = [(self.references[i], said[i]) for i in rows]
        return np.array([answers.loss_of(loss, *pair) for pair in pairs]), len(other)

    def decoded(
        self, rows: Sequence[int], policy: ExitPolicy | None, mode: Mode = LOSSY
    ) -> list[Generation]:
        """Answers to some of the prompts."""
        if not len(rows):
            return []
        prompts = [self.prompts[i] for i in rows]
        # At least a batch, so that one program serves; what is added is answered by one token.
        added = max(0, self.batch - len(prompts))
        longest = max(map(len, self.prompts)) + self.new_tokens
        found = generate(
            self.tuned.model,
            self.tuned.params,
            prompts + [prompts[-1]] * added,
            policy=policy,
            mode=mode,
            max_new_tokens=[self.new_tokens] * len(prompts) + [1] * added,
            stop_ids=self.tuned.stop_ids,
            batch=self.batch,
            slots=caches.bucket(longest + mode.capacity - 1),
        )
        return found[: len(prompts)]


def calibrate(
    tuned: Tuned,
    prompts: Sequence[Sequence[int]],
    mode: Mode,
    settings: CalibrateSettings,
    *,
    loss: answers.Loss = answers.tokens,
    new_tokens: int = 64,
    batch: int = 8,
    tell: Callable[[str], None] = lambda _: None,
) -> ExitPolicy:
    """Fits a policy that keeps a promise about answers, and saves it as the run's.

    With probability 1 − δ over the prompts, the mean loss of answers to prompts like these, in this
    mode, is at most α. The candidates are found on the run's calibration data.

    Args:
      prompts: token ids; independent of each other and of the calibration data.
      mode: `lossy` or `deferred`, greedy.
      settings: `method`, `alpha`, `delta`, `confidence`, `seed` and `allow_never`.
      loss: of an answer against the full model's.
      new_tokens: of an answer at most; in use, longer ones are promised nothing.
      tell: is told, before anything is decoded, what so many prompts can promise at best.

    Raises:
      ValueError: a method, mode or loss that promises nothing about answers, prompts that cannot
        be answered, or a promise that they cannot give.
      RuntimeError: another command is at work in the run's folder.
    """
    run.check_exits(tuned)
    _check(tuned, mode, settings, loss)
    prompts = list(dict.fromkeys(tuple(int(token) for token in prompt) for prompt in prompts))
    check_prompts(tuned.model, prompts, new_tokens)
    reach = promise.of_answers(len(prompts), settings)
    tell(str(reach))
    promise.check([reach], settings)
    with lock.held(tuned.workdir):
        records = run.records_of(tuned)
        rows = answers.candidates(records, settings.confidence, CANDIDATES)
        asked = Questions.ask(tuned, prompts, new_tokens, batch, settings.seed)
        decoded: list[int] = []

        def losses(row: np.ndarray) -> Iterator[np.ndarray]:
            policy = policies.make(row, settings.confidence)
            starts = range(0, len(prompts), PORTION)
            for start in progress.counted(starts, "trying a policy", "portions"):
                part = range(start, min(start + PORTION, len(prompts)))
                found, new = asked.losses(part, policy, mode, loss)
                decoded.append(new)
                yield found

        how = {"method": settings.method, "delta": settings.delta, "total": len(prompts)}
        tests = answers.in_order(map(losses, rows), alpha=settings.alpha, **how)
        passed = [i for i, test in enumerate(tests) if test.passed]
        stated = {
            "method": settings.method,
            "alpha": settings.alpha,
            "delta": settings.delta,
            "risk_of": getattr(loss, "__name__", "user's"),
            "unit": "prompt",
            "units": len(prompts),
            "candidates": len(rows),
            "tested": len(tests),
            "answers_decoded": len(prompts) + sum(decoded),
            "promise": promise.about_answers(mode.name, new_tokens),
            "risk": None,
            "bound": None,
        }
        policy = policies.never(len(tuned.model.exits.points), settings.confidence)
        if passed:
            seen = tests[passed[-1]].losses
            stated |= {"risk": float(seen.mean()), "risk_on": len(seen)}
            stated["bound"] = answers.bound(losses=seen, **how)
            policy = policies.make(rows[passed[-1]], settings.confidence)
        policy = dataclasses.replace(policy, provenance=stated)
        policy = risk.with_evidence(policy, records)
        if not jax.process_index():
            policies.save(policy, tuned.workdir / layout.POLICY)
    return policy


def _check(tuned: Tuned, mode: Mode, settings: CalibrateSettings, loss: answers.Loss) -> None:
    """Raises ValueError where nothing can be promised about answers, or need be."""
    if tuned.model.config.classifies:
        raise ValueError(f"{tuned.workdir} holds a classifier, which decodes no answers")
    if not tuned.model.exits.points:
        raise ValueError(
            "promises about answers are made for exits after blocks, and this model has none "
            "(exits.points); what a recurrent exit drafts is exact in verified mode"
        )
    if mode.verified:
        raise ValueError(
            f"{mode.name} needs no promise: its answers are the full model's; name lossy or "
            "deferred"
        )
    if settings.method not in certify.METHODS:
        raise ValueError(
            f"{settings.method} promises nothing about new answers; choose one of "
            f"{', '.join(certify.METHODS)}"
        )
    if settings.method == "clopper_pearson" and loss is not answers.changed:
        raise ValueError("clopper_pearson counts answers that have changed; give the loss changed")
