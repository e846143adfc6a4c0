"""Who is at work in a folder, told by files and by processes that live, die and come again."""

import contextlib
import errno
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from early_exit.runs import lock

ROOT = Path(__file__).parents[2]
HOLDS = """
import pathlib, sys
from early_exit.runs import lock
from early_exit.training import preemption
preemption.leave_at_once()
try:
    with lock.held(pathlib.Path(sys.argv[1])):
        print("held", flush=True)
        sys.stdin.read()
except preemption.Preempted:
    sys.exit(preemption.EXIT_STATUS)
"""


@contextlib.contextmanager
def holder(folder):
    """A process that has the folder until its standard input is closed."""
    process = subprocess.Popen(
        [sys.executable, "-c", HOLDS, str(folder)],
        cwd=ROOT,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        assert process.stdout.readline() == "held\n"
        yield process
    finally:
        process.kill()
        process.communicate()


def leave(folder, touched=0.0, **said):
    """What an owner left, touched so many seconds ago; returns the file."""
    path = folder / lock.FILE
    with lock.held(folder):
        found = json.loads(path.read_text())
    path.write_text(json.dumps(found | {"token": "before"} | said))
    os.utime(path, (time.time() - touched,) * 2)
    return path


def take(folder):
    """Takes the folder as who has it until now would not allow; leaves nothing behind."""
    with lock.held(folder) as own:
        own.check()
        assert json.loads((folder / lock.FILE).read_text())["pid"] == os.getpid()
    assert not (folder / lock.FILE).exists()


@pytest.fixture
def soon(monkeypatch):
    """Silence is short."""
    monkeypatch.setattr(lock, "BEAT_SECONDS", 0.05)
    monkeypatch.setattr(lock, "SILENT_SECONDS", 1)
    monkeypatch.setattr(lock, "_LOOK_SECONDS", 0.05)


def test_the_second_is_told_who_is_the_first(tmp_path):
    folder = tmp_path / "run"
    with holder(folder) as first:
        said = rf"{folder} is in use by `.*python -c .*` \(process {first.pid} on .*, since "
        with pytest.raises(RuntimeError, match=said), lock.held(folder):
            pass
        with lock.held(tmp_path / "another"):
            pass
        first.communicate()
        assert first.returncode == 0
    assert not any(tmp_path.iterdir())  # folders made for nothing go again


@pytest.mark.parametrize("reaped", [True, False])
def test_who_was_killed_is_dead_at_once(tmp_path, reaped):
    """Be it a zombie, as long as nobody has asked how it ended."""
    with holder(tmp_path) as first:
        first.kill()
        if reaped:
            first.wait()
        else:
            os.waitid(os.P_PID, first.pid, os.WEXITED | os.WNOWAIT)
        assert (tmp_path / lock.FILE).exists()
        take(tmp_path)


def test_who_is_asked_to_leave_takes_its_file_along(tmp_path):
    with holder(tmp_path) as first:
        first.send_signal(signal.SIGTERM)
        assert first.wait(30) == 75
        assert not any(tmp_path.iterdir())


def test_a_number_that_another_program_has_by_now_is_no_owner(tmp_path):
    leave(tmp_path, pid=os.getpid(), started="1")
    take(tmp_path)
    leave(tmp_path, pid=os.getpid())
    with pytest.raises(RuntimeError, match="in use by"):
        take(tmp_path)


def test_elsewhere_who_has_been_silent_for_long_is_dead(tmp_path):
    leave(tmp_path, place="elsewhere", touched=lock.SILENT_SECONDS + 60)
    take(tmp_path)


@pytest.mark.parametrize("said", ["elsewhere", "nothing yet"])
def test_elsewhere_who_falls_silent_is_dead_after_a_while(tmp_path, soon, capsys, said):
    path = leave(tmp_path, place="elsewhere")
    if said == "nothing yet":  # killed between making the file and writing it
        path.write_text("")
    take(tmp_path)
    assert "whether that still runs" in capsys.readouterr().err


def test_elsewhere_who_stirs_lives(tmp_path, soon):
    """By the file alone, whatever the numbers of processes there."""
    path, ended = leave(tmp_path, place="elsewhere", pid=2**22 + 1, host="far"), threading.Event()
    beating = threading.Thread(target=lock._beat, args=(path, "before", ended))
    beating.start()
    try:
        with pytest.raises(RuntimeError, match=f"on far, .*dead for sure, remove {path}"):
            take(tmp_path)
    finally:
        ended.set()
        beating.join()
    assert path.exists()


def test_a_process_that_does_not_show_is_watched_and_not_taken_for_dead(
    tmp_path, soon, monkeypatch
):
    """`hidepid` shows each user but their own processes."""
    leave(tmp_path, pid=os.getppid())
    monkeypatch.setattr(lock, "_state", lambda pid: None)
    began = time.monotonic()
    take(tmp_path)
    assert time.monotonic() - began > 0.9


def test_without_proc_processes_are_looked_up_as_well(tmp_path, monkeypatch):
    monkeypatch.setattr(lock, "_PROC", tmp_path / "no proc")
    state, began = lock._state(os.getpid())
    assert state in "RS" and re.search(r"\d\d:\d\d:\d\d \d{4}$", began)
    with holder(tmp_path) as other:
        assert lock._state(other.pid) is not None
    assert lock._state(other.pid) is None
    with lock.held(tmp_path / "run"):
        said = json.loads((tmp_path / "run" / lock.FILE).read_text())
        assert lock._lives(said) and not lock._lives(said | {"started": "before"})


def test_a_folder_that_cannot_be_written_to(tmp_path, monkeypatch):
    """For root nothing is read-only but what is mounted so."""

    def refuse(path, flags, *mode, real=os.open):
        if flags & os.O_CREAT:
            raise OSError(errno.EROFS, os.strerror(errno.EROFS), str(path))
        return real(path, flags, *mode)

    monkeypatch.setattr(os, "open", refuse)
    with pytest.raises(OSError, match=f"cannot write to {tmp_path}: .*Read-only"):
        take(tmp_path)
    monkeypatch.undo()
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match="cannot write to .*file"):
        take(tmp_path / "file")


