"""Records that a run made, as ArrayRecord files: written so that work can go on, checked when read.

    FOLDER/about.json           what the records are and what they were made from
           00000.array_record   a shard
           00000.json           how many records it has, its SHA-256, and what its maker counted

The one idea: a shard follows from its number and from `about` alone, and its description is
written last. So a shard without one was interrupted and is made again, several processes can share
the numbers out among them, and what was damaged later is told from what was never finished.
"""

import hashlib
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from array_record.python import array_record_module
from array_record.python.array_record_data_source import ArrayRecordDataSource

from early_exit.storage import files

ABOUT = "about.json"


def begin(folder: Path, made_from: dict[str, Any]) -> None:
    """Makes the folder, or goes on with one that holds records of the same kind.

    Args:
      made_from: a JSON object that every record follows from, but for its shard's number.

    Raises:
      ValueError: the folder holds other records; names what differs.
    """
    folder.mkdir(parents=True, exist_ok=True)
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
    return (folder / f"{number:05}.json").exists()


def finished(folder: Path) -> dict[int, dict[str, Any]]:
    """The description of each finished shard, by its number."""
    return {int(path.stem): files.read_json(path) for path in sorted(folder.glob("[0-9]*.json"))}


def write(folder: Path, number: int, records: Iterable[bytes], counted: dict[str, Any]) -> None:
    """Writes a shard; it counts as finished when all of it is on the disk.

    Nobody else may write the same one meanwhile; what was left of it by a kill is removed.

    Args:
      records: may be lazy; `counted`, which stands in the shard's description, is read after them.

    Raises:
      OSError: it cannot be written.
    """
    path = folder / f"{number:05}.array_record"
    count = 0
    files.remove_partial(path)
    with files.replacing(path) as partial:
        # Groups of one: each record can be read without its neighbours.
        writer = array_record_module.ArrayRecordWriter(str(partial), "group_size:1")
        for record in records:
            writer.write(record)
            count += 1
        writer.close()
    described = {"records": count, "sha256": _sha256(path)} | counted
    files.write_json(path.with_suffix(".json"), described)


class Store(Sequence[bytes]):
    """The finished shards of a folder: random access to their records, safe to share by threads.

    Attributes:
      about: what they were made from.
      shards: the description of each finished shard, by its number.

    Raises:
      FileNotFoundError: no such folder, or no records in it.
      ValueError: a shard that is missing, cannot be read, or has lost records.
    """

    def __init__(self, folder: Path):
        if not (folder / ABOUT).exists():
            raise FileNotFoundError(
                f"no records in {folder} ({ABOUT} is missing); name a folder that launch.cache or "
                "launch.distill has filled"
            )
        self._folder = folder
        self.about = files.read_json(folder / ABOUT)
        self.shards = finished(folder)
        filled = [number for number, shard in self.shards.items() if shard["records"]]
        if not filled:
            raise FileNotFoundError(f"{folder} has no finished shard yet; let the command finish")
        for number in filled:
            if not self._path(number).exists():
                raise ValueError(f"{self._path(number)} is missing; {_AGAIN}")
        try:
            self._source = ArrayRecordDataSource([str(self._path(number)) for number in filled])
        except RuntimeError as error:  # the library's, for whatever it cannot read
            raise ValueError(f"a shard in {folder} is damaged ({error}); {_AGAIN}") from error
        if len(self) != sum(shard["records"] for shard in self.shards.values()):
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

    def verify(self) -> None:
        """Reads everything; raises ValueError for a shard that is not what was written."""
        for number, shard in self.shards.items():
            if shard["records"] and _sha256(self._path(number)) != shard["sha256"]:
                raise ValueError(f"{self._path(number)} is damaged; {_AGAIN}")

    def _path(self, number: int) -> Path:
        return self._folder / f"{number:05}.array_record"


_AGAIN = "remove its .json and run the command that made it again"


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
