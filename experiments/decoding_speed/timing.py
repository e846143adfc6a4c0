"""What the decoding studies share: a case is a function that takes time, and cases take turns."""

import dataclasses
import time
from collections.abc import Callable, Mapping, Sequence

import jax
import numpy as np

from early_exit.decoding.decoder import Decoder, Generation


@dataclasses.dataclass
class Timed:
    """What a case took and gave.

    Attributes:
      seconds: of decoding, from the prompt's pass to the last token.
      prefill: seconds of the prompt's pass, which gives the first token.
    """

    seconds: float
    prefill: float = 0.0
    answers: Sequence[Generation] = ()

    @property
    def whole(self) -> float:
        """Seconds to the last token, the prompt's pass included."""
        return self.prefill + self.seconds


Case = Callable[[], Timed]


def decode_case(
    decoder: Decoder,
    prompts: Sequence[Sequence[int]],
    new_tokens: int,
    slots: int | None = None,
    *,
    whole: bool = False,
) -> Case:
    """A case that answers the prompts as one batch.

    Args:
      whole: whether the batch keeps all its rows to the end.
    """

    def run():
        keys = jax.random.split(jax.random.key(0), len(prompts))
        began = time.perf_counter()
        state = decoder.start(prompts, [new_tokens + 1] * len(prompts), keys, slots)
        state = jax.block_until_ready(state)
        prefill = time.perf_counter() - began
        answers = decoder.finish(state, prefill, whole=whole)
        return Timed(answers[0].seconds, prefill, answers)

    return run


def one_after_the_other(cases: Sequence[Case]) -> Case:
    """A case that is all of these."""

    def run():
        found = [case() for case in cases]
        return Timed(
            sum(part.seconds for part in found),
            sum(part.prefill for part in found),
            [answer for part in found for answer in part.answers],
        )

    return run


class Turns:
    """Times of every case, round by round, so that the machine's drift cancels in ratios."""

    def __init__(self, cases: Mapping[str, Case], rounds: int):
        self.answers: dict[str, Sequence[Generation]] = {}
        self._rounds: dict[str, list[Timed]] = {name: [] for name in cases}
        for index in range(rounds + 1):  # the first round compiles
            for name, case in cases.items():
                timed = case()
                self.answers[name] = timed.answers
                if index:
                    self._rounds[name].append(timed)

    def median(self, name: str, of: str = "seconds") -> float:
        """Over rounds, of the seconds of decoding, or of the `whole`."""
        return float(np.median(self._of(name, of)))

    def ratio(self, name: str, to: str, of: str = "seconds") -> float:
        """Median over rounds of the ratio of times within a round."""
        return float(np.median(np.divide(self._of(name, of), self._of(to, of))))

    def _of(self, name: str, of: str) -> list[float]:
        return [getattr(timed, of) for timed in self._rounds[name]]
