"""A checkpoint on disk as a config and named tensors, whatever its file format.

The one idea: shapes come from headers, tensors one at a time. So a checkpoint that does not fit
is refused before anything heavy is read, and importing needs one tensor more memory than the
result itself.
"""

import contextlib
import dataclasses
import json
import pathlib
from collections.abc import Callable
from typing import Any

import numpy as np
import safetensors

from early_exit.pretrained import gguf_file


@dataclasses.dataclass(frozen=True)
class Checkpoint:
    """An open checkpoint in the words of Hugging Face transformers.

    Attributes:
      path: the folder or file.
      config: what `config.json` says, or would say.
      shapes: name → shape of every tensor; matrices of linear layers are [out, in].
      read: name → the tensor, in its stored dtype (dequantised to float32 if it was quantised).
    """

    path: pathlib.Path
    config: dict[str, Any]
    shapes: dict[str, tuple[int, ...]]
    read: Callable[[str], np.ndarray]


def open_checkpoint(path: pathlib.Path) -> Checkpoint:
    """Opens a `.gguf` file, or a folder with `config.json` and safetensors (single or sharded).

    Raises:
      FileNotFoundError: `config.json`, the weights or some of their shards are not there.
      ValueError: a truncated or damaged file, or a format that is not supported.
    """
    if path.suffix == ".gguf":
        return Checkpoint(path, *gguf_file.open_tensors(path))
    config_path = path / "config.json"
    if not config_path.exists():
        raise FileNotFoundError(f"{path} has no config.json; is it a model folder?")
    file_of = {}
    shapes = {}
    for file, names in _shards(path).items():
        with _opened(file) as shard:
            present = shard.keys()
            if absent := sorted(names - set(present)):
                raise ValueError(
                    f"the index of {path} says {file.name} holds {', '.join(absent)}, but it does "
                    "not; the download is incomplete or its parts are of different models"
                )
            for name in names or present:
                file_of[name] = file
                shapes[name] = tuple(shard.get_slice(name).get_shape())

    def read(name: str) -> np.ndarray:
        with _opened(file_of[name]) as shard:
            return shard.get_tensor(name)

    return Checkpoint(path, _read_json(config_path), shapes, read)


def _shards(folder: pathlib.Path) -> dict[pathlib.Path, set[str]]:
    """File → the tensors the index takes from it; no names stand for all of them."""
    index_path = folder / "model.safetensors.index.json"
    single = folder / "model.safetensors"
    if single.exists():
        return {single: set()}
    if not index_path.exists():
        raise FileNotFoundError(
            f"{folder} has neither model.safetensors nor model.safetensors.index.json; save the "
            "weights as safetensors (pickled .bin files are not read)"
        )
    shards: dict[pathlib.Path, set[str]] = {}
    weight_map = _read_json(index_path).get("weight_map")
    if not isinstance(weight_map, dict):
        raise ValueError(f'{index_path} has no "weight_map"; download it again')
    for name, file in weight_map.items():
        shards.setdefault(folder / file, set()).add(name)
    if missing := sorted(file.name for file in shards if not file.exists()):
        raise FileNotFoundError(
            f"{folder} lacks {', '.join(missing)}, which {index_path.name} names; download the "
            "missing shards"
        )
    return shards


@contextlib.contextmanager
def _opened(file: pathlib.Path):
    try:
        with safetensors.safe_open(file, framework="numpy") as shard:
            yield shard
    except safetensors.SafetensorError as error:
        raise ValueError(f"{file} is truncated or damaged ({error}); download it again") from error


def _read_json(path: pathlib.Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not valid JSON ({error}); download it again") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} holds a JSON {type(content).__name__}, not an object")
    return content
