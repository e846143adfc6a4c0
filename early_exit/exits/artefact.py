"""Heads as a published artefact: `exits.json` and `exits.safetensors`, with or without a backbone.

The one idea: heads are worth nothing on other weights than those they were tuned on, so the
artefact names them by fingerprint; and names itself by one, so that damage does not go unseen.

    exits.json         what and where the heads are, what they belong to, how they were made
    exits.safetensors  `6/mlp/up/kernel`, …: block after which the head stands, then its parameter,
                       laid out as in this project ([in, out]); `token_ids`, int32, if reduced
"""

import dataclasses
import types
import typing
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from early_exit import sharding, tree
from early_exit.backbones import base
from early_exit.backbones.identity import Identity
from early_exit.exits.heads import ExitConfig
from early_exit.exits.multi_exit import MultiExit
from early_exit.storage import files

FORMAT = 1
DESCRIPTION, WEIGHTS = "exits.json", "exits.safetensors"
_TOKEN_IDS = "token_ids"


@dataclasses.dataclass(frozen=True)
class Artefact:
    """What `exits.json` says.

    Attributes:
      exits: where the heads are and what they are made of.
      backbone: name of the network they were tuned on (`identity.Identity`).
      arrays: fingerprint of `exits` and `token_ids` together.
      dtype: of the parameters of both.
      config: the run's that made them, as JSON.
      step: of the checkpoint they were taken from.
      data: what the run keeps of the data that it was tuned on, such as the names of the classes;
        None if it kept nothing.
    """

    exits: ExitConfig
    backbone: str
    arrays: str
    dtype: str
    config: dict[str, Any]
    step: int
    data: dict[str, Any] | None = None


def is_in(folder: Path) -> bool:
    return (folder / DESCRIPTION).exists()


def write(
    folder: Path | None,
    model: MultiExit,
    params: base.Params,
    backbone: Identity,
    config: dict[str, Any],
    step: int,
    data: dict[str, Any] | None = None,
) -> None:
    """Writes both files into a folder that is there.

    Args:
      folder: None where another process writes.
      params: `backbone`, `exits` and, for reduced heads, `token_ids`.
      backbone: the network that `params` has.
      config, step, data: see `Artefact`; only kept.
    """
    flat = tree.flatten(params["exits"])
    described = {
        "format": FORMAT,
        "exits": dataclasses.asdict(model.exits),
        "backbone": str(backbone),
        "arrays": tree.fingerprint(_own(params), sharding.whole),
        # Some heads have no parameters at all.
        "dtype": str(jax.tree.leaves((params["exits"], params["backbone"]))[0].dtype),
        "config": config,
        "step": step,
        "data": data,
    }
    if _TOKEN_IDS in params:
        flat = flat | {_TOKEN_IDS: params[_TOKEN_IDS]}
    files.write_tensors(
        None if folder is None else folder / WEIGHTS,
        [(name, leaf.shape, leaf.dtype) for name, leaf in flat.items()],
        lambda name: sharding.whole(flat[name]),
    )
    if folder is not None:
        files.write_json(folder / DESCRIPTION, described)


def describe(folder: Path) -> Artefact:
    """Reads `exits.json`.

    Raises:
      FileNotFoundError: there is none.
      ValueError: it is damaged, or of a format that this version does not read.
    """
    path = folder / DESCRIPTION
    if not path.exists():
        raise FileNotFoundError(f"{folder} holds no exits ({path} is missing)")
    fields = files.read_json(path)
    if fields.get("format") != FORMAT:
        raise ValueError(
            f"{path} is of format {fields.get('format')!r}, and only {FORMAT} is read; "
            "use the version of early_exit that wrote it"
        )
    try:
        about = fields["exits"]
        tuples = {"points": tuple(about["points"])}
        # Earlier versions had none.
        tuples["recurrent_taps"] = tuple(about.get("recurrent_taps", ()))
        exits = ExitConfig(**about | tuples)
        fields = {"data": None} | fields  # earlier versions kept nothing of it
        others = [field.name for field in dataclasses.fields(Artefact)[1:]]
        artefact = Artefact(exits, *(fields[name] for name in others))
        for part in (exits, artefact):
            for name, hint in typing.get_type_hints(type(part)).items():
                kinds = typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)
                kinds = tuple(typing.get_origin(kind) or kind for kind in kinds)
                if not isinstance(getattr(part, name), kinds):
                    raise TypeError(f"{name} is {getattr(part, name)!r}")
        jnp.dtype(artefact.dtype)  # a TypeError if it is none
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{path} does not describe exits: {error}") from error
    return artefact


