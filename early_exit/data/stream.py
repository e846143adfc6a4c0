"""What every pipeline of batches has: a state to resume from, and rows shared over processes."""

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, NamedTuple

from early_exit.data.transforms import Batch

if TYPE_CHECKING:
    import grain

# Batches made ahead of the one asked for.
BATCHES_AHEAD = 4


class Rank(NamedTuple):
    """One of `count` equal parts of what all processes do together: by default, all of it."""

    index: int = 0
    count: int = 1

    def check(self, batch_size: int) -> None:
        """Raises ValueError unless every share has the same number of rows, at least one."""
        if batch_size < 1 or batch_size % self.count:
            raise ValueError(
                f"batch_size={batch_size} is not a positive multiple of the {self.count} processes"
            )

    def rows(self, batch: Batch) -> Batch:
        """Batch of all processes → the rows of this one."""
        size = len(next(iter(batch.values()))) // self.count
        own = slice(self.index * size, (self.index + 1) * size)
        return {name: array[own] for name, array in batch.items()}


# Everything.
ALONE = Rank()


class TrainingBatches:
    """An endless iterator of batches, reshuffled at each pass over the data."""

    def __init__(self, dataset: "grain.IterDataset"):
        self._iterator = iter(dataset)

    def __iter__(self) -> "TrainingBatches":
        return self

    def __next__(self) -> Batch:
        return next(self._iterator)

    def get_state(self) -> dict[str, Any]:
        """What `set_state` needs to go on after the last batch taken; JSON-able."""
        return self._iterator.get_state()

    def set_state(self, state: dict[str, Any]) -> None:
        """Goes on exactly where the pipeline that gave `state` was."""
        self._iterator.set_state(_with_tuples(state))

    def close(self) -> None:
        """Ends the threads."""
        self._iterator.close()


class EvaluationBatches:
    """Batches to go through as often as wanted, each time the same, with threads working ahead."""

    def __init__(self, dataset: "grain.MapDataset", read: "grain.ReadOptions"):
        self._dataset = dataset
        self._read = read

    def __len__(self) -> int:
        return len(self._dataset)

    def __iter__(self) -> Iterator[Batch]:
        return iter(self._dataset.to_iter_dataset(self._read))


def shuffled(count: int, batch_size: int, seed: int, rank: Rank) -> "grain.MapDataset":
    """Which of `count` rows each batch has, without end: `rows`, int [B ÷ processes].

    Each pass over the rows has an order of its own. No list of them is made: where a row comes in
    the order is worked out, so the billionth batch is there as soon as the first.

    Args:
      batch_size: B, rows over all processes together.
      rank: whose of them to give.

    Raises:
      ValueError: sizes that make no batches, or more rows than can be shuffled.
    """
    import grain

    rank.check(batch_size)
    if not 0 < count < 2**32:
        raise ValueError(f"{count} rows cannot be shuffled; there may be 1 to {2**32 - 1}")
    dataset = grain.MapDataset.range(count).seed(seed).shuffle().repeat().batch(batch_size)
    return dataset.map(lambda rows: {"rows": rows}).map(rank.rows)


def read_ahead(num_threads: int) -> "grain.ReadOptions":
    """For batches that threads make; they hand over in order, so their number is but time."""
    import grain  # not at the top: most commands need it late or never

    return grain.ReadOptions(num_threads=num_threads, prefetch_buffer_size=BATCHES_AHEAD)


def _with_tuples(state: Any) -> Any:
    """Undoes JSON's tuple → list: Grain's packing takes the list [-1, -1] for a real slice."""
    if isinstance(state, dict):
        return {name: _with_tuples(value) for name, value in state.items()}
    return tuple(state) if isinstance(state, list) else state
