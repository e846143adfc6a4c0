"""Names of buckets are never taken for those of folders; what is written is there, or told."""

import pathlib
import re

import bucket_servers
import pytest

from early_exit.runs import lock
from early_exit.storage import buckets, copies, files


@pytest.mark.parametrize("text", ["/a/b", "a", "runs/gs", "a:b", "~/x", "pip:a==1", "", "gs"])
def test_places_of_this_machine(text):
    assert not buckets.is_remote(text)
    assert buckets.place(text) == pathlib.Path(text)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("gs:/bucket/run", "gs:/bucket/run is no place that is known; .* gs://BUCKET/… and s3://"),
        ("http://host/run", "http://host/run is no place that is known"),
        ("hdfs://host/run", "is no place that is known"),
        ("gs://", "gs:// names no bucket; write gs://BUCKET/…"),
        ("s3:///", "names no bucket; write s3://BUCKET/…"),
    ],
)
def test_what_is_neither_here_nor_in_a_bucket(text, message):
    for function in (buckets.is_remote, buckets.place, copies.fetched):
        with pytest.raises(ValueError, match=message):
            function(text)


@pytest.mark.parametrize("text", ["gs://bucket", "s3://bucket/runs/a"])
def test_buckets(text):
    assert buckets.is_remote(text) and buckets.is_remote(buckets.place(text))
    assert str(buckets.place(text) / "x") == f"{text}/x"
    with pytest.raises(ValueError, match="a sweep cannot be in a bucket, and .* mount the bucket"):
        buckets.here(text, "a sweep")


@pytest.mark.parametrize(("scheme", "library"), buckets.SCHEMES.items())
def test_a_library_that_lacks_is_named(scheme, library, monkeypatch):
    def lacking(_):
        raise ImportError(f"Install {library}")

    monkeypatch.setattr(buckets._library(), "filesystem", lacking)
    with pytest.raises(
        RuntimeError, match=rf"{scheme}:// needs {library}, .*early_exit\[{scheme}\]"
    ):
        copies.fetched(f"{scheme}://bucket/x")


def test_no_command_takes_what_it_is_given_for_a_path_of_this_machine():
    """`Path("gs://bucket/run")` is a folder called `gs:`."""
    launch = pathlib.Path(__file__).parents[2] / "launch"
    found = [
        f"{path.name}: {line.strip()}"
        for path in launch.rglob("*.py")
        for line in path.read_text().splitlines()
        if re.search(r"\bPath\(\w+\.value", line)
    ]
    assert not found


@pytest.fixture(params=["gcs", "s3"])
def server(request):
    libraries = {"gcs": ("gcsfs", "gcp_storage_emulator"), "s3": ("s3fs", "moto")}
    for library in libraries[request.param]:
        pytest.importorskip(library)
    with getattr(bucket_servers, request.param)() as (root, faults, _):
        yield buckets.place(root), faults


def is_write(method, path):
    return method in ("PUT", "POST") and "batch" not in path


def is_read(method, path):
    return method == "GET"


@pytest.mark.storage
def test_files_in_a_bucket_are_like_others(server, tmp_path):
    root, _ = server
    path = root / "runs/a/config.json"
    assert not path.exists()
    files.write_json(path, {"a": 1})
    files.write_json(path, {"a": 2})
    assert files.read_json(path) == {"a": 2}
    assert [found.name for found in (root / "runs/a").glob("*.json")] == ["config.json"]
    with pytest.raises(KeyError), files.replacing(path) as partial:
        partial.write_text("half")
        raise KeyError
    assert files.read_json(path) == {"a": 2}
    with files.new_folder(root / "export", last="exits.json") as inside:
        (inside / "deep").mkdir()
        for name in ("exits.json", "a.txt", "deep/b.txt"):
            (inside / name).write_text(name)
    with pytest.raises(FileExistsError), files.new_folder(root / "export"):
        pass
    copy = copies.fetched(root / "export")
    assert {str(p.relative_to(copy)) for p in copy.rglob("*.*")} == {
        "exits.json",
        "a.txt",
        "deep/b.txt",
    }


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("EARLY_EXIT_CACHE", str(tmp_path / "cache"))


