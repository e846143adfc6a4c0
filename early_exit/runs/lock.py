"""One command at a time writes into a folder: who does says so in a file there.

    with lock.held(workdir) as own:     # refused where another command is at work
        ...
        own.check()                     # still the owner?

The one idea: a file can be made only by one, on shared disks, too (O_EXCL, which NFS has since
version 3). What it says tells the living from the dead: on the same machine the process is looked
up, with its start time, for numbers come again; from elsewhere, the file itself is watched, whose
owner touches it every few seconds. Nothing is asked of clocks that differ, or of `flock`, which
some shared disks have for each machine alone or not at all.

In a bucket, the store makes the file for the first who asks (a precondition), and the owner counts
its beats in it. One that beats no more is removed and another made: two that find it so at the very
same moment might both take the folder, and the first of them is told so before it saves.
"""

import contextlib
import json
import os
import shlex
import socket
import subprocess
import sys
import tempfile
import threading
import time
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax

from early_exit.storage import buckets, files

FILE = "in_use.json"

# The owner touches its file so often; who looks from another machine takes it for dead when it has
# not for so long. Between the two lies what NFS may show too late (`acregmax`, a minute).
BEAT_SECONDS = 20
SILENT_SECONDS = 180
_LOOK_SECONDS = 1
_SHOWN = 300  # characters of a command
_PROC = Path("/proc")

# Folder → thread of this process that has it.
_mine: dict[Path, int] = {}


class Owner:
    """Of a folder, as long as the file there has its token."""

    def __init__(self, path: Path | None, token: str):
        self._path, self._token = path, token

    def check(self) -> None:
        """Raises RuntimeError where another command has taken the folder over.

        It may have done so after this process had been stopped, or cut off, for minutes.
        """
        if self._path is not None and (_read(self._path) or {}).get("token") != self._token:
            raise RuntimeError(
                f"{self._path.parent} is no longer this command's ({self._path.name} is gone or "
                "another's); nothing more is written there. What was saved before is kept"
            )


@contextlib.contextmanager
def held(folder: Path) -> Iterator[Owner]:
    """Makes a folder this command's own until the block ends, however it ends; makes the folder.

    Of several processes of one distributed run the first has it for all. Within the block, the
    same thread may ask for the folder again.

    Raises:
      RuntimeError: another command is at work there; says which.
      OSError: the folder cannot be written to.
    """
    if jax.distributed.is_initialized() and jax.process_index():
        yield Owner(None, "")
        return
    remote = buckets.is_remote(folder)
    path = (folder if remote else folder.resolve()) / FILE
    there = remote or folder.exists()
    if _mine.get(path) == threading.get_ident():
        yield Owner(path, (_read(path) or {}).get("token", ""))
        return
    token, ended = uuid.uuid4().hex, threading.Event()
    beating = threading.Thread(target=_beat, args=(path, token, ended), daemon=True)
    try:  # who is asked to leave while it takes the folder leaves nothing behind, either
        _take(path, token)
        _mine[path] = threading.get_ident()
        beating.start()
        yield Owner(path, token)
    finally:
        ended.set()
        if beating.is_alive():
            beating.join()
        if _mine.get(path) == threading.get_ident():
            del _mine[path]
        with contextlib.suppress(OSError):  # the disk may have gone, which others tell better
            if (_read(path) or {}).get("token") == token:
                path.unlink(missing_ok=True)
            if not there:  # a command that was refused leaves nothing behind
                path.parent.rmdir()


def _take(path: Path, token: str) -> None:
    """Makes the file."""
    try:
        files.make_folder(path.parent)
        said = files.json_text(_described() | {"token": token}, indent=2) + "\n"
        while not _make(path, said):
            _wait_for_the_dead(path)
    except OSError as error:
        raise OSError(f"cannot write to {path.parent}: {error}") from error


def _make(path: Path, said: str) -> bool:
    """Makes the file if there is none; whether it did."""
    if buckets.is_remote(path):
        return buckets.create(path, said.encode())
    try:
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o644)
    except FileExistsError:
        return False
    try:
        with open(descriptor, "w", encoding="utf-8") as file:
            file.write(said)
            file.flush()
            os.fsync(descriptor)
    except BaseException:  # a full disk, or asked to leave: nobody's file
        path.unlink(missing_ok=True)
        raise
    return True


