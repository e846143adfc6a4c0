"""Texts of Parquet files, some rows at a time, and what else pyarrow reads.

The one idea: a file's footer says all that is needed to divide it among processes, and whether
there is a text in it at all; so a missing column shows before any row is read.
"""

import contextlib
import io
from collections.abc import Iterator
from typing import Any, BinaryIO

import fsspec

from early_exit.storage import extras

SUFFIX = ".parquet"
# Rows in memory at a time.
_ROWS = 256


def group_bytes(path: str, field: str) -> list[int]:
    """Bytes of text, uncompressed, in each row group of a file.

    Raises:
      ValueError: no Parquet file, or no column of that name that holds texts.
      RuntimeError: pyarrow is not installed.
    """
    with _opened(path) as file:
        column = _column(file, path, field)
        groups = map(file.metadata.row_group, range(file.metadata.num_row_groups))
        return [group.column(column).total_uncompressed_size for group in groups]


def texts(path: str, field: str, start: int, stop: int) -> Iterator[tuple[int, int, str]]:
    """(row group, number in it, text) of the rows in row groups `start` to `stop`; no nulls.

    Raises:
      ValueError: as `group_bytes`, or a damaged row group.
    """
    with _opened(path) as file:
        _column(file, path, field)
        for group in range(start, stop):
            batches = file.iter_batches(_ROWS, row_groups=[group], columns=[field])
            number = 0
            for batch in batches:
                for text in batch.column(0).to_pylist():
                    if text is not None:
                        yield group, number, text
                    number += 1


def unpacked(file: BinaryIO, how: str) -> BinaryIO:
    """A compressed file as it was before, such as of `zstd`."""
    with extras.needed("corpus"):
        import pyarrow

    return io.BufferedReader(pyarrow.CompressedInputStream(pyarrow.PythonFile(file), how), 1 << 20)


@contextlib.contextmanager
def _opened(path: str) -> Iterator[Any]:
    with extras.needed("corpus"):
        import pyarrow
        from pyarrow import parquet

    try:
        with fsspec.open(path, "rb") as raw:
            yield parquet.ParquetFile(raw)
    except pyarrow.ArrowException as error:
        raise ValueError(f"{path} is damaged, or no Parquet file ({error})") from error


def _column(file: Any, path: str, field: str) -> int:
    """The number of the column with the texts."""
    import pyarrow

    schema = file.schema_arrow
    kinds = {name: schema.field(name).type for name in schema.names}
    if field not in kinds:
        raise ValueError(
            f"{path} has no column {field!r}, only {', '.join(kinds) or 'none'}; name the one with "
            "the texts"
        )
    kind = kinds[field]
    if pyarrow.types.is_dictionary(kind):
        kind = kind.value_type
    if not (pyarrow.types.is_string(kind) or pyarrow.types.is_large_string(kind)):
        raise ValueError(f"column {field!r} of {path} holds {kinds[field]}, and not texts")
    # Columns of Parquet are leaves, of which a nested one has several.
    paths = [file.metadata.schema.column(i).path for i in range(len(file.metadata.schema))]
    return paths.index(field)
