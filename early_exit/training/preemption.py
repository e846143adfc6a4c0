"""Leaving when asked to: a cluster that wants its machines back sends SIGTERM first.

The one idea: a run that is asked finishes its step, saves as ever and leaves with a status that
means "start me again". Of several processes any one may be asked; all of them then leave after
the same step, which `jax.distributed` finds for them.
"""

import contextlib
import signal
import threading
from collections.abc import Callable, Iterator

import jax
from jax.experimental import multihost_utils

# EX_TEMPFAIL of sysexits.h: the same command goes on from what was saved.
EXIT_STATUS = 75


class Preempted(Exception):
    """A run was asked to leave before its end; everything up to here is saved."""


@contextlib.contextmanager
def watch() -> Iterator[Callable[[int], bool]]:
    """Gives `asked(step)`: whether to save and leave, to be called after every step.

    With several processes all have to call it, and all get the same answer. Outside the main
    thread nobody is ever asked: signals go to the main one, which is the caller's.
    """
    if jax.distributed.is_initialized():  # watches SIGTERM itself
        yield multihost_utils.reached_preemption_sync_point
    elif threading.current_thread() is not threading.main_thread():
        yield lambda step: False
    else:
        asked = threading.Event()
        before = signal.signal(signal.SIGTERM, lambda *_: asked.set())
        try:
            yield lambda step: asked.is_set()
        finally:
            signal.signal(signal.SIGTERM, before)
