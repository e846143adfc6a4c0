"""Tables of texts as hubs have them: of the Hugging Face hub, and TensorFlow Datasets.

The one idea: their libraries fetch a table once, keep it on the disk, and read any row of it; here
it is only asked how many rows there are, and for the texts of some.
"""

import functools
import pathlib
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

from early_exit.data import tfds_sets
from early_exit.storage import extras

HF, TFDS = "hf:", "tfds:"
KINDS = (HF, TFDS)
_SPLIT = "train"
# Rows in memory at a time.
_ROWS = 256


class Table(NamedTuple):
    """Rows of a table.

    Attributes:
      rows, bytes: how many; bytes are roughly those of its texts.
      read: first row and the one behind the last → their texts.
    """

    rows: int
    bytes: int
    read: Callable[[int, int], list[str | None]]

    def texts(self, start: int, stop: int) -> Iterator[str]:
        """Of these rows, but for those that have none."""
        for first in range(start, stop, _ROWS):
            found = self.read(first, min(first + _ROWS, stop))
            yield from (text for text in found if text is not None)


@functools.lru_cache(maxsize=2)
def opened(source: str, field: str) -> Table:
    """The split `train` of `hf:NAME`, `hf:NAME:CONFIG` or `tfds:NAME`; fetched if it is not there.

    Behind `hf:` there may be a folder, of `Dataset.save_to_disk` or with files that `datasets`
    reads; behind `tfds:` one that TFDS has prepared.

    Raises:
      ValueError: no such set, or no such texts in it.
      RuntimeError: a library is not installed; names it.
    """
    name = source.partition(":")[2]
    return _of_hf(name, field) if source.startswith(HF) else _of_tfds(name, field)


def _of_hf(name: str, field: str) -> Table:
    with extras.needed("corpus"):
        import datasets

    folder = pathlib.Path(name).expanduser()
    saved = any((folder / told).exists() for told in ("state.json", "dataset_dict.json"))
    name, _, config = name.partition(":")
    try:
        if saved:
            found = datasets.load_from_disk(str(folder))
            found = found[_SPLIT] if isinstance(found, datasets.DatasetDict) else found
        else:
            place = str(folder) if folder.is_dir() else name
            found = datasets.load_dataset(place, config or None, split=_SPLIT)
    except Exception as error:  # the libraries raise their own, and those of the network
        raise ValueError(
            f"{HF}{name} cannot be had: {error}. Check its name, the connection and "
            f"HF_HUB_OFFLINE, and whether it has a split {_SPLIT!r}; or give the folder of a copy"
        ) from error
    kind = found.features.get(field)
    if getattr(kind, "dtype", None) not in ("string", "large_string"):
        told = ", ".join(f"{column} ({kind})" for column, kind in found.features.items())
        raise ValueError(f"{HF}{name} has no texts in a column {field!r}; it has {told}")
    only = found.select_columns([field])
    return Table(len(only), only.data.nbytes, lambda start, stop: only[start:stop][field])


def _of_tfds(name: str, field: str) -> Table:
    builder = tfds_sets.prepared(name)
    features: Any = builder.info.features
    text = tfds_sets.library().features.Text
    names = [key for key, kind in features.items() if isinstance(kind, text)]
    if field not in names:
        told = f"; its texts are {', '.join(names)}" if names else ""
        raise ValueError(
            f"{TFDS}{name} has no text {field!r} among its {', '.join(features)}{told}"
        )
    if _SPLIT not in builder.info.splits:
        raise ValueError(f"{TFDS}{name} has no split {_SPLIT!r}")
    found = tfds_sets.data_source(builder, name, _SPLIT)

    def read(start: int, stop: int) -> list[str]:
        rows = (found[index][field] for index in range(start, stop))
        return [row.decode() if isinstance(row, bytes) else row for row in rows]

    return Table(len(found), builder.info.splits[_SPLIT].num_bytes, read)
