"""A backbone back out: a folder that `transformers` loads.

The one idea: the table that imports a family exports it too, so that a family whose config and
tensors come in also goes out, value for value. Tensors are written one at a time.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np

from early_exit import tree
from early_exit.backbones import base
from early_exit.pretrained import table
from early_exit.pretrained.describe import FAMILIES
from early_exit.storage import files

# What an answer ends or begins with: entries of a `config.json` that only a tokenizer knows.
_TOKEN_IDS = ("bos_token_id", "eos_token_id", "pad_token_id")


def export_backbone(
    folder: Path, config: base.BackboneConfig, params: base.Params, tokenizer=None
) -> None:
    """Writes a new folder; it appears whole or not at all.

    Args:
      params: the backbone's parameters, arrays of one floating-point type, which is kept.
      tokenizer: a `transformers` fast tokenizer to go with it.

    Raises:
      FileExistsError: there is something under that name.
      ValueError: no family of `transformers` says what this config says.
      OSError: the folder cannot be written.
    """
    with files.new_folder(folder) as inside:
        write_backbone(inside, config, params, tokenizer)


def write_backbone(
    folder: Path, config: base.BackboneConfig, params: base.Params, tokenizer=None
) -> None:
    """Like `export_backbone`, into a folder that is there."""
    family, hf = _family_of(config)
    flat = tree.flatten(params)
    dtype = str(next(iter(flat.values())).dtype)
    entries = {entry.name: entry for entry in family.entries(config) if not entry.optional}
    described = [
        (name, table.stored_shape(entry, [flat[path].shape for path in entry.paths]), dtype)
        for name, entry in entries.items()
    ]

    def tensor(name: str) -> np.ndarray:
        entry = entries[name]
        return entry.layout.join([np.asarray(flat[path]) for path in entry.paths])

    files.write_tensors(folder / "model.safetensors", described, tensor, {"format": "pt"})
    if tokenizer is not None:
        tokenizer.save_pretrained(folder)
        known = {name: getattr(tokenizer, name) for name in _TOKEN_IDS}
        # The family's own come last: a RoBERTa's positions start at its padding.
        hf = {name: token for name, token in known.items() if token is not None} | hf
    files.write_json(folder / "config.json", hf | {"dtype": dtype})


def _family_of(config: base.BackboneConfig) -> tuple[ModuleType, Mapping[str, Any]]:
    """The family that says what a config says, and how: reading that again gives the config."""
    reasons = []
    for family in dict.fromkeys(FAMILIES.values()):
        try:
            hf = json.loads(json.dumps(family.to_hf(config)))
            again = family.config(hf)
            if hasattr(family, "adapted"):
                again = family.adapted(again, [entry.name for entry in family.entries(config)])
            if again == config:
                return family, hf
        except AttributeError:  # a config of another class, which is no reason worth telling
            continue
        except (ValueError, KeyError) as error:
            reasons.append(str(error))
    raise ValueError(
        "; ".join([f"no family of transformers has a config that says {config}", *reasons])
    )
