import json
import pathlib
import struct

import hypothesis
import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy
from hypothesis import strategies as st

from early_exit.pretrained import gguf_file
from early_exit.pretrained.tensors import open_checkpoint


def write_shards(folder: pathlib.Path, tensors: dict[str, np.ndarray], count: int) -> None:
    """Splits a single-file folder into shards with an index."""
    (folder / "model.safetensors").unlink()
    weight_map = {}
    for i in range(count):
        names = sorted(tensors)[i::count]
        file = f"model-{i + 1:05d}-of-{count:05d}.safetensors"
        safetensors.numpy.save_file({name: tensors[name] for name in names}, folder / file)
        weight_map |= dict.fromkeys(names, file)
    index = {"metadata": {}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def test_shards_read_like_a_single_file(write_folder, tiny_tensors):
    folder = write_folder(tiny_tensors)
    single = open_checkpoint(folder)
    write_shards(folder, tiny_tensors, 3)
    sharded = open_checkpoint(folder)
    assert sharded.shapes == single.shapes == {n: t.shape for n, t in tiny_tensors.items()}
    for name, tensor in tiny_tensors.items():
        np.testing.assert_array_equal(sharded.read(name), tensor)


@pytest.mark.parametrize("dtype", [ml_dtypes.bfloat16, np.float16])
def test_narrow_types_come_as_stored(write_folder, tiny_tensors, dtype):
    narrow = {name: tensor.astype(dtype) for name, tensor in tiny_tensors.items()}
    checkpoint = open_checkpoint(write_folder(narrow))
    for name, tensor in narrow.items():
        assert checkpoint.read(name).dtype == dtype
        np.testing.assert_array_equal(checkpoint.read(name), tensor)


def test_missing_shards_are_all_named(write_folder, tiny_tensors):
    folder = write_folder(tiny_tensors)
    write_shards(folder, tiny_tensors, 3)
    (folder / "model-00001-of-00003.safetensors").unlink()
    (folder / "model-00003-of-00003.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match="lacks model-00001-of-00003.*model-00003-of-00003"):
        open_checkpoint(folder)


def test_folders_that_are_no_models(tmp_path):
    with pytest.raises(FileNotFoundError, match="has no config.json"):
        open_checkpoint(tmp_path)
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "pytorch_model.bin").touch()
    with pytest.raises(FileNotFoundError, match="save the weights as safetensors"):
        open_checkpoint(tmp_path)


def test_gguf_says_what_the_folder_says(write_gguf, tiny_llama):
    ours, theirs = open_checkpoint(write_gguf()), open_checkpoint(tiny_llama)
    assert ours.shapes == theirs.shapes
    for name in ours.shapes:
        np.testing.assert_array_equal(ours.read(name), theirs.read(name))
    for key in ("vocab_size", "head_dim", "num_key_value_heads", "tie_word_embeddings"):
        assert ours.config[key] == theirs.config[key]


def test_gguf_of_another_architecture(write_gguf):
    with pytest.raises(ValueError, match="architecture 'mamba'; of GGUF files only 'llama'"):
        open_checkpoint(write_gguf(architecture="mamba"))


def test_gguf_cut_anywhere_is_refused(write_gguf):
    path = write_gguf()
    content = path.read_bytes()
    _, stored = gguf_file.read_header(path)
    end = max(tensor.offset + tensor.size for tensor in stored.values())  # padding follows
    for keep in np.linspace(0, end - 1, 60).astype(int):
        path.write_bytes(content[:keep])
        with pytest.raises(ValueError, match=r"tiny\.gguf is not a GGUF file, or is truncated"):
            open_checkpoint(path)


def test_gguf_names_that_stand_twice_are_refused(write_gguf):
    path = write_gguf()
    path.write_bytes(path.read_bytes().replace(b"blk.1.ffn_up.weight", b"blk.0.ffn_up.weight"))
    with pytest.raises(ValueError, match=r"tiny\.gguf .*blk\.0\.ffn_up\.weight is there twice"):
        open_checkpoint(path)


@pytest.mark.parametrize("what", ["tensors", "metadata", "array", "string"])
def test_absurd_gguf_lengths_are_refused_at_once(write_gguf, what):
    path = write_gguf()
    content = bytearray(path.read_bytes())
    array = content.index(b"tokenizer.ggml.token_type") + len("tokenizer.ggml.token_type") + 4
    offset = {"tensors": 8, "metadata": 16, "array": array + 4, "string": 24}[what]
    content[offset : offset + 8] = struct.pack("<Q", 1 << 60)
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"tiny\.gguf is not a GGUF file, or is truncated"):
        open_checkpoint(path)


@hypothesis.settings(
    suppress_health_check=[hypothesis.HealthCheck.function_scoped_fixture], deadline=None
)
@hypothesis.given(place=st.floats(0, 1, exclude_max=True), value=st.integers(0, 255))
def test_a_damaged_gguf_header_opens_or_says_so(write_gguf, place, value):
    path = write_gguf()
    _, stored = gguf_file.read_header(path)
    content = bytearray(path.read_bytes())
    content[int(place * min(tensor.offset for tensor in stored.values()))] = value
    path.write_bytes(content)
    try:
        open_checkpoint(path)
    except ValueError as error:
        assert str(path) in str(error)
