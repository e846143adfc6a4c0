"""Text of any size, as parts that can be read by themselves, in any order and on any machine.

The one idea: a part is a few names and numbers: so many files, bytes of one, row groups or rows.
Which parts a source has follows from the names and sizes of its files, and nothing else is read to
know it, but the footers of Parquet. Reading a part takes memory for one document, or for some rows.

Documents, and the splits that they fall into, are those of `data.sources`, which reads the same
files for small runs.
"""

import dataclasses
import glob
import gzip
import hashlib
import itertools
import math
import pathlib
import zlib
from collections.abc import Iterable, Iterator, Sequence
from typing import BinaryIO, NamedTuple, Protocol

import fsspec

from early_exit.data import hubs, parquet, sources, text_files

JSON_LINES = ".jsonl"
PACKED_LINES = {".jsonl.gz": "gzip", ".jsonl.zst": "zstd"}
TEXTS = tuple(suffix for suffix in sources.SUFFIXES if suffix != JSON_LINES)
SUFFIXES = (*sources.SUFFIXES, *PACKED_LINES, parquet.SUFFIX)
# Bytes of text, roughly, in a part: a minute of work for one process.
PART_BYTES = 256 << 20


class Document(NamedTuple):
    """A text, its name, and the bytes whose hash decides its split."""

    name: str
    text: str
    identity: bytes


class Part(Protocol):
    """What one process reads at a time; can be pickled."""

    def documents(self) -> Iterator[Document]:
        """Its documents, in order.

        Raises:
          ValueError: something is no text; named by file and place.
        """

    def told(self) -> str:
        """What it is, but for where its files lie."""


class Section(NamedTuple):
    """A file, or bytes `start` to `stop` of a `.jsonl` file, or row groups so of a Parquet file.

    Lines belong to the section in which they begin.
    """

    name: str
    bytes: int
    start: int | None = None
    stop: int | None = None


@dataclasses.dataclass(frozen=True)
class Files:
    """Sections of files below a folder, or below a place that fsspec knows.

    Attributes:
      field: what holds the text, in a row of JSON or Parquet.
    """

    root: str
    sections: tuple[Section, ...]
    field: str

    def documents(self) -> Iterator[Document]:
        for section in self.sections:
            yield from _read(f"{self.root}/{section.name}", section, self.field)

    def told(self) -> str:
        return f"{self.field} {list(map(tuple, self.sections))}"


@dataclasses.dataclass(frozen=True)
class Rows:
    """Rows `start` to `stop` of a table of a hub."""

    source: str
    field: str
    start: int
    stop: int

    def documents(self) -> Iterator[Document]:
        texts = hubs.opened(self.source, self.field).texts(self.start, self.stop)
        for number, text in enumerate(texts, self.start):
            yield Document(f"{self.source}:{number}", text, text.encode())

    def told(self) -> str:
        return f"{self.source} {self.field} {self.start} {self.stop}"


@dataclasses.dataclass(frozen=True)
class Whole:
    """All of a source that `data.sources` reads in one go."""

    source: str

    def documents(self) -> Iterator[Document]:
        for span, identity in sources.spans(self.source):
            yield Document(span.name, span.read(), identity)

    def told(self) -> str:
        return self.source


def parts(source: str, field: str = "text", part_bytes: int = PART_BYTES) -> Sequence[Part]:
    """The parts of a source, in a fixed order, for documents in the order of their files' names.

    Args:
      source: a folder, a file or a glob (`/data/**/*.jsonl.zst`) of .txt, .py, .md, .rst, .jsonl,
        .jsonl.gz, .jsonl.zst and .parquet files, here or where fsspec finds them (gs://, s3://);
        `hf:NAME` or `hf:NAME:CONFIG`, of the Hugging Face hub, or a local copy, `hf:/FOLDER`;
        `tfds:NAME`, of TensorFlow Datasets, or a local copy, `tfds:/FOLDER`: of both the split
        `train`; or whatever else `data.sources` reads, in one part.
      field: what holds the text, in a row of JSON, Parquet or a hub's table.
      part_bytes: of text in a part, roughly. A compressed file is in one part.

    Raises:
      ValueError: nothing to read, or no text where it should be.
      FileNotFoundError: no such file or folder.
      RuntimeError: the source needs a library that is not installed; names it.
    """
    if part_bytes < 1:
        raise ValueError(f"a part has at least 1 byte, not {part_bytes}")
    if source.startswith(hubs.KINDS):
        found = _of_table(source, field, part_bytes)
    elif (listed := _listed(source)) is None:
        found = [Whole(source)]
    else:
        root, sizes = listed
        grouped = _grouped(_sections(root, sizes, field, part_bytes), part_bytes)
        found = [Files(root, sections, field) for sections in grouped]
    # What can be wrong with all of it shows in the first, before long work.
    if not found or next(iter(found[0].documents()), None) is None:
        raise ValueError(f"{source} holds no text; looked for non-empty {', '.join(SUFFIXES)}")
    return found


def identity(found: Iterable[Part]) -> str:
    """SHA-256 (hex) of what the parts are, wherever they lie."""
    digest = hashlib.sha256()
    for part in found:
        digest.update(part.told().encode() + b"\n")
    return digest.hexdigest()


