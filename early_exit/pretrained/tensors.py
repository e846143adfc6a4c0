"""A checkpoint on disk as a config and named tensors, whatever its file format.

The one idea: shapes come from headers, tensors one at a time. So a checkpoint that does not fit
is refused before anything heavy is read, and importing needs one tensor more memory than the
result itself.
"""

import dataclasses
import pathlib
import re
from collections.abc import Callable
from typing import Any

import numpy as np

from early_exit.storage import extras, files


@dataclasses.dataclass(frozen=True)
class Checkpoint:
    """An open checkpoint in the words of Hugging Face transformers.

    Attributes:
      path: the folder or file.
      config: what `config.json` says, or would say.
      shapes: name → shape of every tensor; matrices of linear layers are [out, in].
      dtypes: name → its stored dtype, as safetensors or GGUF spell it, such as F32 or Q4_1.
      read: name → the tensor, in its stored dtype (dequantised to float32 if it was quantised).
    """

    path: pathlib.Path
    config: dict[str, Any]
    shapes: dict[str, tuple[int, ...]]
    dtypes: dict[str, str]
    read: Callable[[str], np.ndarray]


def open_checkpoint(path: pathlib.Path) -> Checkpoint:
    """Opens a `.gguf` file, or a folder with `config.json` and safetensors (single or sharded).

    Raises:
      FileNotFoundError: `config.json`, the weights or some of their shards are not there.
      ValueError: a truncated or damaged file, or a format that is not supported.
    """
    if path.suffix == ".gguf":
        with extras.needed("gguf"):
            from early_exit.pretrained import gguf_file

        return Checkpoint(path, *gguf_file.open_tensors(path))
    config_path = path / "config.json"
    if not config_path.exists():
        raise FileNotFoundError(f"{path} has no config.json; is it a model folder?")
    origin, stored = {}, {}
    for file, names in _shards(path).items():
        present = files.read_header(file)
        if absent := sorted(names - present.keys()):
            raise ValueError(
                f"the index of {path} says {file.name} holds {', '.join(absent)}, but it does "
                "not; the download is incomplete or its parts are of different models"
            )
        for name in names or present:
            today = _todays_name(name)
            origin[today], stored[today] = (file, name), present[name]

    return Checkpoint(
        path,
        files.read_json(config_path),
        {name: tensor.shape for name, tensor in stored.items()},
        {name: tensor.dtype for name, tensor in stored.items()},
        lambda name: files.read_tensor(*origin[name]),
    )


def _todays_name(name: str) -> str:
    """Checkpoints that began in TensorFlow, such as Google's BERTs, spell LayerNorms otherwise."""
    return re.sub(
        r"(?<=LayerNorm\.)(gamma|beta)$", lambda m: {"gamma": "weight", "beta": "bias"}[m[0]], name
    )


def _shards(folder: pathlib.Path) -> dict[pathlib.Path, set[str]]:
    """File → the tensors the index takes from it; no names stand for all of them."""
    index_path = folder / "model.safetensors.index.json"
    single = folder / "model.safetensors"
    if single.exists():
        return {single: set()}
    if not index_path.exists():
        raise FileNotFoundError(
            f"{folder} has neither model.safetensors nor model.safetensors.index.json; save the "
            "weights as safetensors (pickled .bin and .pth files are not read)"
        )
    shards: dict[pathlib.Path, set[str]] = {}
    weight_map = files.read_json(index_path).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise ValueError(f'{index_path} has no "weight_map"; download it again')
    # Names of files in this very folder, and no path that leads out of it.
    wrong = [f for f in weight_map.values() if not isinstance(f, str) or pathlib.Path(f).name != f]
    if wrong:
        raise ValueError(f"{index_path} names {wrong[0]!r}, which is no file of its own folder")
    for name, file in weight_map.items():
        shards.setdefault(folder / file, set()).add(name)
    if missing := sorted(file.name for file in shards if not file.exists()):
        raise FileNotFoundError(
            f"{folder} lacks {', '.join(missing)}, which {index_path.name} names; download the "
            "missing shards"
        )
    return shards