def attach(
    folder: Path,
    config: base.BackboneConfig,
    backbone: base.Params,
    identity: Identity,
    shardings: Callable[[base.Params], Any] | None = None,
) -> tuple[MultiExit, base.Params]:
    """The heads in `folder` on the backbone they belong to: (model, params).

    Args:
      identity: of the backbone that `config` and `backbone` are.
      shardings: the parameters' shapes → a tree of shardings like them; each array is read straight
        to its devices. Without it, one device has them all.

    Raises:
      FileNotFoundError: a file is missing.
      ValueError: another backbone, naming both; a damaged file; or arrays that are not the ones
        described, listing all of them.
    """
    path, described = folder / WEIGHTS, describe(folder)
    if not path.exists():
        raise FileNotFoundError(f"{folder} lacks {WEIGHTS}, which {DESCRIPTION} describes")
    if not identity.is_named(described.backbone):
        raise ValueError(
            f"the heads that {folder / DESCRIPTION} describes were tuned on a backbone with "
            f"fingerprint {described.backbone[:12]}…, but this one has {str(identity)[:12]}…, by "
            "its weights or by its config; use the backbone they were tuned on"
        )
    try:
        model = MultiExit(config, described.exits)
    except ValueError as error:
        raise ValueError(f"{folder / DESCRIPTION}: {error}") from error
    abstract = model.abstract_exits(described.dtype)
    wanted = tree.flatten(abstract)
    if model.exits.classes:
        ids = jax.ShapeDtypeStruct((model.exits.classes,), jnp.int32)
        wanted = wanted | {_TOKEN_IDS: ids}
    _check(path, wanted)
    places = {} if shardings is None else shardings(wanted)
    arrays = {}
    for name in wanted:
        array = files.read_tensor(path, name)
        arrays[name] = sharding.place(array, places[name]) if places else jnp.array(array)
    params = {
        "backbone": backbone,
        "exits": jax.tree.unflatten(
            jax.tree.structure(abstract), [arrays.pop(name) for name in tree.flatten(abstract)]
        ),
        **arrays,
    }
    if (found := tree.fingerprint(_own(params), sharding.whole)) != described.arrays:
        raise ValueError(
            f"{path} holds arrays with fingerprint {found[:12]}…, but {DESCRIPTION} describes "
            f"{described.arrays[:12]}…; the file is damaged, or of another artefact"
        )
    return model, params


def _own(params: base.Params) -> base.Params:
    return {name: params[name] for name in ("exits", _TOKEN_IDS) if name in params}


def _check(path: Path, wanted: dict[str, jax.ShapeDtypeStruct]) -> None:
    stored = files.read_header(path)
    problems = [f"unexpected: {name} {list(stored[name].shape)}" for name in stored.keys() - wanted]
    for name, leaf in wanted.items():
        described = f"{name} {leaf.dtype} {list(leaf.shape)}"
        if name not in stored:
            problems.append(f"missing: {described}")
        elif (files.DTYPES.get(stored[name].dtype), stored[name].shape) != (leaf.dtype, leaf.shape):
            found = f"{stored[name].dtype} {list(stored[name].shape)}"
            problems.append(f"misfit: {name} {found}, wanted {described}")
    if problems:
        raise ValueError(
            f"the arrays of {path} are not the ones that {DESCRIPTION} describes for this "
            "backbone:\n  " + "\n  ".join(sorted(problems))
        )
