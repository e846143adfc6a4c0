"""What a tuning run leaves behind: metrics and checkpoints in a folder, or nothing at all.

The one idea: the loop says what has happened, and does not ask whether anybody writes it down. So a
run in a folder and one in memory are the same steps.
"""

import contextlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax

from early_exit.data.stream import TrainingBatches
from early_exit.runs import checkpoint, lock
from early_exit.runs.layout import CHECKPOINTS
from early_exit.runs.metrics import MetricsWriter
from early_exit.training import bad_batch
from early_exit.training.step import TuneState


class Nothing:
    """Of a run in memory.

    Attributes:
      first: the step after which the run begins, or goes on.
    """

    first = 0

    def opened(self, stack: contextlib.ExitStack, keep: int) -> None:
        """Before the first step; what is to be closed after the last one goes on the stack."""

    def restored(self, like: TuneState, batches: TrainingBatches) -> TuneState | None:
        """The state to go on from, the batches set to what comes next; None to begin."""

    def write(self, step: int, scalars: Mapping[str, float]) -> None:
        """What would be the same in any run."""

    def write_speed(self, step: int, scalars: Mapping[str, float]) -> None:
        """What depends on the machine."""

    def save(
        self, step: int, state: TuneState, batches: TrainingBatches, metadata: dict[str, Any]
    ) -> None:
        """A checkpoint, which stands for all that was written before it."""

    def keep(self, step: int, batch: dict) -> str:
        """Keeps a batch that broke the run; a sentence about it."""
        return "The model that was given is as it was"

    def trace(self) -> contextlib.AbstractContextManager:
        """Traces the steps inside it."""
        raise ValueError("a trace of steps needs a folder to go to")


class InFolder(Nothing):
    """Of a run in a folder, which it has taken (`runs.lock`)."""

    def __init__(self, workdir: Path, own: lock.Owner):
        self._workdir, self._own = workdir, own
        self.first = checkpoint.latest_step(workdir / CHECKPOINTS) or 0
        self._writer: MetricsWriter | None = None  # only the first process has one

    def opened(self, stack, keep):
        saver = checkpoint.Saver(self._workdir / CHECKPOINTS, keep=keep)
        self._saver = stack.enter_context(saver)
        if jax.process_index() == 0:
            writer = MetricsWriter(self._workdir, resumed_step=self.first or None)
            self._writer = stack.enter_context(writer)

    def restored(self, like, batches):
        if not self.first:
            return None
        state, position = checkpoint.restore(self._workdir / CHECKPOINTS, like, self.first)
        batches.set_state(position)
        return state

    def write(self, step, scalars):
        if self._writer:
            self._writer.write(step, scalars)

    def write_speed(self, step, scalars):
        if self._writer:
            self._writer.write_speed(step, scalars)

    def save(self, step, state, batches, metadata):
        self._own.check()
        if self._writer:
            self._writer.sync()
        self._saver.save(step, state, batches.get_state(), metadata)

    def keep(self, step, batch):
        return bad_batch.keep(self._workdir, step, batch)

    def trace(self):
        return jax.profiler.trace(self._workdir / "tensorboard")
