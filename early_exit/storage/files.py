"""Files in open formats: JSON objects, and named arrays as safetensors or `.npz`, read and written.

The one idea: a file comes from somewhere else and may hold anything, so whatever is wrong with it
is one error that names it; and what this project writes appears whole or not at all, and is read
by others, too. Arrays come by their header first, then one at a time. Nothing in a file is ever
executed.

Format: https://github.com/huggingface/safetensors#format
"""

import contextlib
import errno
import glob
import json
import math
import os
import struct
import tempfile
import uuid
import zipfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np
import safetensors

from early_exit.storage import buckets

# Of arrays; the format has more, which this project neither reads nor writes.
DTYPES = {
    "F64": np.dtype(np.float64),
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "I32": np.dtype(np.int32),
}
FLOATS = ("F64", "F32", "F16", "BF16")


class Stored(NamedTuple):
    """An array as its file's header has it; `dtype` as the format spells it, such as F32."""

    shape: tuple[int, ...]
    dtype: str


@contextlib.contextmanager
def _opened(path: Path):
    try:
        with safetensors.safe_open(path, framework="numpy") as file:
            yield file
    except safetensors.SafetensorError as error:
        raise ValueError(f"{path} is truncated or damaged ({error}); download it again") from error


def read_header(path: Path) -> dict[str, Stored]:
    """Name → shape and dtype of every array.

    Raises:
      FileNotFoundError: no such file.
      ValueError: a truncated or damaged file.
    """
    with _opened(path) as file:
        views = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118
        return {
            name: Stored(tuple(view.get_shape()), view.get_dtype()) for name, view in views.items()
        }


def read_tensor(path: Path, name: str) -> np.ndarray:
    """One array, in its stored dtype.

    Raises:
      ValueError: a damaged file, or a dtype that is not read.
    """
    with _opened(path) as file:
        dtype = file.get_slice(name).get_dtype()
        if dtype not in DTYPES:
            known = ", ".join(DTYPES)
            raise ValueError(f"{path} stores {name} as {dtype}; only {known} are read")
        return file.get_tensor(name)