def _of_table(source: str, field: str, part_bytes: int) -> list[Rows]:
    table = hubs.opened(source, field)
    count = max(1, math.ceil(table.bytes / part_bytes))
    edges = [table.rows * number // count for number in range(count + 1)]
    return [
        Rows(source, field, start, stop)
        for start, stop in itertools.pairwise(edges)
        if stop > start
    ]


def _listed(source: str) -> tuple[str, dict[str, int]] | None:
    """(what the names are relative to, name → bytes of each file); None for other sources.

    A text file alone is another source: it is cut into pieces where its lines say so.
    """
    system, path = fsspec.core.url_to_fs(source if "://" in source else _local(source))
    if glob.has_magic(path):
        fixed = path.rpartition("/")[0]
        while glob.has_magic(fixed):
            fixed = fixed.rpartition("/")[0]
        root, found = fixed, system.glob(path, detail=True)
    elif system.isdir(path):
        root, found = path.rstrip("/"), system.find(path, detail=True)
    elif system.isfile(path) and path.lower().endswith(SUFFIXES) and not path.endswith(TEXTS):
        root, found = path.rpartition("/")[0], {path: system.info(path)}
    elif "://" in source and not system.exists(path):
        raise FileNotFoundError(f"no text: there is no {source}")
    else:
        return None
    sizes = {}
    for at, described in found.items():
        name = at.removeprefix(f"{root}/")
        hidden = any(inner.startswith(".") for inner in name.split("/"))
        is_text = described["type"] == "file" and name.lower().endswith(SUFFIXES)
        if is_text and not hidden and described["size"]:
            sizes[text_files.unicode(name, f"the name of a file in {root}")] = described["size"]
    # As paths are sorted, component by component.
    ordered = sorted(sizes, key=lambda name: name.split("/"))
    return system.unstrip_protocol(root) if "://" in source else root, {
        n: sizes[n] for n in ordered
    }


def _local(source: str) -> str:
    return str(pathlib.Path(source).expanduser().absolute())


def _sections(root: str, sizes: dict[str, int], field: str, part_bytes: int) -> Iterator[Section]:
    for name, size in sizes.items():
        if name.lower().endswith(parquet.SUFFIX):
            groups = parquet.group_bytes(f"{root}/{name}", field)
            for number, held in enumerate(groups):
                yield Section(name, held, number, number + 1)
        elif name.lower().endswith(JSON_LINES) and size > part_bytes:
            count = math.ceil(size / part_bytes)
            edges = [size * number // count for number in range(count + 1)]
            for start, stop in itertools.pairwise(edges):
                yield Section(name, stop - start, start, stop)
        else:
            yield Section(name, size)


def _grouped(sections: Iterable[Section], part_bytes: int) -> Iterator[tuple[Section, ...]]:
    """As many neighbours together as fit."""
    group, held = [], 0
    for section in sections:
        if group and held + section.bytes > part_bytes:
            yield tuple(group)
            group, held = [], 0
        group.append(section)
        held += section.bytes
    if group:
        yield tuple(group)


def _read(path: str, section: Section, field: str) -> Iterator[Document]:
    name, lower = section.name, section.name.lower()
    if lower.endswith(parquet.SUFFIX):
        rows = parquet.texts(path, field, section.start, section.stop)
        found = ((f"{name}:{group}:{number}", text) for group, number, text in rows)
        return (Document(where, text, text.encode()) for where, text in found)
    if lower.endswith((JSON_LINES, *PACKED_LINES)):
        return _rows(path, section, field)
    with fsspec.open(path, "rb") as file:
        return iter([Document(name, text_files.decode(file.read(), path), name.encode())])


def _rows(path: str, section: Section, field: str) -> Iterator[Document]:
    packed = next(
        (how for s, how in PACKED_LINES.items() if section.name.lower().endswith(s)), None
    )
    with fsspec.open(path, "rb") as file:
        lines = _lines(file, section.start or 0, section.stop)
        if packed:
            lines = _unpacked(file, packed, path)
        for at, line in lines:
            if line.strip():
                where = f"the line at byte {at} of {path}"
                row = text_files.json_row(_utf8(line, where), where)
                text = text_files.json_string(row, field, where)
                yield Document(f"{section.name}:{at}", text, text.encode())


def _lines(file: BinaryIO, start: int, stop: int | None) -> Iterator[tuple[int, bytes]]:
    """(byte where it begins, line) of the lines that begin between two bytes of a file."""
    if start:
        file.seek(start - 1)
        start += len(file.readline()) - 1  # the rest of a line that began before
    for line in file:
        if stop is not None and start >= stop:
            return
        yield start, line
        start += len(line)


def _unpacked(file: BinaryIO, how: str, path: str) -> Iterator[tuple[int, bytes]]:
    """The same of all lines of a compressed file; bytes are those of what was compressed.

    Raises:
      ValueError: it is damaged, or ends too early.
    """
    try:
        plain = gzip.GzipFile(fileobj=file) if how == "gzip" else parquet.unpacked(file, how)
        yield from _lines(plain, 0, None)
    except (EOFError, OSError, ValueError, zlib.error) as error:
        raise ValueError(f"{path} is damaged, or cut short ({error}); fetch it again") from error


def _utf8(line: bytes, where: str) -> str:
    try:
        return line.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{where} is not UTF-8 ({error.reason}); save the file as UTF-8"
        ) from error
