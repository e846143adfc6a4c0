"""The batch that broke a run, as a file: `bad_batch_<step>.npz`, to be run again (`replay`)."""

import zipfile
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from early_exit import sharding
from early_exit.storage import files

_NAME = "bad_batch_{}.npz"


def save(workdir: Path, step: int, batch: dict) -> Path:
    """Writes the whole batch and says where; of several processes, all have to call it.

    Raises:
      OSError: it cannot be written.
    """
    whole, path = sharding.fetch(batch), workdir / _NAME.format(step)
    # The format does not know bfloat16, as cached hidden states have it; float32 holds the same.
    whole = {
        name: x.astype(np.float32) if x.dtype == jnp.bfloat16 else x for name, x in whole.items()
    }
    if jax.process_index() == 0:
        # Opened here, for a name would get `.npz` appended.
        with files.replacing(path) as partial, partial.open("wb") as file:
            np.savez_compressed(file, step=np.int64(step), **whole)
    return path


def keep(workdir: Path, step: int, batch: dict) -> str:
    """Like `save`; returns a sentence about it, also where the disk is full."""
    try:
        path = save(workdir, step, batch)
    except OSError as error:
        return f"The last good checkpoint is kept, but the batch could not be ({error})"
    again = f"python -m launch.replay --workdir={workdir}"
    return (
        f"The last good checkpoint is kept, and the batch in {path}: see what it does with "
        f"`{again}`"
    )


def read(path: Path) -> tuple[int, dict[str, np.ndarray]]:
    """(step, batch) of what `save` wrote.

    Raises:
      FileNotFoundError: no such file.
      ValueError: a damaged file, or not one of a batch.
    """
    try:
        with path.open("rb") as raw, np.load(raw, allow_pickle=False) as file:
            batch = dict(file)
        return int(batch.pop("step")), batch
    except (zipfile.BadZipFile, EOFError, KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{path} holds no batch of a tuning run ({error!r})") from error


def newest(workdir: Path) -> Path:
    """That of the latest step.

    Raises:
      FileNotFoundError: there is none.
    """
    found = list(workdir.glob(_NAME.format("*")))
    if not found:
        raise FileNotFoundError(f"no {_NAME.format('<step>')} in {workdir}: no batch broke the run")
    return max(found, key=lambda path: int(path.stem.rpartition("_")[2]))
