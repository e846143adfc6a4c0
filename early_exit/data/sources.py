"""Where text comes from: the standard library, files, conversations; always in four splits.

The one idea: a document's split follows from a hash of what names it, so that tuning,
validation, calibration and test texts are disjoint on every machine and stay so when documents
are added. A single text file is cut where its own lines say so, and not by counting from its top,
so that lines put anywhere leave all but a few of its pieces as they were. Nothing is read before
it is asked for, except that JSONL rows are checked.
"""

import dataclasses
import hashlib
import os
import pathlib
import sysconfig
from collections.abc import Callable, Iterator, Sequence

from early_exit.data import conversations, shards, text_files
from early_exit.data.parts import GIVEN, absent, check_named
from early_exit.storage import buckets, copies

# Upper edges of each split's share of the hash range.
SPLITS = {"train": 0.85, "validation": 0.90, "calibration": 0.95, "test": 1.0}
SUFFIXES = (".txt", ".py", ".md", ".rst", ".jsonl")
# A single text file has to fill four splits: it is cut at line ends into pieces of this mean size,
# the longest of which are so many times longer.
PIECE_BYTES, LONGEST = 4096, 8
# Before the folders, with commas between, of conversations that `launch.distill` has made.
MADE = "made:"

# Before the colon of a source → what reads the rest: texts, in a fixed order.
Texts = Callable[[str], Sequence[str]]
_registered: dict[str, Texts] = {}

_NOT_LIBRARY = {"site-packages", "dist-packages", "test", "tests", "idle_test"}


@dataclasses.dataclass(frozen=True)
class _File:
    """One document: a whole file."""

    name: str
    path: pathlib.Path

    def read(self) -> str:
        return text_files.read(self.path)


@dataclasses.dataclass(frozen=True)
class _Piece:
    """One document: the lines from byte `start` to `stop` of a file."""

    name: str
    file: text_files.TextFile
    start: int
    stop: int

    def read(self) -> str:
        return self.file.read(self.start, self.stop)


@dataclasses.dataclass(frozen=True)
class _Row(_Piece):
    """One document: the `text` of a JSONL row."""

    def read(self) -> str:
        return _text(super().read(), self.name)


@dataclasses.dataclass(frozen=True)
class _Made:
    """One document: a conversation in shards."""

    name: str
    store: shards.Store
    index: int

    def read(self) -> str:
        return conversations.Conversation.unpack(self.store[self.index]).text


@dataclasses.dataclass(frozen=True)
class _Given:
    """One document: a text of a source that was added."""

    name: str
    texts: Sequence[str]
    index: int

    def read(self) -> str:
        return self.texts[self.index]


_Span = _File | _Piece | _Made | _Given


def register(name: str, read: Texts) -> None:
    """Adds a kind of source: `name:rest` has the texts of `read(rest)`.

    A hash of each text decides its split, so that equal ones stay together.

    Raises:
      ValueError: another one has that name.
    """
    taken = f"{name}:" in (MADE, GIVEN) or _registered.get(name, read) is not read
    if taken or not name.isidentifier():
        raise ValueError(f"a source cannot be called {name!r}; choose another word")
    _registered[name] = read


@dataclasses.dataclass(frozen=True)
class Documents(Sequence):
    """Random access to (name, text); reads from disk at each access, safe to share by threads."""

    spans: tuple[_Span, ...]

    def __len__(self) -> int:
        return len(self.spans)

    def __getitem__(self, index: int) -> tuple[str, str]:
        return self.spans[index].name, self.spans[index].read()