@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "No space left"), KeyboardInterrupt()])
def test_who_fails_while_taking_it_leaves_no_file(tmp_path, monkeypatch, error):
    def fail(descriptor):
        raise error

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(type(error)):
        take(tmp_path)
    assert not any(tmp_path.iterdir())


def test_within_a_thread_it_may_be_asked_for_again_and_no_other_gets_it(tmp_path):
    def other():
        with pytest.raises(RuntimeError, match=f"process {os.getpid()} on"):
            take(tmp_path)
        tried.append(True)

    tried = []
    with lock.held(tmp_path), lock.held(tmp_path) as own:
        thread = threading.Thread(target=other)
        thread.start()
        thread.join()
        own.check()
    assert tried and not any(tmp_path.iterdir())


@pytest.mark.parametrize("by", ["another", "hand"])
def test_who_lost_the_folder_is_told_and_does_not_take_it_back(tmp_path, by):
    path = tmp_path / lock.FILE
    with lock.held(tmp_path) as own:
        path.unlink()
        if by == "another":
            path.write_text('{"token": "another"}')
        with pytest.raises(RuntimeError, match=f"{tmp_path} is no longer this command's"):
            own.check()
    assert path.exists() == (by == "another")


def test_of_two_who_find_one_dead_neither_removes_the_other(tmp_path):
    """The slower one has read the dead one's file, and finds the quicker one's in its place."""
    path = leave(tmp_path, started="1")
    dead = json.loads(path.read_text())
    path.unlink()
    with lock.held(tmp_path) as own:
        lock._remove(path, dead)
        own.check()
    assert not any(tmp_path.iterdir())


def test_no_thread_is_left_whatever_ends_it(tmp_path):
    before = threading.active_count()
    with pytest.raises(ZeroDivisionError), lock.held(tmp_path):
        assert threading.active_count() == before + 1
        raise ZeroDivisionError
    assert threading.active_count() == before and not any(tmp_path.iterdir())
