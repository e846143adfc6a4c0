"""Data that is handed over in Python: texts, labelled examples, or batches that somebody has made.

The one idea: what is given becomes the feed that a named source would be, so that tuning, records
and calibration ask no further. Nobody splits it: what is given to tune on is tuned on.
"""

import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from early_exit.data import feed as feeds
from early_exit.data.examples import Examples
from early_exit.data.parts import GIVEN, Example
from early_exit.data.stream import ALONE, Rank
from early_exit.data.transforms import Batch
from early_exit.settings.sections import DataSettings

# Texts, pairs ({"prompt": …, "answer": …}), examples ({"text": …} or {"image": …}, and "label"), or
# batches.
Data = Iterable[str] | Iterable[Mapping[str, Any]]


def opened(data: Data) -> tuple[str, Data, Any]:
    """(which of `texts`, `pairs`, `examples` and `batches` these are, the data, the first of them).

    Raises:
      ValueError: none, or of another kind.
    """
    repeats = iter(data) is not data
    if not repeats:  # a generator: its first is put back
        data = iter(data)
    first = next(iter(data), None)
    if first is None:
        raise ValueError("the data that was given is empty")
    if not repeats:
        data = itertools.chain([first], data)
    kind = _kind(first)
    if kind != "batches" and not isinstance(data, Sequence):
        data = list(data)
    return kind, data, first


def _kind(first: Any) -> str:
    if isinstance(first, str):
        return "texts"
    if isinstance(first, Mapping):
        if isinstance(first.get("prompt"), str):
            return "pairs"
        return "examples" if {"text", "image"} & first.keys() else "batches"
    if hasattr(first, "shape"):
        return "batches"
    raise ValueError(
        "data can be texts, prompts with answers (a dict with `prompt` and `answer`), examples (a "
        "dict with `text` or `image`, and `label`) or batches (dicts of arrays), not "
        f"{type(first).__name__} objects; or one text that names a source"
    )


def feed(
    kind: str,
    data: Data,
    held_out: Data,
    settings: DataSettings,
    network: feeds.Network,
    tokenizer: Any,
    classes: Sequence[str] | None = None,
) -> feeds.Feed:
    """The feed of data of one kind (`opened`).

    Args:
      held_out: what to validate on, of the same kind; empty for nothing.
      classes: names of the labels, where they are known.

    Raises:
      ValueError: texts for a classifier, or labelled examples for a language model; and what
        `data.feed` says of such feeds.
    """
    if kind == "batches":
        return Batches(data, held_out, settings, network)
    needs = _needs(network)
    if kind != needs:
        said = {"examples": "labelled examples", "pairs": "prompts with answers"}
        raise ValueError(
            f"this network is tuned on {said.get(needs, needs)}, or on batches, and not on "
            f"{said.get(kind, kind)}"
        )
    parts = {"train": data, "calibration": data, "validation": held_out}
    if kind == "texts":
        documents = {
            split: [(f"{split} {i}", text) for i, text in enumerate(texts)]
            for split, texts in parts.items()
        }
        return feeds.TextFeed(settings, tokenizer, {}, documents)
    if kind == "pairs":
        rows = {
            split: [(row["prompt"], row["answer"]) for row in of_split]
            for split, of_split in parts.items()
        }
        return feeds.PairFeed(settings, tokenizer, {}, rows, network=network)
    names = tuple(classes or map(str, range(network.num_classes)))
    known = {"classes": list(names)}
    examples = {split: _examples(names, rows) for split, rows in parts.items()}
    return feeds.ExampleFeed(settings, network, tokenizer, known, examples)


def _needs(network: feeds.Network) -> str:
    if network.classifies:
        return "examples"
    return "pairs" if network.encodes_prompts else "texts"


def _examples(classes: tuple[str, ...], rows: Sequence[Mapping[str, Any]]) -> Examples:
    """Labelled examples; a label is the number of a class, or its name."""

    def read(index: int) -> Example:
        label = rows[index]["label"]
        if isinstance(label, str):
            if label not in classes:
                known = ", ".join(classes)
                raise ValueError(f"{label!r} is none of the network's classes, {known}")
            label = classes.index(label)
        return {**rows[index], "label": int(label)}

    return Examples(classes, np.arange(len(rows)), read)


