"""What comes whole, comes back; damaged files are in tests/pretrained and tests/exits."""

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
