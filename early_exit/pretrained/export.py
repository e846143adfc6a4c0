"""A backbone back out: a folder that `transformers` loads.

The one idea: the table that imports a family exports it too, so that a family whose config and
tensors come in also goes out, value for value. Tensors are written one at a time.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from early_exit import sharding, tree
from early_exit.backbones import base
from early_exit.pretrained import families, generation, preprocessor, table
from early_exit.pretrained.generation import Generation
from early_exit.storage import files

# What an answer ends or begins with: entries of a `config.json` that only a tokenizer knows.
_TOKEN_IDS = ("bos_token_id", "eos_token_id", "pad_token_id")


def export_backbone(
    folder: Path,
    config: base.BackboneConfig,
    params: base.Params,
    tokenizer=None,
    writes: Generation = generation.SILENT,
    images: Mapping[str, Any] | None = None,
) -> None:
    """Writes a new folder; it appears whole or not at all.

    Args:
      params: the backbone's parameters, arrays of one floating-point type, which is kept.
      tokenizer: a `transformers` fast tokenizer to go with it.
      writes: how the model is to write, for `generation_config.json`.
      images: how images are made ready, for `preprocessor_config.json`.

    Raises:
      FileExistsError: there is something under that name.
      ValueError: no family of `transformers` says what this config says.
      OSError: the folder cannot be written.
    """
    with files.new_folder(folder) as inside:
        write_backbone(inside, config, params, tokenizer, writes, images)


def write_backbone(
    folder: Path | None,
    config: base.BackboneConfig,
    params: base.Params,
    tokenizer=None,
    writes: Generation = generation.SILENT,
    images: Mapping[str, Any] | None = None,
) -> None:
    """Like `export_backbone`, into a folder that is there; None where another process writes."""
    family, hf = families.writing(config)
    flat = tree.flatten(params)
    dtype = str(next(iter(flat.values())).dtype)
    entries = {entry.name: entry for entry in family.entries(config) if not entry.optional}
    described = [
        (name, table.stored_shape(entry, [flat[path].shape for path in entry.paths]), dtype)
        for name, entry in entries.items()
    ]

    def tensor(name: str) -> np.ndarray:
        entry = entries[name]
        return entry.layout.join([sharding.whole(entry.of(flat[path])) for path in entry.paths])

    weights = None if folder is None else folder / "model.safetensors"
    files.write_tensors(weights, described, tensor, {"format": "pt"})
    if folder is None:
        return
    if tokenizer is not None:
        tokenizer.save_pretrained(folder)
    if config.reads == "tokens":
        # Without a tokenizer nothing: the tokens that transformers would put there are those of
        # the family's first model. The family's own come last: a RoBERTa's positions start at its
        # padding.
        hf = {name: getattr(tokenizer, name, None) for name in _TOKEN_IDS} | hf
    files.write_json(folder / "config.json", hf | {"dtype": dtype})
    if said := writes.as_json():
        files.write_json(folder / generation.FILE, said)
    if images is not None:
        files.write_json(folder / preprocessor.FILE, dict(images))
