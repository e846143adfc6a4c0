"""Copies of what lies in buckets, on this machine.

The one idea: what is read as a whole, such as weights or text, is copied once into a folder of the
cache whose name says what was there; whatever reads it reads that copy.
"""

import hashlib
import os
import pathlib
import shutil
import tempfile
from collections.abc import Sequence
from fnmatch import fnmatch
from typing import Any

from absl import logging

from early_exit.storage import files
from early_exit.storage.buckets import is_remote, reached
from early_exit.storage.packages import cache_folder


def fetched(path: str | os.PathLike, wanted: Sequence[str] = ("*",)) -> pathlib.Path:
    """A place on this machine with what is at another, which is copied only if it is remote.

    It is copied once; when it has changed it is copied again, beside the copy before.

    Args:
      path: of a file or a folder; what is on this machine is not looked at.
      wanted: patterns of the names of files.

    Raises:
      FileNotFoundError: nothing is there, or nothing that is wanted.
      OSError: the bucket cannot be reached, or the copy does not fit on the disk.
      RuntimeError: the library for such buckets is not installed.
    """
    if not is_remote(path):
        return pathlib.Path(path).expanduser()
    text = os.fspath(path).rstrip("/")
    with reached(text) as store:
        store.invalidate_cache()
        is_file = store.isfile(text)
        found = {text: store.info(text)} if is_file else store.find(text, detail=True)
    name, root = text.rpartition("/")[2], text if is_file else store._strip_protocol(text)
    listed = {at.removeprefix(root).lstrip("/") or name: info for at, info in found.items()}
    listed = {
        inner: info
        for inner, info in sorted(listed.items())
        if any(fnmatch(inner.rpartition("/")[2], pattern) for pattern in wanted)
    }
    if not listed:
        raise FileNotFoundError(f"there is no {text}, or nothing in it but {', '.join(wanted)}")
    folder = cache_folder() / "buckets" / f"{name}-{_identity(text, listed)}"
    if not folder.exists():
        _copy(text, store, listed, folder, is_file)
    return folder / name if is_file else folder


def _identity(text: str, listed: dict[str, dict[str, Any]]) -> str:
    """Follows from the names in a bucket, and from what the store says of their content."""
    kept = ("size", "etag", "ETag", "md5Hash", "generation", "mtime", "LastModified")
    told = [(name, [str(info.get(key)) for key in kept]) for name, info in listed.items()]
    return hashlib.sha256(repr((text, told)).encode()).hexdigest()[:16]


def _copy(text: str, store: Any, listed: dict, folder: pathlib.Path, is_file: bool) -> None:
    """Fills `folder`; it appears whole or not at all."""
    size = sum(info["size"] for info in listed.values())
    folder.parent.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(folder.parent).free
    if size > free:
        raise OSError(
            f"{text} has {size / 2**30:.1f} GiB, and there are {free / 2**30:.1f} GiB left for a "
            f"copy in {folder.parent} ($EARLY_EXIT_CACHE chooses where); mount the bucket instead, "
            "and name the folder"
        )
    logging.info("copying %s into %s", text, folder)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix="copy-") as scratch:
        new = pathlib.Path(scratch) / "new"
        for name, info in listed.items():
            (new / name).parent.mkdir(parents=True, exist_ok=True)
            with reached(text):
                store.get_file(text if is_file else f"{text}/{name}", str(new / name))
            if (new / name).stat().st_size != info["size"]:
                raise OSError(f"{name} of {text} came cut short; give the command again")
        files.flush_tree(new)
        try:
            os.replace(new, folder)
        except OSError:
            if not folder.exists():  # otherwise another process was first, with the same content
                raise
