"""GGUF, llama.cpp's file format: its header, and its tensors under transformers' names.

The one idea: the file is translated into what a Hugging Face folder would say (config, tensor
names, layout of Q and K), so that nothing after this room knows which of the two it was.

The header is read here rather than by `gguf.GGUFReader`, which believes every length it meets: a
damaged one makes it loop for hours. Tensor types and their dequantisation are the library's.

Format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""

import dataclasses
import functools
import mmap
import os
import pathlib
import struct
from collections.abc import Callable
from typing import Any

import numpy as np
from gguf import GGMLQuantizationType, GGUFValueType, quants

from early_exit.pretrained import gguf_architectures, gguf_config

_SCALARS = {
    GGUFValueType.UINT8: "<u1",
    GGUFValueType.INT8: "<i1",
    GGUFValueType.UINT16: "<u2",
    GGUFValueType.INT16: "<i2",
    GGUFValueType.UINT32: "<u4",
    GGUFValueType.INT32: "<i4",
    GGUFValueType.FLOAT32: "<f4",
    GGUFValueType.BOOL: "?",
    GGUFValueType.UINT64: "<u8",
    GGUFValueType.INT64: "<i8",
    GGUFValueType.FLOAT64: "<f8",
}


@dataclasses.dataclass(frozen=True)
class Stored:
    """Where a tensor lies in the file. `shape` is in numpy's order, the fastest axis last."""

    shape: tuple[int, ...]
    type: GGMLQuantizationType
    offset: int

    @property
    def byte_shape(self) -> tuple[int, ...]:
        return quants.quant_shape_to_byte_shape(self.shape, self.type)

    @property
    def size(self) -> int:
        return int(np.prod(self.byte_shape, dtype=object))


def read_header(path: pathlib.Path) -> tuple[dict[str, Any], dict[str, Stored]]:
    """(metadata, tensors) of a GGUF file.

    Raises:
      ValueError: not a GGUF file, or a truncated or damaged one.
    """
    seen = os.stat(path)
    metadata, stored = _header(path, seen.st_mtime_ns, seen.st_size)
    return dict(metadata), dict(stored)


