"""Fewer steps where a machine has no time for all of them: `tune.minutes`.

The one idea: a step is the same wherever it runs, so the machine is timed on the run's own step,
before the first one, on a copy of what it would change. How many steps there are is then a setting
like any other. It is written down with the run, which goes on by it and is not timed again.
"""

import math
import time
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils

from early_exit.settings.sections import TuneSettings
from early_exit.training.step import TuneState

# What is timed, after a step that compiles: so many seconds, but at least and at most so many
# steps.
SECONDS, LEAST, MOST = 4.0, 2, 20


def seconds_of(
    step: Callable[[TuneState], tuple[TuneState, dict]],
    state: TuneState,
    clock: Callable[[], float] = time.perf_counter,
) -> float:
    """Seconds of a step on this machine, the median of a few; `state` stays as it is.

    Args:
      step: state → (new state, metrics); it may keep what it is given. Of several processes, all
        call this, and all get what the first has found.
    """
    state = jax.tree.map(jnp.copy, state)
    state, _ = jax.block_until_ready(step(state))
    taken: list[float] = []
    while len(taken) < LEAST or (sum(taken) < SECONDS and len(taken) < MOST):
        began = clock()
        state, _ = jax.block_until_ready(step(state))
        taken.append(clock() - began)
    found = np.float32(np.median(taken))
    if jax.process_count() > 1:
        found = multihost_utils.broadcast_one_to_all(found)
    return float(found)


def steps_for(tune: TuneSettings, seconds: float) -> int:
    """How many steps of `seconds` each there is time for, as `tune.minutes` allows.

    At least one after the warm-up, and never more than `tune.steps`.
    """
    fit = math.floor(60 * tune.minutes / seconds)
    return min(max(fit, tune.warmup_steps + 1), tune.steps)


def told(tune: TuneSettings, seconds: float, steps: int) -> str:
    """What is to be expected, in a sentence."""
    lasting = (
        f"a step takes {seconds:.2g} s here: {_number(steps, 'step')} in {_time(steps * seconds)}"
    )
    if steps == tune.steps:
        return lasting
    return f"{lasting}, not {tune.steps} in {_time(tune.steps * seconds)} (tune.minutes)"


def _number(count: int, what: str) -> str:
    return f"{count} {what}{'s'[: count != 1]}"


def _time(seconds: float) -> str:
    if seconds < 90:
        return _number(math.ceil(seconds), "second")
    return _number(math.ceil(seconds / 60), "minute")
