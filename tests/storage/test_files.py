"""What comes whole, comes back; damaged files are in tests/pretrained and tests/exits."""

import ast
import json
import math
import os
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy

from early_exit.storage import files

ARRAYS = {
    "b/half": np.arange(6, dtype=np.float16).reshape(2, 3),
    "a/ŋ": np.arange(5, dtype=np.int32),
    "c": np.float32(3),
    "d/brain": np.ones((2, 0), ml_dtypes.bfloat16),
    "e": np.arange(4.0).reshape(2, 2).T,  # not in memory order
}


def write(path, arrays, **changes):
    described = [(name, np.shape(array), array.dtype) for name, array in arrays.items()]
    files.write_tensors(path, described, (arrays | changes).__getitem__, {"format": "pt"})


def test_arrays_come_back_one_by_one(tmp_path):
    path = tmp_path / "x.safetensors"
    write(path, ARRAYS)
    header = files.read_header(path)
    assert {name: stored.shape for name, stored in header.items()} == {
        name: np.shape(array) for name, array in ARRAYS.items()
    }
    for name, array in ARRAYS.items():
        assert files.DTYPES[header[name].dtype] == array.dtype
        np.testing.assert_array_equal(files.read_tensor(path, name), array, strict=True)


def test_the_library_reads_what_is_written(tmp_path):
    """Of which it has a writer too, but one that wants all arrays at once."""
    write(tmp_path / "ours", ARRAYS)
    theirs = safetensors.numpy.load_file(tmp_path / "ours")
    assert theirs.keys() == ARRAYS.keys()
    for name, array in theirs.items():
        np.testing.assert_array_equal(array, ARRAYS[name], strict=True)


def test_no_arrays_at_all(tmp_path):
    write(tmp_path / "x.safetensors", {})
    assert files.read_header(tmp_path / "x.safetensors") == {}


@pytest.mark.parametrize(
    ("array", "message"),
    [
        (np.zeros(3), r"c is float64 \(3,\), not float32 \(\)"),
        (np.float64(1), r"c is float64 \(\), not float32 \(\)"),
    ],
)
def test_what_is_not_as_described_is_refused(tmp_path, array, message):
    with pytest.raises(ValueError, match=message):
        write(tmp_path / "x.safetensors", ARRAYS, c=array)


def test_types_that_are_not_written(tmp_path):
    with pytest.raises(ValueError, match="x is complex64; only float64, .* are written"):
        write(tmp_path / "x.safetensors", {"x": np.zeros(3, np.complex64)})


def test_types_that_are_not_read(tmp_path):
    path = tmp_path / "x.safetensors"
    safetensors.numpy.save_file({"x": np.zeros(3, np.complex64)}, path)
    with pytest.raises(ValueError, match="x.safetensors stores x as C64; only F64, .* are read"):
        files.read_tensor(path, "x")


def test_a_new_folder_appears_when_it_is_whole(tmp_path):
    target = tmp_path / "deep/er"
    with files.new_folder(target) as inside:
        (inside / "a").write_text("1")
        assert not target.exists()
    assert [path.name for path in target.parent.iterdir()] == ["er"]
    assert (target / "a").read_text() == "1"


def test_a_folder_that_fails_never_appears(tmp_path):
    with pytest.raises(RuntimeError), files.new_folder(tmp_path / "new") as inside:
        (inside / "a").write_text("1")
        raise RuntimeError
    assert not any(tmp_path.iterdir())
    (tmp_path / "old").mkdir()
    with (
        pytest.raises(FileExistsError, match="old exists already"),
        files.new_folder(tmp_path / "old"),
    ):
        pass


def test_a_file_is_replaced_when_the_new_one_is_whole(tmp_path):
    path = tmp_path / "x.json"
    for text in ("old", "new"):
        with files.replacing(path) as partial:
            partial.write_text(text)
            assert text == "old" or path.read_text() == "old"
    assert [file.read_text() for file in tmp_path.iterdir()] == ["new"]


def test_a_file_that_fails_leaves_the_one_before(tmp_path):
    path = tmp_path / "x.json"
    path.write_text("old")
    with pytest.raises(OSError, match="full"), files.replacing(path) as partial:
        partial.write_text("half of it")
        raise OSError("the disk is full")
    assert [file.read_text() for file in tmp_path.iterdir()] == ["old"]


def test_what_is_written_as_json_is_read(tmp_path):
    content = {"name": "ŋ", "numbers": [1, 2.5, None]}
    files.write_json(tmp_path / "x.json", content)
    assert files.read_json(tmp_path / "x.json") == content


def strict(path):
    """What a reader finds that takes JSON and nothing beyond it."""
    return json.loads(path.read_text(), parse_constant=pytest.fail)


def test_json_has_no_nan_and_no_infinities(tmp_path):
    """Nor deep inside, where `json.dump` writes words that only Python reads."""
    given = {"a": [math.nan, {"b": (math.inf, -math.inf)}], "c": np.float64("nan"), 2: True}
    files.write_json(tmp_path / "x.json", given)
    wanted = {"a": [None, {"b": ["Infinity", "-Infinity"]}], "c": None, "2": True}
    assert strict(tmp_path / "x.json") == files.plain(given) == wanted
    assert float("-Infinity") == -math.inf


