"""Files in open formats: JSON objects, and named arrays as safetensors, read and written.

The one idea: a file comes from somewhere else and may hold anything, so whatever is wrong with it
is one error that names it; and what this project writes appears whole or not at all. Arrays come
by their header first, then one at a time. Nothing in a file is ever executed.

Format: https://github.com/huggingface/safetensors#format
"""

import contextlib
import json
import math
import os
import struct
import tempfile
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np
import safetensors

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
    path: Path,
    arrays: Iterable[tuple[str, tuple[int, ...], np.dtype]],
    get: Callable[[str], np.ndarray],
    metadata: dict[str, str] | None = None,
) -> None:
    """Writes a file, asking for one array at a time.

    Args:
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
    with open(path, "wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for name, shape, dtype in arrays:
            array = np.asarray(get(name), order="C")
            if array.shape != tuple(shape) or array.dtype != dtype:
                raise ValueError(f"{name} is {array.dtype} {array.shape}, not {dtype} {shape}")
            file.write(array.reshape(-1).view(np.uint8).data)
        file.flush()
        os.fsync(file.fileno())


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

    Who reads `path` meanwhile, or after a kill, finds the file that was there before.
    """
    partial = path.with_name(f"{path.name}.partial{os.getpid()}")
    try:
        yield partial
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Writes what `read_json` reads, whole or not at all."""
    with replacing(path) as partial:
        partial.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


@contextlib.contextmanager
def new_folder(folder: Path) -> Iterator[Path]:
    """An empty folder to write into, which gets the name `folder` when all has gone well.

    Raises:
      FileExistsError: there is something under that name.
    """
    if folder.exists():
        raise FileExistsError(f"{folder} exists already; name a new folder")
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{folder.name}-") as scratch:
        inside = Path(scratch) / "new"
        inside.mkdir()
        yield inside
        os.rename(inside, folder)
