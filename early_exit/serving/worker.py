"""The thread that decodes: requests come to it from any other, and it tells what they get.

The one idea: sessions belong to one thread, which makes all their steps. Others hand it what is to
be done, and are called back.
"""

import concurrent.futures
import dataclasses
import logging
import queue
import threading
from collections.abc import Callable, Mapping
from typing import Any

import jax

from early_exit.decoding.session import Event, Request, Session

Listener = Callable[[Event | Exception], None]


class Busy(RuntimeError):
    """More requests wait than may."""


class Stopped(RuntimeError):
    """The thread does not decode any more."""


@dataclasses.dataclass(eq=False)
class Handle:
    """A request that was handed over.

    Attributes:
      id: what its session calls it; None while it is on its way there.
    """

    mode: str
    listener: Listener
    id: int | None = None
    cancelled: bool = False


class Worker:
    """Makes the steps of one session for each mode that is served, in turns."""

    def __init__(self, sessions: Mapping[str, Session], *, most_waiting: int = 64, steps: int = 4):
        """
        Args:
          sessions: by the name of their mode; from now on the worker's own.
          most_waiting: requests that may wait for a place.
          steps: of decoding, between two looks at what else there is.
        """
        self._sessions, self._most, self._steps = dict(sessions), most_waiting, steps
        self._handles: dict[tuple[str, int], Handle] = {}
        self._orders: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._lock = threading.Lock()
        self._coming = 0  # requests that no session has yet
        self._ended: Exception | None = None
        self._thread = threading.Thread(target=self._run, name="decoding", daemon=True)

    @property
    def modes(self) -> tuple[str, ...]:
        return tuple(self._sessions)

    @property
    def alive(self) -> bool:
        return self._ended is None and self._thread.is_alive()

    @property
    def waiting(self) -> int:
        """Requests of which nothing has been read."""
        return self._coming + sum(session.waiting for session in self._sessions.values())

    @property
    def running(self) -> int:
        """Requests that are being read or decoded."""
        return sum(session.running for session in self._sessions.values())

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        """Ends the thread after the step that it makes; requests on their way are told."""
        self._orders.put(None)
        if self._thread.is_alive():
            self._thread.join()

    def submit(
        self, mode: str, request: Request, listener: Listener, key: jax.Array | None = None
    ) -> Handle:
        """Hands a request over.

        Args:
          listener: called in the worker's thread with each event, or with the error that ended it.
          key: see `Session.add`.

        Raises:
          ValueError: a mode that is not served, or a request that its session refuses.
          Busy: too many wait.
          Stopped: the worker has ended.
        """
        if mode not in self._sessions:
            raise ValueError(f"mode {mode!r} is not served; choose one of {', '.join(self.modes)}")
        self._sessions[mode].check(request)
        handle = Handle(mode, listener)
        with self._lock:
            self._demand()
            if self.waiting >= self._most:
                raise Busy(f"{self.waiting} requests wait already; try again later")
            self._coming += 1
        self._orders.put(lambda: self._add(handle, request, key))
        return handle

    def cancel(self, handle: Handle) -> None:
        """Ends a request early; nothing happens to one that has ended."""
        self._orders.put(lambda: self._cancel(handle))

    def call(self, function: Callable[[], Any]) -> concurrent.futures.Future:
        """What a function returns that is called in the worker's thread, between two steps."""
        with self._lock:
            self._demand()
        future: concurrent.futures.Future = concurrent.futures.Future()

        def order():
            if future.set_running_or_notify_cancel():
                try:
                    future.set_result(function())
                except Exception as error:
                    future.set_exception(error)

        self._orders.put(order)
        return future

    def _demand(self) -> None:
        if not self.alive:
            raise Stopped("the server does not decode any more")

    def _run(self) -> None:
        ended: Exception = Stopped("the server is shutting down")
        try:
            while self._obey():
                for mode, session in self._sessions.items():
                    if session.busy:
                        for event in session.step(self._steps):
                            self._tell(mode, event)
        except Exception as error:
            logging.getLogger(__name__).exception("decoding has failed")
            ended = error
        with self._lock:
            self._ended = ended
        for handle in self._handles.values():
            handle.listener(ended)
        while not self._orders.empty():
            if order := self._orders.get():
                order()

    def _obey(self) -> bool:
        """Does what was ordered, and waits for it if there is nothing to do. False at the end."""
        while True:
            busy = any(session.busy for session in self._sessions.values())
            if busy and self._orders.empty():
                return True
            order = self._orders.get()
            if order is None:
                return False
            order()

    def _add(self, handle: Handle, request: Request, key: jax.Array | None) -> None:
        self._coming -= 1
        if self._ended is not None:
            handle.listener(self._ended)
        elif not handle.cancelled:
            handle.id = self._sessions[handle.mode].add(request, key)
            self._handles[handle.mode, handle.id] = handle

    def _cancel(self, handle: Handle) -> None:
        handle.cancelled = True
        if handle.id is not None and self._ended is None:
            self._sessions[handle.mode].cancel(handle.id)

    def _tell(self, mode: str, event: Event) -> None:
        handle = self._handles[mode, event.id]
        if event.ended:
            del self._handles[mode, event.id]
        handle.listener(event)
