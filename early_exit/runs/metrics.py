"""What a run says while it runs: metrics files, TensorBoard, tables.

The one idea: every write is one whole line that a killed run cannot lose, and a run that goes on
from an earlier step first takes back the lines written after it. In a bucket, where nothing can be
appended to, lines are there with the checkpoint that stands for them.
"""

import json
import math
import os
import pathlib
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from early_exit.storage import buckets, files

# What follows from config, data and weights; a run that was interrupted has the same lines.
FILE = "metrics.jsonl"
# What depends on the machine: rates and memory.
SPEED = "speed.jsonl"


class MetricsWriter:
    """Scalars by step, as lines of a file and as TensorBoard events in `tensorboard/`.

    The files are `metrics.jsonl`, and `speed.jsonl` for what no other run would repeat.

    A context manager. With several processes, only the first should have one.
    """

    def __init__(self, folder: str | os.PathLike, resumed_step: int | None = None):
        """`resumed_step` is the step of the checkpoint the run goes on from; None to begin anew.

        Raises OSError where the folder cannot be written to.
        """
        import tensorboardX  # not at the top: most commands write no metrics

        folder = buckets.place(folder)
        self._bucket = folder if buckets.is_remote(folder) else None
        self._scratch = tempfile.TemporaryDirectory(prefix="early_exit-") if self._bucket else None
        self._folder = pathlib.Path(self._scratch.name) if self._scratch else folder
        self._folder.mkdir(parents=True, exist_ok=True)
        self._files = {}
        for name in (FILE, SPEED):
            kept = _lines_until(folder / name, resumed_step)
            files.write_text(self._folder / name, "".join(kept))
            self._files[name] = (self._folder / name).open("a")
        self._events = tensorboardX.SummaryWriter(
            str(self._folder / "tensorboard"),
            purge_step=0 if resumed_step is None else resumed_step + 1,
        )

    def write(self, step: int, scalars: Mapping[str, Any]) -> None:
        """Writes one line, `{"step": …, name: number, …}`; null stands for NaN and infinities."""
        self._write(FILE, step, scalars)

    def write_speed(self, step: int, scalars: Mapping[str, Any]) -> None:
        """The same, of what depends on the machine."""
        self._write(SPEED, step, scalars)

    def _write(self, file: str, step: int, scalars: Mapping[str, Any]) -> None:
        numbers = {name: _number(value) for name, value in scalars.items()}
        self._files[file].write(files.json_text({"step": int(step), **numbers}) + "\n")
        self._files[file].flush()
        for name, value in scalars.items():
            self._events.add_scalar(name, float(value), int(step))

    def sync(self) -> None:
        """Returns when all that was written is where it is kept."""
        if self._bucket is None:
            return
        self._events.flush()
        for path in sorted(self._folder.rglob("*")):
            if path.is_file():
                buckets.put(path, self._bucket / str(path.relative_to(self._folder)))

    def close(self) -> None:
        for file in self._files.values():
            file.close()
        self._events.close()
        if self._scratch is not None:
            self.sync()
            self._scratch.cleanup()

    def __enter__(self) -> "MetricsWriter":
        return self

    def __exit__(self, *exception) -> None:
        self.close()


def read_metrics(folder: str | os.PathLike, file: str = FILE) -> list[dict[str, Any]]:
    """The lines of a run's file; a last line that a killed run left unfinished is left out."""
    return [json.loads(line) for line in _whole_lines(buckets.place(folder) / file)]


def _whole_lines(path: pathlib.Path) -> list[str]:
    if not path.exists():
        return []
    return [line for line in path.read_text().splitlines(keepends=True) if line.endswith("\n")]


def _lines_until(path: pathlib.Path, last_step: int | None) -> list[str]:
    """The lines of a file up to a step; none without one."""
    return [
        line
        for line in _whole_lines(path)
        if last_step is not None and json.loads(line)["step"] <= last_step
    ]


def _number(value: Any) -> int | float | None:
    value = value.item() if hasattr(value, "item") else value
    return value if math.isfinite(value) else None


def table(rows: Iterable[Sequence[Any]], header: Sequence[str]) -> str:
    """Rows as aligned plain text under `header`: numbers to the right, all else to the left.

    Floats get three decimals, none from 1000 on, and three digits below 0.001; None is a dash.
    """
    rows = [list(row) for row in rows]
    cells = [list(header), *[[_cell(value) for value in row] for row in rows]]
    columns = list(zip(*cells, strict=True))
    widths = [max(map(len, column)) for column in columns]
    right = [
        all(
            isinstance(row[i], int | float) or hasattr(row[i], "item") or row[i] is None
            for row in rows
        )
        for i in range(len(columns))
    ]

    def line(cells: Sequence[str]) -> str:
        aligned = [
            cell.rjust(width) if is_right else cell.ljust(width)
            for cell, width, is_right in zip(cells, widths, right, strict=True)
        ]
        return "  ".join(aligned).rstrip()

    return "\n".join(
        [line(cells[0]), "  ".join("-" * width for width in widths), *map(line, cells[1:])]
    )


def _cell(value: Any) -> str:
    value = value.item() if hasattr(value, "item") else value
    if value is None:
        return "–"
    if not isinstance(value, float):
        return str(value)
    if abs(value) >= 1000:
        return f"{value:.0f}"
    return f"{value:.3f}" if abs(value) >= 1e-3 or not value else f"{value:.3g}"
