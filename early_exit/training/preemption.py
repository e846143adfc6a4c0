"""Leaving when asked to: a cluster that wants its machines back sends SIGTERM first.

The one idea: a run that is asked finishes its step, saves as ever and leaves with a status that
means "start me again"; before its first step, and in all other commands, there is nothing to
finish, and it leaves at once. Of several processes any one may be asked; all of them then leave
after the same step, which `jax.distributed` finds for them.
"""

import contextlib
import signal
import threading
from collections.abc import Iterator

import jax
from jax.experimental import multihost_utils

# EX_TEMPFAIL of sysexits.h: the same command goes on from what was saved.
EXIT_STATUS = 75


class Preempted(BaseException):
    """Asked to leave before the end; what was finished is saved.

    No `Exception`, like KeyboardInterrupt: whoever mends errors has nothing to mend here.
    """


def leave_at_once() -> None:
    """From now on SIGTERM raises Preempted, wherever the main thread is.

    To be called again after `jax.distributed.initialize`, which takes the signal for itself.
    """
    signal.signal(signal.SIGTERM, _raise)


def _raise(*_) -> None:
    signal.signal(signal.SIGTERM, lambda *_: None)  # once: the way out is not interrupted
    raise Preempted("asked to leave")


class Watch:
    """Whether a run has been asked to leave."""

    def __init__(self, distributed: bool):
        self._distributed = distributed
        self._stepping = self._asked = False

    def _told(self, *_) -> None:
        asked_before, self._asked = self._asked, True
        if not (self._stepping or asked_before):
            raise Preempted("asked to leave before the first step")

    def begin(self) -> None:
        """The steps begin: who is asked from now on leaves after one, and not within."""
        self._stepping = True

    def asked(self, step: int) -> bool:
        """Whether to save and leave, to be called after every step.

        With several processes all have to call it, and all get the same answer.
        """
        if self._distributed:
            return multihost_utils.reached_preemption_sync_point(step)
        return self._asked


@contextlib.contextmanager
def watch() -> Iterator[Watch]:
    """To be entered before anything is loaded: until `begin`, SIGTERM raises Preempted.

    Not so with several processes: `jax.distributed` notes the signal from the moment that they
    are connected, and they leave together after the first step. Outside the main thread nobody is
    ever asked: signals go to the main one, which is the caller's.
    """
    if jax.distributed.is_initialized():
        yield Watch(distributed=True)
    elif threading.current_thread() is not threading.main_thread():
        yield Watch(distributed=False)
    else:
        found = Watch(distributed=False)
        before = signal.signal(signal.SIGTERM, found._told)
        try:
            yield found
        finally:
            signal.signal(signal.SIGTERM, before)
