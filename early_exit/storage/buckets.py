"""Buckets, `gs://BUCKET/…` and `s3://BUCKET/…`: what paths are there, and how one writes there.

The one idea: a store has no folders to rename and no files to append to, but an object appears
whole or not at all, and may be asked to appear only where there is none. So files are made on this
machine and put there in one piece; and who comes first is decided by the store (`create`).

`epath.Path` has the methods of `pathlib.Path` for what only reads or removes.
"""

import contextlib
import functools
import os
import pathlib
import re
from collections.abc import Iterator
from typing import Any

# Scheme → the library behind it, and the extra that it comes with.
SCHEMES = {"gs": "gcsfs", "s3": "s3fs"}

_SCHEME = re.compile(r"([A-Za-z][A-Za-z0-9+.-]+):/(/?)(.*)")
# A write that the store took, and that is not there, is tried so often.
_TRIES = 3


def is_remote(path: str | os.PathLike) -> bool:
    """Whether a place is in a bucket.

    Raises:
      ValueError: neither, nor on this machine.
    """
    text = os.fspath(path)
    found = _SCHEME.match(text)
    if not found:
        return False
    scheme, second, rest = found.groups()
    if scheme not in SCHEMES or not second:
        known = " and ".join(f"{known}://BUCKET/…" for known in SCHEMES)
        raise ValueError(f"{text} is no place that is known; there are folders here, {known}")
    if not rest.strip("/"):
        raise ValueError(f"{text} names no bucket; write {scheme}://BUCKET/…")
    return True


def here(path: str | os.PathLike, what: str) -> pathlib.Path:
    """A path on this machine.

    Args:
      what: needs to be here, for the error.

    Raises:
      ValueError: it is in a bucket.
    """
    if is_remote(path):
        raise ValueError(
            f"{what} cannot be in a bucket, and {os.fspath(path)} is in one; mount the bucket "
            "(gcsfuse, mount-s3) and name the folder, or give one of this machine"
        )
    return pathlib.Path(path)


def place(path: str | os.PathLike) -> pathlib.Path:
    """A path to read and write at, on this machine or in a bucket; both have the same methods.

    Raises:
      ValueError: no such kind of place.
    """
    if not is_remote(path):
        return pathlib.Path(path)
    from etils import epath

    _library()
    return epath.Path(path)


@functools.cache
def _library() -> Any:
    """fsspec, told to look anew each time: what others write there is to be seen."""
    import fsspec

    for name in ("gs", "gcs", "s3"):
        fsspec.config.conf.setdefault(name, {}).setdefault("use_listings_cache", False)
    return fsspec


@contextlib.contextmanager
def reached(path: str | os.PathLike) -> Iterator[Any]:
    """The fsspec file system of a place in a bucket; what goes wrong with it is told in a sentence.

    Raises:
      FileNotFoundError, PermissionError, OSError: as the store says.
      RuntimeError: the library for such buckets is not installed.
    """
    text = os.fspath(path)
    scheme = text.partition("://")[0]
    try:
        yield _library().filesystem(scheme)
    except FileNotFoundError as error:
        raise FileNotFoundError(f"there is no {text} ({error}); does the bucket exist?") from error
    except ImportError as error:
        raise RuntimeError(
            f"{scheme}:// needs {SCHEMES[scheme]}, which is not installed; "
            f"pip install 'early_exit[{scheme}]'"
        ) from error
    except (ValueError, RuntimeError):
        raise
    except Exception as error:  # each library has its own, down to those of HTTP
        raise OSError(
            f"{text} cannot be reached: {type(error).__name__}: {error}. Are there credentials, "
            "may they do this, and does the bucket exist?"
        ) from error


def put(local: pathlib.Path, path: str | os.PathLike) -> None:
    """Puts a file into a bucket in one piece, in place of what is there under that name.

    Raises:
      OSError: as `reached`, or it is not there when the store says that it is.
    """
    size = local.stat().st_size
    for _ in range(_TRIES):
        with reached(path) as store:
            store.put_file(str(local), os.fspath(path))
            with contextlib.suppress(FileNotFoundError):
                if store.info(os.fspath(path))["size"] == size:
                    return
    raise OSError(
        f"{os.fspath(path)} was written {_TRIES} times, and is not there; nothing that was there "
        "before is lost"
    )


def content(path: str | os.PathLike) -> bytes:
    """An object whole, in one request, so that whoever replaces it meanwhile disturbs nothing.

    Raises:
      FileNotFoundError, OSError: as `reached`.
    """
    with reached(path) as store:
        return store.cat_file(os.fspath(path))


def create(path: str | os.PathLike, content: bytes) -> bool:
    """Makes an object if there is none of that name, which the store decides; whether it did.

    Args:
      content: unlike anybody else's: a request whose answer was lost is made again, and then it is
        the content that tells whose the object is.

    Raises:
      OSError: as `reached`.
    """
    text = os.fspath(path)
    with reached(path) as store:
        try:
            store.pipe_file(text, content, mode="create")
        except OSError as error:
            if not (isinstance(error, FileExistsError) or _is_precondition(error)):
                raise
            return store.cat_file(text) == content
    return True


def _is_precondition(error: BaseException) -> bool:
    """HTTP status 412: there is such an object already."""
    return "412" in str(getattr(error, "code", "")) or "recondition" in str(error)