class Batches:
    """Batches that were given, as they are (see `Feed`).

    Of a language model, dicts of int [B, T] arrays `tokens` and, where a row holds more than one
    text or padding, `documents` and `positions` (see `data.pipeline`); or arrays of tokens alone.
    Of a classifier what its stem takes, `labels` int [B] and, where some rows only fill the batch,
    `valid` bool [B].
    """

    def __init__(
        self, data: Iterable, held_out: Iterable, settings: DataSettings, network: feeds.Network
    ):
        self._data, self._held_out, self._network = data, held_out, network
        self.unit = "examples" if network.classifies else "tokens"
        self.per_batch = settings.batch_size
        if not network.classifies:
            self.per_batch *= settings.sequence_length

    def training(self, seed: int, rank: Rank = ALONE) -> "Iterated":
        return Iterated(self._data, lambda batch: rank.rows(completed(batch, self._network)))

    def held_out(self, split: str, num_batches: int | None, rank: Rank = ALONE):
        return self._some(self._held_out, num_batches, rank)

    def calibration(self, num_batches: int | None):
        return self._some(self._data, num_batches, ALONE)

    def _some(self, batches: Iterable, count: int | None, rank: Rank) -> list[Batch]:
        some = itertools.islice(batches, count)
        return [rank.rows(completed(batch, self._network)) for batch in some]

    def data_hash(self, split: str) -> str:
        return f"{GIVEN}batches"  # nobody can tell

    def about(self) -> feeds.About:
        return {}


class Iterated:
    """An iterable of batches as `TrainingBatches`: gone through again, if it can be.

    Going on from a saved run, batches that were taken are passed over.
    """

    def __init__(self, data: Iterable, complete: Callable[[Any], Batch]):
        self._data, self._complete = data, complete
        self._iterator: Iterator = iter(data)
        self._taken = 0
        self._shapes: dict[str, tuple[int, ...]] | None = None  # of the first batch

    def __iter__(self) -> "Iterated":
        return self

    def __next__(self) -> Batch:
        batch = self._complete(self._raw())
        shapes = {name: x.shape for name, x in batch.items()}
        self._shapes = self._shapes or shapes
        if shapes != self._shapes:
            raise ValueError(
                f"batch {self._taken} has the shapes {shapes}, and the first had {self._shapes}; "
                "give batches that are alike, the last rows filled up or left out"
            )
        return batch

    def _raw(self) -> Any:
        batch = next(self._iterator, None)
        if batch is None and iter(self._data) is not self._data:
            self._iterator = iter(self._data)
            batch = next(self._iterator, None)
        if batch is None:
            raise ValueError(
                f"the batches that were given have ended after {self._taken}; give more, a list, "
                "which is gone through again, or fewer steps"
            )
        self._taken += 1
        return batch

    def get_state(self) -> dict[str, int]:
        return {"taken": self._taken}

    def set_state(self, state: Mapping[str, int]) -> None:
        while self._taken < state["taken"]:
            self._raw()

    def close(self) -> None:
        """There is nothing to end."""


def completed(batch: Any, network: feeds.Network) -> Batch:
    """A batch with what may be left out.

    Raises:
      ValueError: it lacks what cannot be.
    """
    if not isinstance(batch, Mapping):
        batch = {"tokens": batch}
    batch = {name: np.asarray(x) for name, x in batch.items()}
    needed = "labels" if network.classifies else "tokens"
    if needed not in batch:
        raise ValueError(
            f"a batch for this network holds {needed}; this one has {', '.join(batch)}"
        )
    if network.classifies:
        labels = batch["labels"].astype(np.int32)
        return {"valid": np.ones(len(labels), bool), **batch, "labels": labels}
    tokens = batch["tokens"].astype(np.int32)
    if tokens.ndim != 2:
        raise ValueError(f"tokens of a batch are [rows, positions], not {list(tokens.shape)}")
    places = np.broadcast_to(np.arange(tokens.shape[1], dtype=np.int32), tokens.shape)
    whole = {"documents": np.ones_like(tokens), "positions": np.array(places)}
    if network.encodes_prompts:
        if lacking := [name for name in ("prompt", "prompt_real") if name not in batch]:
            raise ValueError(
                f"an encoder reads the prompt, but a batch lacks {' and '.join(lacking)}, int32 "
                "and bool, [rows, positions]"
            )
        batch["prompt"] = batch["prompt"].astype(np.int32)
    return {**whole, **batch, "tokens": tokens}
