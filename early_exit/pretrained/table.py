"""The table between a family's checkpoint and this project's parameters, read in both directions.

The one idea: an entry pairs a tensor name with parameter paths, and its layout knows `split`
(theirs → ours) and `join` (ours → theirs), exact inverses. Import, export and the check of shapes
are then the same table: what `split` makes of an array without memory has the shape that counts.
"""

import dataclasses
from collections.abc import Iterable, Sequence
from typing import Protocol

import numpy as np


class Layout(Protocol):
    """How one stored tensor holds one or more parameters; neither direction changes a value."""

    def split(self, array: np.ndarray) -> tuple[np.ndarray, ...]:
        """A stored tensor → one array per parameter; views where that is possible.

        Raises:
          ValueError: the tensor's shape does not allow it.
        """

    def join(self, arrays: Sequence[np.ndarray]) -> np.ndarray:
        """The inverse of `split`."""


@dataclasses.dataclass(frozen=True)
class Axes:
    """One parameter, its axes in another order: axis i here is axis `order[i]` of the tensor."""

    order: tuple[int, ...] | None = None

    def split(self, array):
        return (array if self.order is None else array.transpose(self.order),)

    def join(self, arrays):
        (array,) = arrays
        return array if self.order is None else array.transpose(np.argsort(self.order))


STORED = Axes()
TRANSPOSED = Axes((1, 0))  # torch's linear layer [out, in] → kernel [in, out]
CONV = Axes((2, 3, 1, 0))  # torch's convolution [out, in, h, w] → kernel [h, w, in, out]


@dataclasses.dataclass(frozen=True)
class Fused:
    """Parameters of the given `sizes` behind one another along `axis`, then each laid out."""

    sizes: tuple[int, ...]
    axis: int
    then: Axes = STORED

    def split(self, array):
        if array.ndim <= self.axis or array.shape[self.axis] != sum(self.sizes):
            raise ValueError(f"axis {self.axis} of {array.shape} does not split into {self.sizes}")
        parts = np.split(array, np.cumsum(self.sizes)[:-1], self.axis)
        return tuple(self.then.split(part)[0] for part in parts)

    def join(self, arrays):
        return np.concatenate([self.then.join([array]) for array in arrays], self.axis)


@dataclasses.dataclass(frozen=True)
class FusedByHead:
    """Rows in the order [heads, parts, rows of a head] (GPT-NeoX), then each part laid out."""

    heads: int
    parts: int
    then: Axes = STORED

    def split(self, array):
        groups = self.heads * self.parts
        if array.ndim == 0 or array.shape[0] % groups:
            raise ValueError(f"{array.shape} has no {self.heads} heads of {self.parts} parts")
        rows, rest = array.shape[0], array.shape[1:]
        grouped = array.reshape(self.heads, self.parts, rows // groups, *rest)
        return tuple(
            self.then.split(grouped[:, part].reshape(rows // self.parts, *rest))[0]
            for part in range(self.parts)
        )

    def join(self, arrays):
        stored = [self.then.join([array]) for array in arrays]
        grouped = [array.reshape(self.heads, -1, *array.shape[1:]) for array in stored]
        return np.stack(grouped, 1).reshape(-1, *stored[0].shape[1:])


@dataclasses.dataclass(frozen=True)
class Entry:
    """A tensor of a checkpoint and the parameters it holds.

    Attributes:
      name: the tensor's name as `transformers` writes it, under the first of its family's prefixes.
      paths: our parameters, as `tree.flatten` spells them.
      layout: how the one holds the others.
      optional: it may be absent, is never exported, and must equal what its parameters are read
        from: a stored output matrix that is tied to the embedding.
      slice: which of its parameters' slices it holds, if they are stacked of several tensors', as
        the matrices of experts are; None for all.
    """

    name: str
    paths: tuple[str, ...]
    layout: Layout = STORED
    optional: bool = False
    slice: int | None = None

    def of(self, whole: np.ndarray) -> np.ndarray:
        """What it holds of one of its parameters, arrays or shapes without memory."""
        return whole if self.slice is None else whole[self.slice]


def empty(shape: Sequence[int]) -> np.ndarray:
    """An array of that shape that takes no memory."""
    return np.broadcast_to(np.uint8(0), tuple(shape))


def fits(entry: Entry, stored: Sequence[int], ours: Sequence[Sequence[int]]) -> bool:
    """Whether a tensor of the shape `stored` splits into parameters of the shapes `ours`."""
    try:
        parts = entry.layout.split(empty(stored))
    except ValueError:
        return False
    return [part.shape for part in parts] == [entry.of(empty(shape)).shape for shape in ours]


def stored_shape(entry: Entry, ours: Sequence[Sequence[int]]) -> tuple[int, ...]:
    """The shape of the tensor that holds parameters of the shapes `ours`."""
    return entry.layout.join([entry.of(empty(shape)) for shape in ours]).shape


def prefixed(
    entries: Sequence[Entry], prefixes: Sequence[str], names: Iterable[str]
) -> list[Entry]:
    """The entries with their first prefix replaced by the one under which most are in `names`.

    The same network is stored with and without its outer class: `transformer.h.0…` or `h.0…`.
    """
    present = set(names)
    usual = prefixes[0]

    def under(prefix: str) -> list[Entry]:
        return [
            dataclasses.replace(entry, name=prefix + entry.name.removeprefix(usual))
            if entry.name.startswith(usual)
            else entry
            for entry in entries
        ]

    return max(map(under, prefixes), key=lambda found: sum(e.name in present for e in found))
