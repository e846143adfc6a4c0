"""What the decoding studies share: cases have parts, functions that take time, and take turns."""

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

    @classmethod
    def together(cls, parts: Sequence["Timed"]) -> "Timed":
        """What these took and gave, one after the other."""
        seconds, prefill = sum(p.seconds for p in parts), sum(p.prefill for p in parts)
        return cls(seconds, prefill, [answer for part in parts for answer in part.answers])


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


class Turns:
    """Times of every case, in turns, so that the machine's drift cancels in ratios.

    Args:
      cases: of each, its parts, one after the other: as many for all. A turn is one part of each.
      compiled: whether all that they run has been compiled. If not, a round that is not counted
        comes first.
    """

    def __init__(self, cases: Mapping[str, Sequence[Case]], rounds: int, *, compiled: bool = False):
        self.answers: dict[str, Sequence[Generation]] = {}
        self._rounds: dict[str, list[Timed]] = {name: [] for name in cases}
        for index in range(compiled, rounds + 1):
            taken: dict[str, list[Timed]] = {name: [] for name in cases}
            for turn in zip(*cases.values(), strict=True):
                for name, part in zip(cases, turn, strict=True):
                    taken[name].append(part())
            for name, parts in taken.items():
                together = Timed.together(parts)
                self.answers[name] = together.answers
                if index:
                    self._rounds[name].append(together)

    def median(self, name: str, of: str = "seconds") -> float:
        """Over rounds, of the seconds of decoding, or of the `whole`."""
        return float(np.median(self._of(name, of)))

    def ratio(self, name: str, to: str, of: str = "seconds") -> float:
        """Median over rounds of the ratio of times within a round."""
        return float(np.median(np.divide(self._of(name, of), self._of(to, of))))

    def _of(self, name: str, of: str) -> list[float]:
        return [getattr(timed, of) for timed in self._rounds[name]]