def write_tensors(
    path: Path | None,
    arrays: Iterable[tuple[str, tuple[int, ...], np.dtype]],
    get: Callable[[str], np.ndarray],
    metadata: dict[str, str] | None = None,
) -> None:
    """Writes a file, asking for one array at a time; it is whole for who meets it in `new_folder`.

    Args:
      path: None where another process writes: every array is asked for all the same, in the same
        order, for to bring one together may take all processes.
      arrays: name, shape and dtype of each.
      get: name → the array.

    Raises:
      ValueError: a dtype that is not written, or an array unlike its description.
      OSError: the file cannot be written.
    """
    names = {dtype: name for name, dtype in DTYPES.items()}
    # The widest first, so that each begins at a multiple of its size.
    arrays = sorted(arrays, key=lambda array: (-np.dtype(array[2]).itemsize, array[0]))
    described: dict = {"__metadata__": metadata} if metadata else {}
    offset = 0
    for name, shape, dtype in arrays:
        if np.dtype(dtype) not in names:
            raise ValueError(f"{name} is {dtype}; only {', '.join(map(str, names))} are written")
        end = offset + math.prod(shape) * np.dtype(dtype).itemsize
        described[name] = {
            "dtype": names[np.dtype(dtype)],
            "shape": list(shape),
            "data_offsets": [offset, end],
        }
        offset = end
    text = json.dumps(described, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with open(path or os.devnull, "wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for name, shape, dtype in arrays:
            array = np.asarray(get(name), order="C")
            if array.shape != tuple(shape) or array.dtype != dtype:
                raise ValueError(f"{name} is {array.dtype} {array.shape}, not {dtype} {shape}")
            file.write(array.reshape(-1).view(np.uint8).data)


def write_records(path: Path, arrays: Mapping[str, np.ndarray], metadata: dict[str, Any]) -> None:
    """Writes compressed arrays with what there is to say of them, whole or not at all."""
    # Opened here, for a name would get `.npz` appended.
    with replacing(path) as partial, partial.open("wb") as file:
        np.savez_compressed(file, metadata=np.array(json_text(metadata)), **arrays)


@contextlib.contextmanager
def opened_records(path: Path) -> Iterator[tuple[Mapping[str, np.ndarray], dict[str, Any]]]:
    """What `write_records` wrote: the arrays, each read when it is asked for, and the metadata.

    Raises:
      FileNotFoundError: no such file, naming the command that writes it.
      ValueError: a damaged file, or what was asked of it, in the block, is not there or not sound.
    """
    if not path.exists():
        raise FileNotFoundError(f"no records at {path}; write them with `launch.calibrate`")
    try:
        with path.open("rb") as raw, np.load(raw, allow_pickle=False) as file:
            yield file, json.loads(str(file["metadata"]))
    except (zipfile.BadZipFile, EOFError, KeyError, TypeError, ValueError) as error:
        raise ValueError(
            f"{path} holds no records ({error!r}); delete it, and `launch.calibrate` will "
            "write it again"
        ) from error


def beginning(arrays: Mapping[str, np.ndarray], prefix: str) -> dict[str, np.ndarray]:
    """Those whose names begin with a prefix, under the names without it."""
    own = [name for name in arrays if name.startswith(prefix)]
    return {name.removeprefix(prefix): arrays[name] for name in own}


def read_json(path: Path) -> dict[str, Any]:
    """A file that holds one JSON object.

    Raises:
      FileNotFoundError: no such file.
      ValueError: it holds something else, or a name twice.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"), object_pairs_hook=_object)
    except (ValueError, RecursionError) as error:  # bad text, bad syntax, names that are not unique
        raise ValueError(f"{path} is not valid JSON ({error}); download it again") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} holds a JSON {type(content).__name__}, not an object")
    return content


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """JSON lets a name stand twice, and Python silently takes the last."""
    content = {}
    for name, value in pairs:
        if name in content:
            raise ValueError(f"{name!r} stands twice in one object")
        content[name] = value
    return content


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Where to write a file that replaces the one at `path`, if any, when all has gone well.

    Who reads `path` meanwhile, or after a kill or a power cut, finds one of the two, and whole.
    Nobody else writes at the place given, be it on another host of a shared disk. For a path in a
    bucket that place is on this machine, and its file is then put into the bucket in one piece.
    """
    if buckets.is_remote(path):
        with tempfile.TemporaryDirectory(prefix="early_exit-") as scratch:
            partial = Path(scratch) / path.name
            yield partial
            buckets.put(partial, path)
        return
    partial = path.with_name(f"{path.name}{_PARTIAL}{uuid.uuid4().hex[:12]}")
    try:
        yield partial
        _flush(partial)
        os.replace(partial, path)
        _flush(path.parent)
    finally:
        partial.unlink(missing_ok=True)


_PARTIAL = ".partial-"


def remove_partial(path: Path) -> None:
    """Removes what killed processes left of `path`; only for who is alone in writing it."""
    if buckets.is_remote(path):  # where nothing is ever partial
        return
    for left in path.parent.glob(f"{glob.escape(path.name)}{_PARTIAL}*"):
        left.unlink(missing_ok=True)


def _flush(path: Path) -> None:
    """Returns when a file's bytes, or the names in a folder, are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):  # some file systems have none
            raise
    finally:
        os.close(descriptor)


def write_text(path: Path, text: str) -> None:
    """Writes a file as UTF-8, whole or not at all."""
    with replacing(path) as partial:
        partial.write_text(text, encoding="utf-8")


def json_text(content: Any, **how: Any) -> str:
    """JSON that every reader takes (RFC 8259), which has no NaN and no infinities.

    NaN becomes null, and the infinities the strings "Infinity" and "-Infinity", which `float`
    reads.

    Args:
      how: for `json.dumps`, such as `indent`.
    """
    return json.dumps(plain(content), allow_nan=False, **how)


def plain(content: Any) -> Any:
    """What is read of `content` when `json_text` has written it; keys that are no text become so.

    Raises:
      TypeError: something that JSON has no form for.
    """
    if isinstance(content, float) and not math.isfinite(content):
        return None if math.isnan(content) else "Infinity" if content > 0 else "-Infinity"
    if isinstance(content, Mapping):
        return {_name(name): plain(value) for name, value in content.items()}
    if isinstance(content, list | tuple):
        return [plain(value) for value in content]
    return content


def _name(name: Any) -> str:
    return name if isinstance(name, str) else json.dumps(name)


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Writes what `read_json` reads, whole or not at all; see `json_text` for NaN."""
    write_text(path, json_text(content, indent=2) + "\n")


def write_json_lines(path: Path, rows: Iterable[dict[str, Any]]) -> None:
    """Writes a line of JSON for each row, whole or not at all; see `json_text` for NaN."""
    write_text(path, "".join(json_text(row, ensure_ascii=False) + "\n" for row in rows))


def size(path: Path) -> int:
    """Bytes of a file."""
    found = path.stat()
    return found.length if buckets.is_remote(path) else found.st_size


def make_folder(folder: Path) -> None:
    """Makes a folder, with those around it, if it is not there; in a bucket there are none."""
    if not buckets.is_remote(folder):
        folder.mkdir(parents=True, exist_ok=True)


@contextlib.contextmanager
def new_folder(folder: Path, last: str = "") -> Iterator[Path]:
    """An empty folder to write into, which gets the name `folder` when all has gone well.

    Args:
      last: name of the file without which the others say nothing. In a bucket, where nothing can be
        given another name, it is put there behind them.

    Raises:
      FileExistsError: there is something under that name, be it a link to nothing.
    """
    remote = buckets.is_remote(folder)
    if folder.exists() if remote else os.path.lexists(folder):
        raise FileExistsError(f"{folder} exists already; name a new folder")
    if remote:
        with tempfile.TemporaryDirectory(prefix="early_exit-") as scratch:
            yield Path(scratch)
            new = [path.relative_to(scratch) for path in Path(scratch).rglob("*") if path.is_file()]
            for path in sorted(new, key=lambda path: (str(path) == last, path)):
                buckets.put(scratch / path, folder / str(path))
        return
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{folder.name}-") as scratch:
        inside = Path(scratch) / "new"
        inside.mkdir()
        yield inside
        flush_tree(inside)
        os.rename(inside, folder)
        _flush(folder.parent)


def flush_tree(folder: Path) -> None:
    """Returns when a folder, with all in it, is on the disk."""
    for path in (*folder.rglob("*"), folder):
        if path.is_dir() or path.is_file():
            _flush(path)