@pytest.mark.storage
def test_copies_are_made_once_and_anew_when_something_has_changed(server, cache):
    root, faults = server
    for name in ("text/a.txt", "text/in/b.txt", "text/c.bin"):
        files.write_text(root / name, name)
    copy = copies.fetched(root / "text", ["*.txt"])
    assert sorted(p.name for p in copy.rglob("*.*")) == ["a.txt", "b.txt"]
    faults.plan("drop", lambda method, path: is_read(method, path) and "alt=media" in path, 9)
    assert copies.fetched(root / "text", ["*.txt"]) == copy  # asks for names, and reads nothing
    faults.planned.clear()
    files.write_text(root / "text/a.txt", "new")
    again = copies.fetched(root / "text", ["*.txt"])
    assert (copy / "a.txt").read_text() == "text/a.txt" and (again / "a.txt").read_text() == "new"
    one = copies.fetched(root / "text/in/b.txt")
    assert one.name == "b.txt" and one.read_text() == "text/in/b.txt"
    for nothing in ("none", "text"):
        with pytest.raises(FileNotFoundError, match=f"there is no .*{nothing}, or nothing in it"):
            copies.fetched(root / nothing, ["*.md"])


@pytest.mark.storage
@pytest.mark.parametrize("fault", ["503", "drop", "drop after", "lost"])
def test_a_write_that_went_wrong_is_done_again(server, fault):
    root, faults = server
    files.write_text(root / "a.txt", "before")
    faults.plan(fault, is_write)
    files.write_text(root / "a.txt", "behind")
    assert faults.happened == [fault]
    assert (root / "a.txt").read_text() == "behind"


@pytest.mark.storage
def test_a_write_that_is_lost_for_good_is_told(server):
    root, faults = server
    faults.plan("lost", is_write, times=9)
    with pytest.raises(OSError, match=r"a\.txt was written 3 times, and is not there"):
        files.write_text(root / "a.txt", "text")


@pytest.mark.storage
@pytest.mark.parametrize("fault", [None, "503", "drop", "drop after"])
def test_the_store_decides_who_is_first(server, fault):
    root, faults = server
    if fault:
        faults.plan(fault, is_write)
    assert buckets.create(root / "a", b"first")
    assert not buckets.create(root / "a", b"second")
    assert (root / "a").read_bytes() == b"first"
    assert faults.happened == [fault] * bool(fault)


@pytest.mark.storage
def test_a_folder_in_a_bucket_has_one_owner(server, monkeypatch):
    root, _ = server
    with lock.held(root / "run") as own:
        own.check()
        with pytest.raises(RuntimeError, match="is in use by `.*; wait until that has ended"):
            lock._take(root / "run" / lock.FILE, "other")
        monkeypatch.setattr(lock, "_place", lambda: "another machine")
        monkeypatch.setattr(lock, "SILENT_SECONDS", 2)
        monkeypatch.setattr(lock, "_LOOK_SECONDS", 0.1)
        lock._take(root / "run" / lock.FILE, "other")  # whose owner has not beaten for so long
        with pytest.raises(RuntimeError, match="is no longer this command's"):
            own.check()
    assert (root / "run" / lock.FILE).exists()  # the other one's


@pytest.mark.storage
def test_an_owner_that_beats_is_alive(server, monkeypatch):
    root, _ = server
    monkeypatch.setattr(lock, "BEAT_SECONDS", 0.1)
    monkeypatch.setattr(lock, "SILENT_SECONDS", 20)
    monkeypatch.setattr(lock, "_LOOK_SECONDS", 0.1)
    with lock.held(root / "run"):
        monkeypatch.setattr(lock, "_place", lambda: "another machine")
        with pytest.raises(RuntimeError, match="is in use by"):
            lock._take(root / "run" / lock.FILE, "other")
    assert not (root / "run" / lock.FILE).exists()


@pytest.mark.storage
def test_a_bucket_that_there_is_not(server, cache):
    root, _ = server
    nowhere = buckets.place(str(root).replace("bucket", "nowhere"))
    with pytest.raises(OSError, match="cannot write to .*nowhere.*: .*does the bucket exist"):
        lock._take(nowhere / "run" / lock.FILE, "own")
    with pytest.raises(FileNotFoundError, match="there is no .*nowhere/text"):
        copies.fetched(nowhere / "text")