def test_lines_of_json_are_as_strict(tmp_path):
    files.write_json_lines(tmp_path / "x.jsonl", [{"loss": math.nan}, {"text": "é\u2028"}])
    first, second = (tmp_path / "x.jsonl").read_text(encoding="utf-8").split("\n")[:-1]
    assert first == '{"loss": null}' and json.loads(second) == {"text": "é\u2028"}


def test_what_json_has_no_form_for_changes_nothing(tmp_path):
    path = tmp_path / "x.json"
    files.write_json(path, {"a": 1})
    with pytest.raises(TypeError, match="not JSON serializable"):
        files.write_json(path, {"a": {1, 2}})
    assert strict(path) == {"a": 1} and list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("make", ["file", "folder"])
def test_the_name_is_given_when_the_content_is_on_the_disk(tmp_path, monkeypatch, make):
    """And the one who wrote it is told when the name is, too."""
    told = []

    def fsync(descriptor, real=os.fsync):
        real(descriptor)
        told.append(os.readlink(f"/proc/self/fd/{descriptor}"))

    def renamed(real):
        def rename(old, new):
            told.append("renamed")
            real(old, new)

        return rename

    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr(os, "replace", renamed(os.replace))
    monkeypatch.setattr(os, "rename", renamed(os.rename))
    if make == "file":
        files.write_text(tmp_path / "a", "1")
    else:
        with files.new_folder(tmp_path / "new") as inside:
            (inside / "deep").mkdir()
            (inside / "deep" / "a").write_text("1")
    at = told.index("renamed")
    assert any(name.startswith(str(tmp_path)) and "a" in Path(name).name for name in told[:at])
    assert told[at + 1 :] == [str(tmp_path)]
    if make == "folder":
        assert any(name.endswith("new/deep") for name in told[:at])


def test_no_two_write_at_the_same_place(tmp_path):
    """Processes of two hosts may have one number."""
    path = tmp_path / "x.json"
    with files.replacing(path) as first, files.replacing(path) as second:
        first.write_text("first")
        second.write_text("second")
    assert first != second and path.read_text() == "first"


def test_what_killed_processes_left_is_removed_of_one_file_only(tmp_path):
    for name in ("x[1]", "x1"):
        (tmp_path / f"{name}.partial-0123456789ab").write_text("half")
        (tmp_path / name).write_text("whole")
    files.remove_partial(tmp_path / "x[1]")
    assert {path.name for path in tmp_path.iterdir()} == {"x[1]", "x1", "x1.partial-0123456789ab"}


def test_a_link_to_nothing_is_no_new_folder(tmp_path):
    link = tmp_path / "link"
    link.symlink_to(tmp_path / "nothing")
    entered = []
    with (
        pytest.raises(FileExistsError, match="link exists already; name a new folder"),
        files.new_folder(link) as inside,
    ):
        entered.append(inside)
    assert not entered and list(tmp_path.iterdir()) == [link]


ROOT = Path(__file__).parents[2]
# Where `json.dumps` makes no file: digests, what is compared or read at once, records of text
# alone, what processes tell each other, command lines, what is printed.
NO_FILE = {
    "early_exit/backbones/identity.py",
    "early_exit/data/conversations.py",
    "early_exit/distillation/converse.py",
    "early_exit/distillation/hidden_states.py",
    "early_exit/pretrained/families.py",
    "early_exit/report/page.py",
    "early_exit/runs/layout.py",
    "early_exit/sharding.py",
    "launch/generate.py",
    "launch/tpu/jobset.py",
}


def written_by_hand(source):
    """Lines that write a file past `storage.files`: not in place of one, or not strictly."""
    for node in ast.walk(ast.parse(source)):
        if not (isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute)):
            continue
        called, of = node.func.attr, ast.unparse(node.func.value)
        if called in ("dump", "dumps") and of == "json":
            yield node.lineno, "json"
        if called in ("write_text", "write_bytes") and of not in ("partial", "probe", "files"):
            yield node.lineno, called


@pytest.mark.parametrize("top", ["early_exit", "launch", "experiments"])
def test_files_are_written_in_one_place(top):
    found = {
        (str(path.relative_to(ROOT)), *line)
        for path in (ROOT / top).rglob("*.py")
        if path != ROOT / "early_exit/storage/files.py"
        for line in written_by_hand(path.read_text())
    }
    assert {place for place in found if place[2] != "json" or place[0] not in NO_FILE} == set()


def test_what_is_written_by_hand_is_found():
    assert list(written_by_hand("path.write_text(json.dumps(1))")) == [
        (1, "write_text"),
        (1, "json"),
    ]
    assert not list(written_by_hand("files.write_text(path, files.json_text(1))"))


def test_who_does_not_write_is_asked_for_the_same_arrays_in_the_same_order(tmp_path):
    """Several processes bring each array together; one of them has the file."""
    arrays = {
        "b": np.zeros(2, np.float16),
        "a": np.ones((3, 1), np.float32),
        "c": np.ones(0, np.int32),
    }
    described, asked = [(name, x.shape, x.dtype) for name, x in arrays.items()], {}
    for path in (tmp_path / "file", None):
        names = asked.setdefault(path, [])
        files.write_tensors(
            path, described, lambda name, names=names: names.append(name) or arrays[name]
        )
    assert asked[None] == asked[tmp_path / "file"] == ["a", "c", "b"]
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
