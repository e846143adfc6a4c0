"""Tokens in shards: what `launch.tokenize` makes of text, and how training reads it.

    PACKED/about.json                 what the shards follow from
           00000.json                 what was made of a part of the text; there when all of it is
           train/00000.array_record   its packed rows
           validation/ calibration/ test/   its documents, as tokens
           manifest.json              all of that in one file; there when all parts are

The one idea: a row of the training split is packed once and for all, so a batch is so many numbers
of a shuffled count, and reading it costs the same in any place of any amount of data. The other
splits stay documents: what is measured on them is the same as on the text itself.

A record is a safetensors file: `tokens`, uint16 or uint32 [n], and of a packed row `starts`, int32
[k], where documents begin in it. Rows have `sequence_length` tokens but for the last of a part.
"""

import hashlib
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import numpy as safetensors

from early_exit.data import shards, sources, tokenising
from early_exit.data.stream import (
    ALONE,
    EvaluationBatches,
    Rank,
    TrainingBatches,
    read_ahead,
    shuffled,
)
from early_exit.data.transforms import Batch
from early_exit.storage import files

KIND = "packed tokens"
# Before the folder, as a source of data.
PACKED = "packed:"
MANIFEST = "manifest.json"
TRAIN = "train"


def about(tokenizer: Any, sequence_length: int, parts: str, count: int) -> dict[str, Any]:
    """What all shards follow from: `count` parts of text, known as `parts` (`corpus.identity`).

    Raises:
      ValueError: a tokenizer that is none, or does not say what ends a text.
    """
    return {
        "kind": KIND,
        "tokenizer": tokenising.fingerprint(tokenizer),
        "vocabulary": max(tokenizer.get_vocab().values()) + 1,
        "end_of_text": tokenising.end_of_text(tokenizer),
        "sequence_length": sequence_length,
        "split": {"by": "SHA-256 of a row's text, or of a file's name", "edges": sources.SPLITS},
        "parts": {"count": count, "sha256": parts},
    }


def dtype(about: dict[str, Any]) -> np.dtype:
    """Of stored tokens."""
    return np.dtype(np.uint16 if about["vocabulary"] <= 2**16 else np.uint32)


def pack_document(tokens: np.ndarray) -> bytes:
    """A document as a record."""
    return safetensors.save({"tokens": tokens})


class Packer:
    """Joins documents end to end and cuts them into rows.

    A document that is cut goes on in the next row.
    """

    def __init__(self, length: int, dtype: np.dtype):
        self._tokens = np.zeros(length, dtype)
        self._starts: list[int] = []
        self._filled = 0

    def add(self, tokens: np.ndarray) -> Iterator[bytes]:
        """The rows that are full now, as records."""
        while len(tokens):
            self._starts.append(self._filled)
            taken = tokens[: len(self._tokens) - self._filled]
            self._tokens[self._filled : self._filled + len(taken)] = taken
            self._filled += len(taken)
            tokens = tokens[len(taken) :]
            if self._filled == len(self._tokens):
                yield from self.rest()

    def rest(self) -> Iterator[bytes]:
        """The row that is not full, if there is one."""
        if self._filled:
            starts = np.array(self._starts, np.int32)
            yield safetensors.save({"tokens": self._tokens[: self._filled], "starts": starts})
        self._starts, self._filled = [], 0


def row(record: bytes, length: int) -> Batch:
    """`tokens`, `documents` and `positions`, int32 [length], of a packed row (`data.pipeline`)."""
    arrays = safetensors.load(record)
    filled, starts = len(arrays["tokens"]), arrays["starts"]
    tokens, documents, positions = np.zeros((3, length), np.int32)
    tokens[:filled] = arrays["tokens"]
    sizes = np.diff(starts, append=filled)
    documents[:filled] = np.repeat(np.arange(1, len(starts) + 1), sizes)
    positions[:filled] = np.arange(filled) - np.repeat(starts, sizes)
    return {"tokens": tokens, "documents": documents, "positions": positions}