def _wait_for_the_dead(path: Path) -> None:
    """Returns when the file that is there is to be tried again: its owner is dead, or has ended."""
    first, began = None, time.monotonic()
    while (found := _looked_at(path)) is not None:
        said, touched, silent = found
        silent = max(silent, time.monotonic() - began)
        alive = _lives(said) if said.get("place") == _place() else None
        if alive or (first is not None and touched != first):
            mend = "" if alive else f". If that is dead for sure, remove {path}"
            raise RuntimeError(
                f"{path.parent} is in use by {_who(said)}; wait until that has ended, or name "
                f"another folder{mend}"
            )
        if alive is False or silent > SILENT_SECONDS:
            _remove(path, said)
            return
        if first is None:
            first = touched
            print(
                f"{path} is of {_who(said)}; looking for up to {SILENT_SECONDS} s whether that "
                "still runs",
                file=sys.stderr,
            )
        time.sleep(_LOOK_SECONDS)


def _looked_at(path: Path) -> tuple[dict[str, Any], float, float] | None:
    """(what a file says, when it was touched, seconds since then); None: gone.

    When and since when are by the disk's clock. In a bucket they are beats, and not known.
    """
    if buckets.is_remote(path):
        said = _read(path)
        return None if said is None else (said, said.get("beats", 0), 0.0)
    try:
        with tempfile.TemporaryFile(dir=path.parent) as probe:
            now = os.fstat(probe.fileno()).st_mtime
        touched = path.stat().st_mtime
    except FileNotFoundError:
        return None
    return _read(path) or {}, touched, now - touched


def _remove(path: Path, dead: dict[str, Any]) -> None:
    """Removes the file of a dead owner, and no other that has come meanwhile."""
    if buckets.is_remote(path):
        if (_read(path) or {}) == dead:
            path.unlink(missing_ok=True)
        return
    aside = path.with_name(f"{path.name}.{uuid.uuid4().hex[:12]}")
    try:
        os.rename(path, aside)
    except FileNotFoundError:
        return
    if (_read(aside) or {}) == dead:
        aside.unlink()
        return
    with contextlib.suppress(FileExistsError):  # another was quicker: this is its file
        os.link(aside, path)
    aside.unlink()


def _read(path: Path) -> dict[str, Any] | None:
    """What a file says; None without one, or while it is being written."""
    try:
        said = json.loads(buckets.content(path) if buckets.is_remote(path) else path.read_bytes())
    except (FileNotFoundError, ValueError):
        return None
    return said if isinstance(said, dict) else None


def _described() -> dict[str, Any]:
    command = " ".join(shlex.join(sys.orig_argv).split())
    return {
        "command": command if len(command) <= _SHOWN else f"{command[:_SHOWN]}…",
        "host": socket.gethostname(),
        "pid": os.getpid(),
        "started": (_state(os.getpid()) or ("", ""))[1],
        "place": _place(),
        "since": time.strftime("%Y-%m-%d %H:%M:%S"),
    }


def _who(said: dict[str, Any]) -> str:
    if "pid" not in said:
        return "a command that has just begun"
    return f"`{said['command']}` (process {said['pid']} on {said['host']}, since {said['since']})"


def _place() -> str:
    """Of what process numbers are: one boot of one machine and, in containers, their own."""
    try:
        boot = (_PROC / "sys/kernel/random/boot_id").read_text().strip()
        return f"{boot} {os.readlink(_PROC / 'self/ns/pid')}"
    except OSError:  # no Linux
        return socket.gethostname()


def _lives(said: dict[str, Any]) -> bool | None:
    """Whether the process of a file from this place still runs, and is not another by now.

    None where that does not show, such as of another user's process (`hidepid` of proc(5)).
    """
    try:
        os.kill(said["pid"], 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    found = _state(said["pid"])
    return found and (found[0] not in "ZX" and found[1] == said["started"])


def _state(pid: int) -> tuple[str, str] | None:
    """State of a process, such as Z, and when it began, in whatever form; None: does not show."""
    if _PROC.exists():
        try:
            # Behind the name, which may hold spaces and brackets, from the third field on.
            fields = (_PROC / str(pid) / "stat").read_text().rpartition(")")[2].split()
        except (FileNotFoundError, ProcessLookupError):
            return None
        return fields[0], fields[19]
    asked = ["ps", "-o", "stat=,lstart=", "-p", str(pid)]
    state, _, began = subprocess.run(asked, capture_output=True, text=True).stdout.partition(" ")
    return (state[0], began.strip()) if state else None


def _beat(path: Path, token: str, ended: threading.Event) -> None:
    beats = 0
    while not ended.wait(BEAT_SECONDS):
        with contextlib.suppress(OSError):  # the disk may be away for a while
            said = _read(path) or {}
            if said.get("token") != token:
                continue
            beats += 1
            if buckets.is_remote(path):
                files.write_json(path, said | {"beats": beats})
            else:
                os.utime(path)
