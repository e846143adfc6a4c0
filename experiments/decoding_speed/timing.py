"""What the decoding studies share: a case is a function that takes time, and cases take turns."""

import time
from collections.abc import Callable, Mapping, Sequence

import jax
import numpy as np

from early_exit.decoding.generate import Decoder, Generation


def decode_case(
    decoder: Decoder, prompts: Sequence[Sequence[int]], new_tokens: int, slots: int | None = None
) -> Callable[[], tuple[float, list[Generation]]]:
    """A function that answers the prompts as one batch: (seconds after the prefill, answers)."""

    def run():
        keys = jax.random.split(jax.random.key(0), len(prompts))
        state = decoder.start(prompts, [new_tokens + 1] * len(prompts), keys, slots)
        state = decoder.run(state, steps=0)  # compiles, off the clock
        began = time.perf_counter()
        state = decoder.run(state)
        seconds = time.perf_counter() - began
        return seconds, decoder.generations(state, [seconds] * len(prompts))

    return run


class Turns:
    """Seconds of every case, round by round, so that the machine's drift cancels in ratios."""

    def __init__(self, cases: Mapping[str, Callable], rounds: int):
        self.answers: dict = {}
        self.seconds: dict[str, list[float]] = {name: [] for name in cases}
        for index in range(rounds + 1):  # the first round compiles
            for name, case in cases.items():
                seconds, self.answers[name] = case()
                if index:
                    self.seconds[name].append(seconds)

    def median(self, name: str) -> float:
        return float(np.median(self.seconds[name]))

    def ratio(self, name: str, to: str) -> float:
        """Median over rounds of the ratio of times within a round."""
        return float(np.median(np.divide(self.seconds[name], self.seconds[to])))