class Documents(Sequence):
    """Random access to (name, tokens int32 [n]) of a split's documents."""

    def __init__(self, split: str, store: shards.Store):
        self._split, self._store = split, store

    def __len__(self) -> int:
        return len(self._store)

    def __getitem__(self, index: int) -> tuple[str, np.ndarray]:
        tokens = safetensors.load(self._store[index])["tokens"]
        return f"{self._split}:{index}", tokens.astype(np.int32)


class Packed:
    """A folder that `launch.tokenize` has filled.

    Attributes:
      manifest: what its shards follow from, and what there is of each split.
    """

    def __init__(self, folder: Path):
        """
        Raises:
          FileNotFoundError: no such folder, or not all of it is there yet.
          ValueError: the folder holds something else.
        """
        self.folder = folder
        if not (folder / MANIFEST).exists():
            begun = shards.about(folder).get("kind") == KIND
            raise FileNotFoundError(
                f"{folder} is not finished; give its launch.tokenize again, which goes on"
                if begun
                else f"no packed tokens in {folder} ({MANIFEST} is missing); launch.tokenize makes "
                "them of text"
            )
        self.manifest = files.read_json(folder / MANIFEST)
        self._stores: dict[str, shards.Store] = {}
        if self.manifest.get("kind") != KIND:
            raise ValueError(f"{folder / MANIFEST} tells of other things than {KIND}")

    def check(self, tokenizer: Any, sequence_length: int) -> None:
        """Raises ValueError unless the tokens are this tokenizer's, in rows of this length."""
        if tokenising.fingerprint(tokenizer) != self.manifest["tokenizer"]:
            raise ValueError(
                f"the tokens in {self.folder} were made by another tokenizer than this model's "
                f"(fingerprint {self.manifest['tokenizer'][:12]}…); pack the text again with "
                "launch.tokenize and this model, in another folder"
            )
        length = self.manifest["sequence_length"]
        if sequence_length != length:
            raise ValueError(
                f"the rows of {self.folder} have {length} tokens, but data.sequence_length="
                f"{sequence_length}; set it to theirs, or pack the text again"
            )

    def store(self, split: str) -> shards.Store:
        """The records of a split.

        Raises:
          ValueError: an empty split, or a shard that is missing or cut short.
        """
        found = self.manifest["splits"][split]
        if not found["records"]:
            raise ValueError(
                f"the {split} split in {self.folder} is empty: all documents hash into other "
                "splits; pack more text"
            )
        if split not in self._stores:
            known = dict(enumerate(found["shards"]))
            self._stores[split] = shards.Store(self.folder / split, known)
        return self._stores[split]

    def documents(self, split: str) -> Documents:
        """The documents of a split that is not packed."""
        return Documents(split, self.store(split))

    def data_hash(self, split: str) -> str:
        """SHA-256 (hex) of a split; nothing is read."""
        hashes = "".join(shard["sha256"] for shard in self.manifest["splits"][split]["shards"])
        return hashlib.sha256(hashes.encode()).hexdigest()

    def training(
        self, *, batch_size: int, seed: int, num_threads: int = 2, rank: Rank = ALONE
    ) -> TrainingBatches:
        """Batches of packed rows without end; each pass over the rows has an order of its own.

        Args:
          batch_size: B, rows over all processes together.
          rank: whose rows to read, and return.

        Raises:
          ValueError: sizes that make no batches, or no rows; later, a damaged record.
        """
        chosen = shuffled(len(self.store(TRAIN)), batch_size, seed, rank)
        return TrainingBatches(chosen.map(self._rows).to_iter_dataset(read_ahead(num_threads)))

    def first_rows(
        self, batch_size: int, num_batches: int | None, num_threads: int = 2, rank: Rank = ALONE
    ) -> Iterable[Batch]:
        """The first batches of packed rows, always the same ones; None for all that are full."""
        rows = len(self.store(TRAIN))
        count = max(1, rows // batch_size)
        chosen = shuffled(rows, batch_size, 0, rank)[: min(count, num_batches or count)]
        return EvaluationBatches(chosen.map(self._rows), read_ahead(num_threads))

    def _rows(self, chosen: Batch) -> Batch:
        store, length = self.store(TRAIN), self.manifest["sequence_length"]
        rows = [row(store[index], length) for index in chosen["rows"]]
        return {name: np.stack([row[name] for row in rows]) for name in rows[0]}
