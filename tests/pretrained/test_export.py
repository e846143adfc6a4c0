"""Backbones out and in again: bit for bit, for every family that has a fixture."""

import inspect
import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy

from conftest import build
from early_exit import tree
from early_exit.pretrained import families
from early_exit.pretrained.describe import describe
from early_exit.pretrained.export import export_backbone
from early_exit.pretrained.load import load
from early_exit.pretrained.tokenizer import load_tokenizer
from early_exit.storage import files

FIXTURES = pathlib.Path(__file__).parents[1] / "fixtures"
MODELS = sorted(path.parent.name for path in FIXTURES.glob("*/model.safetensors"))


def exported(folder, pretrained):
    export_backbone(folder, pretrained.config, pretrained.params, pretrained.tokenizer)
    return folder


def stored(folder):
    return safetensors.numpy.load_file(folder / "model.safetensors")


def test_every_family_has_a_fixture():
    found = {describe(str(FIXTURES / name)).checkpoint.config["model_type"] for name in MODELS}
    served = families.by_model_type()
    own = {family for family in families.every() if inspect.ismodule(family)}  # none that was added
    assert {served[name] for name in found} == own


@pytest.mark.parametrize("name", MODELS)
def test_import_export_import_is_bit_equal(name, tmp_path):
    first = load(str(FIXTURES / name))
    folder = exported(tmp_path / "out", first)
    again = load(str(folder))
    assert again.config == first.config
    assert tree.fingerprint(again.params) == tree.fingerprint(first.params)
    # And so are the tensors themselves, under the names they came with, prefixes apart.
    before, after = describe(str(FIXTURES / name)), describe(str(folder))
    assert after.checkpoint.config["model_type"] == before.checkpoint.config["model_type"]
    ours, theirs = stored(folder), stored(FIXTURES / name)
    for new, old in zip(after.entries, before.entries, strict=True):
        if not old.optional:
            tensor = theirs[old.name].astype(np.float32)
            np.testing.assert_array_equal(ours.pop(new.name), tensor, strict=True)
    assert not ours


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_the_dtype_is_kept(dtype, tiny_llama, tmp_path):
    narrow = load(str(tiny_llama), dtype=dtype)
    folder = exported(tmp_path / "out", narrow)
    assert json.loads((folder / "config.json").read_text())["dtype"] == jnp.dtype(dtype).name
    again = load(str(folder), dtype=dtype)
    assert tree.fingerprint(again.params) == tree.fingerprint(narrow.params)


def test_the_tokenizer_goes_along(tmp_path):
    first = load(str(FIXTURES / "tiny_chat"))
    folder = exported(tmp_path / "out", first)
    tokenizer = load_tokenizer(folder)
    text = "def name(self):\n    return 'importing 12 of ŋ'"
    assert tokenizer.encode(text) == first.tokenizer.encode(text)
    assert tokenizer.chat_template == first.tokenizer.chat_template
    config = json.loads((folder / "config.json").read_text())
    assert config["eos_token_id"] == first.tokenizer.eos_token_id


def test_sharded_parameters_are_exported_whole(tiny_llama, tmp_path):
    first = load(str(tiny_llama))
    mesh = jax.make_mesh((1,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    placed = jax.device_put(first.params, jax.NamedSharding(mesh, jax.P("data")))
    export_backbone(tmp_path / "out", first.config, placed)
    assert tree.fingerprint(load(str(tmp_path / "out")).params) == tree.fingerprint(first.params)


def test_an_existing_folder_is_never_touched(tiny_llama, tmp_path):
    (tmp_path / "out").mkdir()
    with pytest.raises(FileExistsError, match="out exists already; name a new folder"):
        exported(tmp_path / "out", load(str(tiny_llama)))
    assert not any((tmp_path / "out").iterdir())


def test_a_failed_export_leaves_nothing(tiny_llama, tmp_path, monkeypatch):
    def full_disk(*_):
        raise OSError("No space left on device")

    first = load(str(tiny_llama))
    monkeypatch.setattr(files.os, "fsync", full_disk)
    with pytest.raises(OSError, match="No space left"):
        exported(tmp_path / "out", first)
    assert not any(tmp_path.iterdir())


def test_a_config_that_no_family_has_is_refused(tmp_path):
    model, params = build()

    class Strange(type(model.config)):
        pass

    strange = Strange(**vars(model.config))
    with pytest.raises(ValueError, match="no family of transformers has a config that says"):
        export_backbone(tmp_path / "out", strange, params["backbone"])
    assert not any(tmp_path.iterdir())