def documents(source: str, split: str) -> Documents:
    """The documents of one split of a source, in a fixed order.

    Args:
      source: `stdlib` (the running interpreter's standard library, tests left out), a folder with
        .txt, .py, .md, .rst or .jsonl files, or one such file; JSONL rows hold a `text`. Or
        `made:FOLDER`, conversations of a model (`data.conversations`), each question once, or
        several such folders, `made:FOLDER,FOLDER`. Or one that was added (`register`).
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
    check_named(source)
    seen = 0
    kept = []
    for span, identity in spans(source):
        seen += 1
        if split_of(identity) == split:
            kept.append(span)
    if not seen:
        raise ValueError(f"{source} holds no text; looked for non-empty {', '.join(SUFFIXES)}")
    if not kept:
        raise ValueError(
            f"the {split} split of {source} is empty: its {seen} documents all hash into other "
            "splits; give more documents, join them into one .txt or .jsonl file, or, where that "
            "is what they are, give more lines"
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


def split_of(identity: bytes) -> str:
    """The split that a document falls into, by what names it."""
    position = hash_position(identity)
    return next(split for split, edge in SPLITS.items() if position < edge)


def hash_position(identity: bytes) -> float:
    """A place in [0, 1) that follows from what names a document, evenly spread."""
    # 53 bits, what a float holds: rounding more of them up could reach 1.
    return (int.from_bytes(hashlib.sha256(identity).digest()[:8], "big") >> 11) / 2**53


def spans(source: str) -> Iterator[tuple[_Span, bytes]]:
    """Every document, to be read, with the bytes whose hash decides its split; as `documents`."""
    if source.startswith(MADE):
        for folder in map(buckets.place, source.removeprefix(MADE).split(",")):
            store = shards.Store(folder.expanduser())
            for index, conversation in conversations.conversations(store):
                yield _Made(f"{folder.name}:{index}", store, index), conversation.text.encode()
        return
    kind, colon, rest = source.partition(":")
    if colon and kind in _registered:
        texts = _registered[kind](rest)
        for index, text in enumerate(texts):
            yield _Given(f"{source}:{index}", texts, index), text.encode()
        return
    if source == "stdlib":
        root = pathlib.Path(sysconfig.get_path("stdlib"))
        for span, identity in _folder(root, suffixes=(".py",), skip=_NOT_LIBRARY):
            if not span.path.name.startswith("_sysconfigdata"):  # how this Python was built
                yield span, identity
        return
    path = copies.fetched(source, [f"*{suffix}" for suffix in SUFFIXES])
    if path.is_dir():
        yield from _folder(path, suffixes=SUFFIXES)
    elif not path.exists():
        raise FileNotFoundError(
            f"no text: {absent(source)}; give `stdlib`, a folder, a file or made:FOLDER"
        )
    elif path.suffix.lower() not in SUFFIXES:
        raise ValueError(f"{source} is not one of {', '.join(SUFFIXES)}")
    elif path.suffix.lower() == ".jsonl":
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
        suffix = path.suffix.lower()
        if suffix not in suffixes or not path.is_file() or not path.stat().st_size:
            continue
        text_files.unicode(name, f"the name of a file in {root}")
        if suffix == ".jsonl":
            yield from _rows(path, name)
        else:
            yield _File(name, path), name.encode()


def _rows(path: pathlib.Path, name: str) -> Iterator[tuple[_Row, bytes]]:
    file = text_files.opened(path)
    for line in file.lines():
        if line.text.strip():
            row = _Row(f"{name}:{line.number}", file, line.start, line.stop)
            yield row, _text(line.text, f"{path}:{line.number}").encode()


def _text(line: str, where: str) -> str:
    return text_files.json_string(text_files.json_row(line, where), "text", where)


def _pieces(path: pathlib.Path) -> Iterator[tuple[_Piece, bytes]]:
    """Sizes are of the text in UTF-8, so that an encoding changes no piece."""
    file = text_files.opened(path)
    lines, text = [], b""

    def made() -> tuple[_Piece, bytes]:
        name = f"{path.name}:{lines[0].number}"
        return _Piece(name, file, lines[0].start, lines[-1].stop), text

    for line in file.lines():
        lines.append(line)
        text += line.text.encode()
        if _ends_piece(line.text) or len(text) >= LONGEST * PIECE_BYTES:
            yield made()
            lines, text = [], b""
    if lines:
        yield made()


def _ends_piece(line: str) -> bool:
    """By the line alone; the more likely, the longer it is."""
    line = line.removesuffix("\n").encode()
    return hash_position(b"end of a piece:" + line) < len(line) / PIECE_BYTES
