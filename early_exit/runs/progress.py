"""How far a long phase has come: rate and time left, on a terminal or in a log.

    with Progress(total, "tokens") as shown:    # an amount of work
        shown.update(n)
    for batch in counted(batches, "recording"): # things one after the other
    with waiting("loading the model"):          # one call of unknown length

The one idea: a phase says what it does, and a thread says how long it has been doing so. So a call
that takes a minute, such as a compilation, is told of while it lasts. On a terminal that is one
line that moves; elsewhere a plain line every half minute. What is over soon is not told, nor is a
phase within another one.
"""

import contextlib
import contextvars
import shutil
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sized
from typing import TextIO, TypeVar

import jax
import tqdm

# A phase that is over before is not told, unless it is to be told from its start.
SECONDS_BEFORE = 5
# Between two looks at a terminal's line, and between two lines elsewhere.
_SECONDS_ON_TERMINAL = 0.5
_SECONDS_BETWEEN_LINES = 30
_LARGE = 1000  # numbers from here on are shortened, as in 12.3k

T = TypeVar("T")
_shown = contextvars.ContextVar("shown", default=False)


@contextlib.contextmanager
def shown() -> Iterator[None]:
    """Within it, `counted` and `waiting` tell of phases; commands do this, a library does not."""
    before = _shown.set(True)
    try:
        yield
    finally:
        _shown.reset(before)


class Progress:
    """A display of work that is under way; a context manager."""

    def __init__(
        self,
        total: int | None,
        unit: str = "",
        *,
        done: int = 0,
        description: str = "",
        file: TextIO | None = None,
        after: float = 0.0,
        clock: Callable[[], float] = time.monotonic,
    ):
        """Shows nothing yet.

        Args:
          total: of `unit`s, those already `done` by an earlier run included; None if not known.
          description: what is done.
          file: where to show it; standard error if None.
          after: seconds before anything is shown.
          clock: of seconds.
        """
        self._file = sys.stderr if file is None else file
        self._total, self._unit, self._description = total, unit, description
        self._done = self._count = self._first = done  # the rate is of what comes after `first`
        self._note, self._after, self._clock = "", after, clock
        self._terminal = self._file.isatty()
        self._began = clock()
        self._since: float | None = None  # the first update: what it compiles is in no rate
        self._told: float | None = None  # when it was shown last
        self._over, self._lock = threading.Event(), threading.Lock()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> "Progress":
        self._others = _shown.get()
        _shown.set(False)
        self._thread.start()
        if not self._after:
            self.look()
        return self

    def __exit__(self, *exception) -> None:
        self._over.set()
        self._thread.join()
        _shown.set(self._others)
        if self._told is not None or self._clock() - self._began >= self._after:
            self._show(last=True)

    def update(self, count: int, note: str = "") -> None:
        """So many units more are done; `note` stands behind the rate from now on."""
        with self._lock:
            self._count += count
            if self._since is None:
                self._since, self._first = self._clock(), self._count
            self._note = note or self._note
        self.look()

    def look(self) -> None:
        """Shows where it stands, if that is due."""
        now = self._clock()
        every = _SECONDS_ON_TERMINAL if self._terminal else _SECONDS_BETWEEN_LINES
        due = self._began + self._after if self._told is None else self._told + every
        if now >= due:
            self._show()

    def _watch(self) -> None:
        while not self._over.wait(_SECONDS_ON_TERMINAL):
            self.look()

    def _show(self, last: bool = False) -> None:
        with self._lock:
            self._told = self._clock()
            line = self._line()
            if self._terminal:
                width = shutil.get_terminal_size().columns - 1
                self._file.write(f"\r{line[:width]:<{width}}" + "\n" * last)
            else:
                self._file.write(f"{line}\n")
            self._file.flush()

    def _line(self) -> str:
        now = self._clock()
        interval = tqdm.tqdm.format_interval
        if self._total is None and not self._unit:
            return f"{self._description}: {interval(now - self._began)}"
        made, since = self._count - self._first, now - (self._since or now)
        line = tqdm.tqdm.format_meter(
            self._count,
            self._total,
            now - self._began,
            ncols=shutil.get_terminal_size().columns - 1 if self._terminal else 0,
            prefix=self._description,
            unit=f" {self._unit}",
            unit_scale=max(self._total or 0, self._count) >= _LARGE,
            rate=made / since if made and since > 0 else None,
            initial=self._done,
            postfix=self._note,
        )
        return line.replace(f"s/ {self._unit}", f" s/{self._unit}")


def counted(
    items: Iterable[T], description: str, unit: str = "batches", total: int | None = None
) -> Iterator[T]:
    """The items, while it is told how many have been worked on, where progress is `shown`.

    Args:
      total: how many there are, where they do not say.
    """
    if not _tells():
        yield from items
        return
    if total is None and isinstance(items, Sized):
        total = len(items)
    with Progress(total, unit, description=description, after=SECONDS_BEFORE) as display:
        for item in items:
            yield item
            display.update(1)


@contextlib.contextmanager
def waiting(description: str) -> Iterator[None]:
    """Tells how long what is inside has been taking, where progress is `shown`."""
    if not _tells():
        yield
        return
    with Progress(None, description=description, after=SECONDS_BEFORE):
        yield


def _tells() -> bool:
    return _shown.get() and not jax.process_index()