@functools.lru_cache(maxsize=2)  # a network and its tokenizer both ask; a vocabulary is long
def _header(path: pathlib.Path, *_) -> tuple[dict[str, Any], dict[str, Stored]]:
    try:
        with open(path, "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            return _parse_header(_Cursor(data))
    except ValueError as error:
        raise ValueError(
            f"{path} is not a GGUF file, or is truncated or damaged ({error}); download it again"
        ) from error


def open_tensors(
    path: pathlib.Path,
) -> tuple[dict[str, Any], dict[str, tuple[int, ...]], dict[str, str], Callable[[str], np.ndarray]]:
    """A GGUF file as (config, shapes, dtypes, read); see `tensors.Checkpoint`.

    Raises:
      ValueError: a damaged file, another architecture, or metadata that is missing.
    """
    metadata, stored = read_header(path)
    name = metadata.get("general.architecture")
    if name not in gguf_architectures.BY_NAME:
        raise ValueError(
            f"{path} holds a model of the architecture {name!r}; of GGUF files only "
            f"{', '.join(map(repr, gguf_architectures.BY_NAME))} are read. Use the model's "
            "safetensors folder if its family is supported"
        )
    if metadata.get("split.count", 1) != 1:
        raise ValueError(f"{path} is one of several parts; join them with llama-gguf-split --merge")
    architecture = gguf_architectures.BY_NAME[name]
    vectors = {
        vector: _read_tensor(path, stored.pop(vector))
        for vector in gguf_config.VECTORS
        if vector in stored
    }
    config = architecture.config(path, metadata, stored, vectors)
    gguf_names = {architecture.transformers_name(tensor): tensor for tensor in stored}

    def read(name: str) -> np.ndarray:
        gguf_name = gguf_names[name]
        tensor = _read_tensor(path, stored[gguf_name])
        return architecture.as_transformers(gguf_name, tensor, config)

    shapes = {name: stored[gguf_name].shape for name, gguf_name in gguf_names.items()}
    dtypes = {name: stored[gguf_name].type.name for name, gguf_name in gguf_names.items()}
    return config, shapes, dtypes, read


def _read_tensor(path: pathlib.Path, stored: Stored) -> np.ndarray:
    data = np.fromfile(path, np.uint8, stored.size, offset=stored.offset)
    try:
        return quants.dequantize(data.reshape(stored.byte_shape), stored.type)
    except NotImplementedError as error:
        raise ValueError(f"{path} stores tensors as {stored.type.name}: {error}") from error


class _Cursor:
    """Reads a header front to back; whatever would lie beyond the file's end is an error."""

    def __init__(self, data: mmap.mmap):
        self.data = data
        self.offset = 0

    def take(self, size: int) -> bytes:
        end = self.offset + size
        self._check_within(end)
        taken = self.data[self.offset : end]
        self.offset = end
        return taken

    def _check_within(self, end: int) -> None:
        if end > len(self.data):
            raise ValueError(f"the header runs past the file's end at byte {len(self.data)}")

    def u32(self) -> int:
        return struct.unpack("<I", self.take(4))[0]

    def u64(self) -> int:
        return struct.unpack("<Q", self.take(8))[0]

    def string(self) -> str:
        return self.strings(1)[0]

    def strings(self, count: int) -> list[str]:
        """In one loop: a vocabulary and its merges are a hundred thousand."""
        found, data, at = [], self.data, self.offset
        for _ in range(count):
            begin = at + 8
            at = begin + int.from_bytes(data[at:begin], "little")
            self._check_within(at)
            found.append(data[begin:at].decode("utf-8"))
        self.offset = at
        return found

    def value(self, kind: int) -> Any:
        kind = GGUFValueType(kind)
        if kind == GGUFValueType.STRING:
            return self.string()
        if kind != GGUFValueType.ARRAY:
            return self.scalars(kind, 1)[0]
        kind, count = GGUFValueType(self.u32()), self.u64()
        if kind in _SCALARS:
            return self.scalars(kind, count)
        if kind == GGUFValueType.STRING:
            return self.strings(count)
        return [self.value(kind) for _ in range(count)]

    def scalars(self, kind: GGUFValueType, count: int) -> list:
        dtype = np.dtype(_SCALARS[kind])
        return np.frombuffer(self.take(count * dtype.itemsize), dtype).tolist()


def _parse_header(cursor: _Cursor) -> tuple[dict[str, Any], dict[str, Stored]]:
    if cursor.take(4) != b"GGUF":
        raise ValueError("it does not start with GGUF")
    if (version := cursor.u32()) not in (2, 3):
        raise ValueError(f"version {version} is not 2 or 3")
    tensor_count, metadata_count = cursor.u64(), cursor.u64()
    metadata = {}
    for _ in range(metadata_count):
        key = cursor.string()
        metadata[key] = cursor.value(cursor.u32())
    infos = {}
    for _ in range(tensor_count):
        name = cursor.string()
        shape = tuple(cursor.u64() for _ in range(cursor.u32()))[::-1]
        if not shape:
            raise ValueError(f"{name} has no dimensions")
        if name in infos:
            raise ValueError(f"{name} is there twice")
        infos[name] = shape, GGMLQuantizationType(cursor.u32()), cursor.u64()
    alignment = metadata.get("general.alignment", 32)
    if not isinstance(alignment, int) or alignment < 1:
        raise ValueError(f"general.alignment is {alignment!r}")
    start = -(-cursor.offset // alignment) * alignment
    stored = {}
    for name, (shape, type_, offset) in infos.items():
        tensor = stored[name] = Stored(shape, type_, start + offset)
        if tensor.offset + tensor.size > len(cursor.data):
            raise ValueError(
                f"{name} ends at byte {tensor.offset + tensor.size} of a file of {len(cursor.data)}"
            )
    return metadata, stored
