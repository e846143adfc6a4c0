"""A run's model on the devices that there are: the same in every command that runs one.

    python -m launch.calibrate --workdir=runs/a --mesh.tensor=8 --mesh.data=-1
    python -m launch.generate --workdir=runs/a --multihost …     # on every host of a TPU slice

The one idea: how devices share a model is the run's own (`mesh.*` of its settings), and may be
another for each command; where there is one device, there is nothing to share. Of several processes
each runs the same program on its part, and the first one alone prints and writes.
"""

import dataclasses
import os
import sys

import jax
from absl import flags
from jax.sharding import Mesh

from early_exit import sharding
from early_exit.runs import assemble, layout
from early_exit.runs.assemble import Tuned
from early_exit.settings.read import changed
from early_exit.settings.sections import MeshSettings, Settings
from early_exit.training import preemption
from launch import common, processes, usage

_AXES = {
    field.name: flags.DEFINE_integer(
        f"{MeshSettings.prefix}{field.name}",
        None,
        f"{field.metadata['rule'].says} The run's own, if not given.",
    )
    for field in dataclasses.fields(MeshSettings)
}

usage.brief("how devices share the model", *_AXES.values())


def begin(argv: list[str]) -> None:
    """What stands at the start of a command that runs a model: this is one of the processes.

    Raises:
      ValueError, RuntimeError: as `processes.initialize`.
    """
    common.no_arguments(argv)
    processes.initialize()
    preemption.leave_at_once()
    if jax.process_index():  # what is printed is printed once
        sys.stdout = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115


def settings() -> Settings:
    """Those of --config, or else the run's, with the mesh that flags give.

    Raises:
      ValueError, OSError: there are none, or they make no run.
    """
    found = common.settings() or layout.load_config(common.workdir())
    given = {flag.name: flag.value for flag in _AXES.values() if flag.value is not None}
    return changed(found, given) if given else found


def mesh_of(config: Settings) -> Mesh | None:
    """The mesh that settings describe; None for one device.

    Raises:
      ValueError: it does not use exactly the devices that there are.
    """
    if jax.device_count() == 1 and all(flag.value is None for flag in _AXES.values()):
        return None  # wherever it was tuned
    try:
        made = sharding.make_mesh(config.mesh)
    except ValueError as error:
        raise ValueError(f"{error}, for this command alone with --mesh.data=… and so on") from error
    return made if made.size > 1 else None


def load_tuned() -> Tuned:
    """The run's model, every weight read straight to its shards.

    Raises:
      ValueError, OSError: as `settings`, `mesh_of` and `assemble.load_tuned`.
    """
    config = settings()
    return assemble.load_tuned(common.workdir(), config, mesh_of(config))
