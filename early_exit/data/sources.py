"""Where text comes from: the standard library, files, conversations; always in four splits.

The one idea: a document's split follows from a hash of what names it, so that tuning,
validation, calibration and test texts are disjoint on every machine and stay so when documents
are added. Nothing is read before it is asked for, except that JSONL rows are checked.
"""

import dataclasses
import hashlib
import json
import os
import pathlib
import sysconfig
from collections.abc import Iterator, Sequence

from early_exit.data import conversations, shards

# Upper edges of each split's share of the hash range.
SPLITS = {"train": 0.85, "validation": 0.90, "calibration": 0.95, "test": 1.0}
SUFFIXES = (".txt", ".py", ".md", ".rst", ".jsonl")
# A single text file has to fill four splits: it is cut at line ends into pieces of this size.
PIECE_BYTES = 4096
# Before the folder of conversations that `launch.distill` has made.
MADE = "made:"

_NOT_LIBRARY = {"site-packages", "dist-packages", "test", "tests", "idle_test"}


@dataclasses.dataclass(frozen=True)
class _Span:
    """One document: bytes `start` to `stop` (None for the end) of a file."""

    name: str
    path: pathlib.Path
    start: int = 0
    stop: int | None = None

    def read(self) -> str:
        with self.path.open("rb") as file:
            file.seek(self.start)
            data = file.read() if self.stop is None else file.read(self.stop - self.start)
        if self.path.suffix == ".jsonl":
            return _row(self.name, data)
        try:
            return data.decode()
        except UnicodeDecodeError as error:
            raise ValueError(f"{self.path} is not UTF-8 text: {error}; convert it") from error


@dataclasses.dataclass(frozen=True)
class _Made:
    """One document: a conversation in shards."""

    name: str
    store: shards.Store
    index: int

    def read(self) -> str:
        return conversations.Conversation.unpack(self.store[self.index]).text


@dataclasses.dataclass(frozen=True)
class Documents(Sequence):
    """Random access to (name, text); reads from disk at each access, safe to share by threads."""

    spans: tuple[_Span | _Made, ...]

    def __len__(self) -> int:
        return len(self.spans)

    def __getitem__(self, index: int) -> tuple[str, str]:
        return self.spans[index].name, self.spans[index].read()


def documents(source: str, split: str) -> Documents:
    """The documents of one split of a source, in a fixed order.

    Args:
      source: `stdlib` (the running interpreter's standard library, tests left out), a folder with
        .txt, .py, .md, .rst or .jsonl files, or one such file; JSONL rows hold a `text`. Or
        `made:FOLDER`, conversations of a model (`data.conversations`), each question once.
      split: `train`, `validation`, `calibration` or `test`, with 85, 5, 5 and 5 % of the documents.
        A file of a folder is one document, and a hash of its relative path decides; conversations,
        rows of JSONL and pieces of a single text file go by a hash of their text, so that equal
        ones stay together.

    Raises:
      ValueError: unknown split, nothing to read, no documents in the split, a bad JSONL row, or
        damaged conversations.
      FileNotFoundError: no such file or folder.
    """
    if split not in SPLITS:
        raise ValueError(f"unknown split {split!r}; choose one of {', '.join(SPLITS)}")
    seen = 0
    kept = []
    for span, identity in _spans(source):
        seen += 1
        if _split_of(identity) == split:
            kept.append(span)
    if not seen:
        raise ValueError(f"{source} holds no text; looked for non-empty {', '.join(SUFFIXES)}")
    if not kept:
        raise ValueError(
            f"the {split} split of {source} is empty: its {seen} documents all hash into other "
            "splits; give more documents, or join them into one .txt or .jsonl file"
        )
    return Documents(tuple(kept))


def data_hash(documents: Sequence[tuple[str, str]]) -> str:
    """SHA-256 (hex) over names and contents in order: the identity of a text."""
    digest = hashlib.sha256()
    for name, text in documents:
        for part in (name.encode(), text.encode()):
            digest.update(len(part).to_bytes(8, "little"))
            digest.update(part)
    return digest.hexdigest()


def _split_of(identity: bytes) -> str:
    position = hash_position(identity)
    return next(split for split, edge in SPLITS.items() if position < edge)


def hash_position(identity: bytes) -> float:
    """A place in [0, 1) that follows from what names a document, evenly spread."""
    # 53 bits, what a float holds: rounding more of them up could reach 1.
    return (int.from_bytes(hashlib.sha256(identity).digest()[:8], "big") >> 11) / 2**53


def _spans(source: str) -> Iterator[tuple[_Span | _Made, bytes]]:
    """Every document with the bytes whose hash decides its split."""
    if source.startswith(MADE):
        folder = pathlib.Path(source.removeprefix(MADE)).expanduser()
        store = shards.Store(folder)
        for index, conversation in conversations.conversations(store):
            yield _Made(f"{folder.name}:{index}", store, index), conversation.text.encode()
        return
    if source == "stdlib":
        root = pathlib.Path(sysconfig.get_path("stdlib"))
        for span, identity in _folder(root, suffixes=(".py",), skip=_NOT_LIBRARY):
            if not span.path.name.startswith("_sysconfigdata"):  # how this Python was built
                yield span, identity
        return
    path = pathlib.Path(source).expanduser()
    if path.is_dir():
        yield from _folder(path, suffixes=SUFFIXES)
    elif not path.exists():
        raise FileNotFoundError(
            f"no text at {source!r}; give `stdlib`, a folder, a file or made:FOLDER"
        )
    elif path.suffix not in SUFFIXES:
        raise ValueError(f"{source} is not one of {', '.join(SUFFIXES)}")
    elif path.suffix == ".jsonl":
        yield from _rows(path, path.name)
    else:
        yield from _pieces(path)


def _folder(root: pathlib.Path, suffixes, skip=frozenset()) -> Iterator[tuple[_Span, bytes]]:
    paths = []
    for folder, inner, files in os.walk(root):
        inner[:] = [name for name in inner if name not in skip and not name.startswith(".")]
        paths += [pathlib.Path(folder, name) for name in files if not name.startswith(".")]
    for path in sorted(paths):
        name = path.relative_to(root).as_posix()
        if path.suffix not in suffixes or not path.is_file() or not path.stat().st_size:
            continue
        if path.suffix == ".jsonl":
            yield from _rows(path, name)
        else:
            yield _Span(name, path), name.encode()


def _rows(path: pathlib.Path, name: str) -> Iterator[tuple[_Span, bytes]]:
    start = 0
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            span = _Span(f"{name}:{number}", path, start, start + len(line))
            start += len(line)
            if line.strip():
                yield span, _row(span.name, line).encode()


def _row(name: str, line: bytes) -> str:
    try:
        row = json.loads(line)
    except ValueError as error:
        raise ValueError(f"{name} is not JSON: {error}") from error
    if not isinstance(row, dict) or not isinstance(row.get("text"), str):
        raise ValueError(f'{name} has no "text" string; each row is {{"text": "…"}}')
    return row["text"]


def _pieces(path: pathlib.Path) -> Iterator[tuple[_Span, bytes]]:
    start, first_line, piece = 0, 1, b""
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            piece += line
            if len(piece) >= PIECE_BYTES:
                yield _Span(f"{path.name}:{first_line}", path, start, start + len(piece)), piece
                start, first_line, piece = start + len(piece), number + 1, b""
    if piece:
        yield _Span(f"{path.name}:{first_line}", path, start, start + len(piece)), piece
