"""Records that a run made, as ArrayRecord files: written so that work can go on, checked when read.

    FOLDER/about.json           what the records are and what they were made from
           00000.array_record   a shard
           00000.json           its records, bytes and SHA-256, and what its maker counted

The one idea: a shard follows from its number and from `about` alone, and its description is
written last. So a shard without one was interrupted and is made again, several processes can share
the numbers out among them, and what was damaged later is told from what was never finished.
"""

import contextlib
import hashlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from array_record.python import array_record_module
from array_record.python.array_record_data_source import ArrayRecordDataSource

from early_exit.storage import copies, files

ABOUT = "about.json"


def begin(folder: Path, made_from: dict[str, Any]) -> None:
    """Makes the folder, or goes on with one that holds records of the same kind.

    Args:
      made_from: a JSON object that every record follows from, but for its shard's number.

    Raises:
      ValueError: the folder holds other records; names what differs.
    """
    files.make_folder(folder)
    new = files.plain(made_from)
    if before := about(folder):
        if before != new:
            names = before.keys() | new.keys()
            differing = sorted(name for name in names if before.get(name) != new.get(name))
            raise ValueError(
                f"{folder} holds records with another {', '.join(differing)}; name another "
                "folder, or the same settings to go on"
            )
    else:
        files.write_json(folder / ABOUT, new)


def about(folder: Path) -> dict[str, Any]:
    """What the records of a folder were made from; empty if there are none."""
    path = folder / ABOUT
    return files.read_json(path) if path.exists() else {}


def is_finished(folder: Path, number: int) -> bool:
    return description(folder, number).exists()


def finished(folder: Path) -> dict[int, dict[str, Any]]:
    """The description of each finished shard, by its number, rising."""
    found = {int(path.stem): path for path in folder.glob("[0-9]*.json")}
    return {number: files.read_json(found[number]) for number in sorted(found)}


def description(folder: Path, number: int) -> Path:
    """The file that describes a finished shard."""
    return folder / f"{number:05}.json"


def data(folder: Path, number: int) -> Path:
    """The file with the records of a shard."""
    return folder / f"{number:05}.array_record"


class Writing:
    """A file of records that is being written.

    Attributes:
      described: when it is whole, how many `records` and `bytes` it has, and its `sha256`.
    """

    def __init__(self, path: Path):
        # Groups of one: each record can be read without its neighbours.
        self._writer = array_record_module.ArrayRecordWriter(str(path), "group_size:1")
        self._path, self._records = path, 0
        self.described: dict[str, Any] = {}

    def add(self, record: bytes) -> None:
        self._writer.write(record)
        self._records += 1

    def close(self) -> None:
        self._writer.close()
        size = self._path.stat().st_size
        self.described = {"records": self._records, "bytes": size, "sha256": _sha256(self._path)}


@contextlib.contextmanager
def writing(path: Path) -> Iterator[Writing]:
    """An ArrayRecord file to add records to; it is there when the block has ended well.

    Nobody else may write the same one meanwhile; what was left of it by a kill is removed.

    Raises:
      OSError: it cannot be written.
    """
    files.remove_partial(path)
    with files.replacing(path) as partial:
        new = Writing(partial)
        yield new
        new.close()


def write(folder: Path, number: int, records: Iterable[bytes], counted: dict[str, Any]) -> None:
    """Writes a shard; it counts as finished when all of it is on the disk.

    Args:
      records: may be lazy; `counted`, which stands in the shard's description, is read after them.

    Raises:
      OSError: as `writing`.
    """
    with writing(data(folder, number)) as new:
        for record in records:
            new.add(record)
    files.write_json(description(folder, number), new.described | counted)


class Store(Sequence[bytes]):
    """The finished shards of a folder: random access to their records, safe to share by threads.

    Attributes:
      about: what they were made from.
      shards: the description of each finished shard, by its number.

    Raises:
      FileNotFoundError: no such folder, or no records in it.
      ValueError: a shard that is missing, cut short, or another one than was written.
    """

    def __init__(self, folder: Path, known: Mapping[int, dict[str, Any]] | None = None):
        """`known` are the descriptions of its shards where they are known; else they are read.

        Of those that are known, a shard is opened when a record of it is asked for, and not before.
        ArrayRecord reads files of this machine: what is in a bucket is copied.
        """
        folder = copies.fetched(folder)
        if known is None and not (folder / ABOUT).exists():
            raise FileNotFoundError(
                f"no records in {folder} ({ABOUT} is missing); name a folder that launch.cache or "
                "launch.distill has filled"
            )
        self._folder = folder
        self.about = about(folder) if known is None else {}
        self.shards = finished(folder) if known is None else dict(known)
        filled = {number: shard for number, shard in self.shards.items() if shard["records"]}
        if not filled:
            raise FileNotFoundError(f"{folder} has no finished shard yet; let the command finish")
        for number, shard in filled.items():
            _check_size(data(folder, number), shard)
        names = {number: str(data(folder, number)) for number in filled}
        if known is not None:  # what says how many records there are need not be opened to count
            names = {number: f"{names[number]}[0:{filled[number]['records']}]" for number in names}
        try:
            self._source = ArrayRecordDataSource(list(names.values()))
        except RuntimeError as error:  # the library's, for whatever it cannot read
            raise ValueError(f"a shard in {folder} is damaged ({error}); {_AGAIN}") from error
        if len(self) != sum(shard["records"] for shard in filled.values()):
            raise ValueError(f"{folder} has lost records since they were written; {_AGAIN}")

    def __len__(self) -> int:
        return len(self._source)

    def __getitem__(self, index: int) -> bytes:
        if not 0 <= index < len(self):
            raise IndexError(index)
        try:
            return self._source[index]
        except RuntimeError as error:
            raise ValueError(f"a shard in {self._folder} is damaged ({error}); {_AGAIN}") from error

    @property
    def bytes(self) -> int:
        """On the disk."""
        filled = (number for number, shard in self.shards.items() if shard["records"])
        return sum(data(self._folder, number).stat().st_size for number in filled)

    def verify(self) -> None:
        """Reads everything; raises ValueError for a shard that is not what was written."""
        for number, shard in self.shards.items():
            path = data(self._folder, number)
            if shard["records"] and _sha256(path) != shard["sha256"]:
                raise ValueError(f"{path} is damaged; {_AGAIN}")


def _check_size(path: Path, described: Mapping[str, Any]) -> None:
    if not path.exists():
        raise ValueError(f"{path} is missing; {_AGAIN}")
    size = path.stat().st_size
    # Stores of earlier versions do not say how many bytes a shard had.
    if size != described.get("bytes", size):
        raise ValueError(f"{path} has {size} bytes, and had {described['bytes']}; {_AGAIN}")


_AGAIN = "remove its .json and run the command that made it again"


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
