"""Checkpoints of a run: the state, the data iterator and what they belong to, as one unit.

    with Saver(folder) as saver:
        saver.save(step, state, iterator_state, metadata)     # returns before the disk is done
    state, iterator_state = restore(folder, like)

The one idea: a checkpoint gets its step number only after everything in it is on disk. So
whatever is listed is whole, whenever the run was killed, and reading needs no more than the
folder. The only room that knows Orbax.
"""

import contextlib
import os
from typing import Any

import jax
from etils import epath
from orbax.checkpoint.experimental import v1 as ocp

from early_exit.storage import buckets, files

Tree = Any


def _context() -> ocp.Context:
    context = ocp.Context()
    # What may be left out of `like` is decided in `_check`, more strictly.
    context.pytree.loading.partial_load = True
    registry = ocp.handlers.local_registry()
    registry.add(ocp.handlers.JsonHandler, checkpointable_name="info")
    context.checkpointables.registry = registry
    return context


class Saver:
    """Writes checkpoints into `folder`, in the background, and keeps the latest `keep`.

    There may be one at a time for a folder (see `lock`): what a killed run left half-written is
    removed.
    A context manager; leaving it waits for the last checkpoint.
    """

    def __init__(self, folder: epath.PathLike, keep: int = 2):
        """Raises OSError where the folder cannot be written to."""
        if keep < 1:
            raise ValueError(f"keep must be at least 1, not {keep}")
        self._folder = _absolute(folder)
        self._pending = None
        self._failed = False
        try:
            files.make_folder(self._folder)
            if jax.process_index() == 0:
                probe = self._folder / ".writable"
                probe.write_text("")
                probe.unlink()
        except OSError as error:
            raise OSError(f"cannot write checkpoints to {folder}: {error}") from error
        self._checkpointer = ocp.training.Checkpointer(
            self._folder,
            context=_context(),
            preservation_policy=ocp.training.preservation_policies.LatestN(keep),
            cleanup_tmp_directories=True,
        )

    def save(self, step: int, state: Tree, iterator_state: Any, metadata: dict[str, Any]) -> None:
        """Starts to save, after waiting for the save before; `state` may then be donated.

        Args:
          state: pytree of `jax.Array`s.
          iterator_state: JSON-able, the same in every process.
          metadata: JSON-able, whatever tells what the state belongs to.

        Raises:
          OSError: the save before failed (see `wait`).
        """
        self.wait()
        info = {"iterator_state": iterator_state, "metadata": metadata}
        self._pending = self._checkpointer.save_checkpointables_async(
            step, {"state": state, "info": info}, force=True
        )

    def wait(self) -> None:
        """Returns when the last checkpoint is on disk.

        Raises:
          OSError: it could not be written. The checkpoints before it are still there.
        """
        pending, self._pending = self._pending, None
        if pending is None:
            return
        try:
            pending.result()
        except Exception as error:  # Orbax gives a full disk as a ValueError, among others
            self._failed = True
            last = latest_step(self._folder)
            raise OSError(
                f"the checkpoint could not be written to {self._folder}: {error}; "
                f"the last good one is {'none' if last is None else f'of step {last}'}. "
                "Free some space and start again"
            ) from error

    def close(self) -> None:
        """Waits, and ends the threads."""
        try:
            self.wait()
        finally:
            # After a failed save Orbax raises the same error again, which would hide ours.
            with contextlib.suppress(Exception) if self._failed else contextlib.nullcontext():
                self._checkpointer.close()

    def __enter__(self) -> "Saver":
        return self

    def __exit__(self, *exception) -> None:
        self.close()


def check_place(folder: epath.PathLike) -> None:
    """Raises ValueError where no checkpoints can be kept: Orbax has disks and gs:// only."""
    if buckets.is_remote(folder) and not os.fspath(folder).startswith("gs://"):
        raise ValueError(
            f"checkpoints cannot be kept in {folder}: Orbax writes them to disks and to "
            "gs:// only. Tune into a folder here or in gs://; weights, text and tokens may be "
            "there, and launch.export may write there"
        )


def steps(folder: epath.PathLike) -> list[int]:
    """Of all whole checkpoints in `folder`, rising."""
    folder = epath.Path(buckets.place(folder))
    if not folder.is_dir():
        return []
    found = [path for path in folder.iterdir() if path.name.isdecimal()]
    return sorted(int(path.name) for path in found if ocp.is_orbax_checkpoint(path))


def latest_step(folder: epath.PathLike) -> int | None:
    """Step of the newest whole checkpoint in `folder`, None without one."""
    return max(steps(folder), default=None)


def restore(folder: epath.PathLike, like: Tree, step: int | None = None) -> tuple[Tree, Any]:
    """State and iterator state of a checkpoint, the newest if `step` is None.

    Args:
      like: `jax.Array`s or `jax.ShapeDtypeStruct`s that give shapes, dtypes and shardings (none
        means one device). The shardings need not be those of the run that saved. Top-level
        entries may be left out and are then not read: `{"params": …}` without `opt_state`.

    Raises:
      FileNotFoundError: no such checkpoint.
      ValueError: the checkpoint does not fit `like`; lists every path that differs.
    """
    path = _path(folder, step)
    device = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    like = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding or device), like
    )
    with _context():
        saved = ocp.metadata(path, checkpointable_name="state").metadata
        _check(path, saved, like)
        state = ocp.load(path, like, checkpointable_name="state")
    return state, _info(path)["iterator_state"]


def metadata(folder: epath.PathLike, step: int | None = None) -> dict[str, Any]:
    """What `Saver.save` was given as metadata.

    Raises:
      FileNotFoundError: no such checkpoint.
    """
    return _info(_path(folder, step))["metadata"]


def _info(path: epath.Path) -> dict[str, Any]:
    with _context():
        return ocp.load_checkpointables(path, {"info": None})["info"]


def _path(folder: epath.PathLike, step: int | None) -> epath.Path:
    found = steps(folder)
    if not found:
        raise FileNotFoundError(f"no checkpoint in {folder}")
    if step is not None and step not in found:
        raise FileNotFoundError(
            f"no checkpoint of step {step} in {folder}; it has {', '.join(map(str, found))}"
        )
    return _absolute(folder) / str(found[-1] if step is None else step)


def _absolute(folder: epath.PathLike) -> epath.Path:
    folder = epath.Path(buckets.place(folder))
    return folder if buckets.is_remote(folder) else folder.absolute()


def _check(path: epath.Path, saved: dict[str, Any], like: dict[str, Any]) -> None:
    """Orbax casts dtypes without a word; this refuses, and lists all that differs at once."""
    described = _described({name: saved[name] for name in like if name in saved})
    wanted = _described(like)
    differ = [
        f"  {leaf}: checkpoint has {described.get(leaf, 'nothing')}, "
        f"model has {wanted.get(leaf, 'nothing')}"
        for leaf in sorted(described.keys() | wanted.keys())
        if described.get(leaf) != wanted.get(leaf)
    ]
    if differ:
        raise ValueError("\n".join([f"the checkpoint {path} does not fit the model:", *differ]))


def _described(tree: Tree) -> dict[str, str]:
    """Path → dtype and shape. Optimizer states have tuples, so `tree.flatten` won't do."""
    return {
        jax.tree_util.keystr(path, simple=True, separator="/"): f"{leaf.dtype} {leaf.shape}"
        for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
    }
