"""Families that are known: the project's, and whatever somebody registers."""

import dataclasses
import importlib.metadata
import json
import shutil
import subprocess
import sys
import types

import pytest

from early_exit.backbones.decoder import DecoderConfig
from early_exit.backbones.encoder import EncoderConfig
from early_exit.pretrained import families, llama
from early_exit.pretrained.describe import describe
from early_exit.pretrained.load import load
from early_exit.runs import assemble


def family(name="minitron", **changes):
    """A family of its own: a Llama whose config spells its width `dim`."""

    def config(hf):
        return llama.config(hf | {"model_type": "llama", "hidden_size": hf["dim"]})

    def to_hf(config):
        hf = llama.to_hf(config)
        return hf | {"model_type": name, "dim": hf["hidden_size"]}

    module = types.ModuleType(name)
    module.__dict__.update(
        MODEL_TYPES=(name,),
        NEW={f"{name}_new": lambda width: EncoderConfig(11, width, 2, 2, 12, 9)},
        PREFIXES=llama.PREFIXES,
        IGNORED=llama.IGNORED,
        config=config,
        to_hf=to_hf,
        entries=llama.entries,
    )
    module.__dict__.update(changes)
    return module


@pytest.fixture(autouse=True)
def forget(monkeypatch):
    monkeypatch.setattr(families, "_known", list(families.every()))


@pytest.fixture
def folder(tiny_llama, tmp_path):
    folder = shutil.copytree(tiny_llama, tmp_path / "model")
    hf = json.loads((folder / "config.json").read_text())
    hf["dim"] = hf.pop("hidden_size")
    (folder / "config.json").write_text(json.dumps(hf | {"model_type": "minitron"}))
    return folder


def test_a_family_of_somebody_else_loads(folder, tiny_llama):
    with pytest.raises(ValueError, match="type 'minitron'; supported are llama, .*register adds"):
        describe(str(folder))
    own = family()
    assert families.register(own) is own and families.register(own) is own
    assert load(str(folder)).config == load(str(tiny_llama)).config
    assert families.every().count(own) == 1


def test_its_networks_can_be_made_anew():
    families.register(family())
    new = {"family": "minitron_new", "width": 8}
    assert assemble._new(new).width == 8
    with pytest.raises(ValueError, match="unknown model.new.family 'x'; .*resnet_cifar.*minitron"):
        assemble._new({"family": "x"})


def test_what_the_project_makes_anew():
    made = families.new_networks()
    images = {"resnet_cifar", "resnet_imagenet", "mobilenet_v2", "efficientnet", "convnext", "vit"}
    assert made.keys() == {*images, "encoder", "modernbert", "deberta", "decoder"}
    assert made["encoder"] is EncoderConfig and made["decoder"] is DecoderConfig


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"MODEL_TYPES": ("x", "qwen2")}, "the family minitron serves qwen2, as .*llama does"),
        ({"NEW": {"encoder": None}}, "the family minitron serves encoder, as .*bert does"),
    ],
)
def test_what_is_served_already_is_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        families.register(family(**changes))
    assert "x" not in families.by_model_type()


def test_a_module_that_is_no_family_is_refused():
    with pytest.raises(ValueError, match="early_exit.pretrained.table lacks MODEL_TYPES, PREFIXES"):
        families.register(sys.modules["early_exit.pretrained.table"])


PACKAGE = """
from early_exit.pretrained.llama import *
from early_exit.pretrained.llama import IGNORED, PREFIXES, config, entries, to_hf
MODEL_TYPES, NEW = ("installed",), {}
"""


def installed(folder, target):
    """A package with an entry point, in a folder."""
    (folder / "their_family.py").write_text(PACKAGE)
    info = folder / "their_family-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: their-family\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(f"[early_exit.families]\ntheirs = {target}\n")
    code = "from early_exit.pretrained import families; print(*families.by_model_type())"
    return subprocess.run(
        [sys.executable, "-c", code],
        env={"PYTHONPATH": f"{folder}:.", "JAX_PLATFORMS": "cpu"},
        capture_output=True,
        text=True,
    )


def test_an_installed_package_s_family_is_known_without_a_call(tmp_path):
    done = installed(tmp_path, "their_family")
    assert done.returncode == 0, done.stderr
    assert done.stdout.split()[-1] == "installed"


def test_an_installed_package_that_cannot_be_imported_is_named(monkeypatch):
    point = importlib.metadata.EntryPoint("theirs", "no_such_module", "early_exit.families")
    monkeypatch.setattr(importlib.metadata, "entry_points", lambda group: [point])
    families._load_all.cache_clear()
    with pytest.raises(RuntimeError, match=r"family theirs \(no_such_module\) cannot be loaded"):
        families.every()
    monkeypatch.undo()


ENCODER = EncoderConfig(
    vocab_size=11, width=8, depth=2, heads=2, mlp_width=12, context_length=9, num_classes=3
)


@pytest.mark.parametrize(
    ("changes", "model_type", "unsaid"),
    [
        ({}, "bert", None),
        ({"pooling": "mean"}, "bert", {"num_classes", "pooling"}),
        ({"pooler": "none"}, "bert", {"num_classes"}),
        ({"pooling": "mean", "pooler": "none"}, "bert", {"num_classes", "pooling"}),
        ({"pooling": "mean", "num_classes": 0}, "bert", {"pooling"}),
        ({"pad_position": 1, "pooling": "mean"}, "roberta", {"num_classes", "pooling", "pooler"}),
        (
            {"token_types": 0, "pooling": "mean", "pooler": "relu"},
            "distilbert",
            {"num_classes", "pooling", "pooler"},
        ),
    ],
)
def test_what_transformers_cannot_say_of_an_encoder_stands_apart(changes, model_type, unsaid):
    config = dataclasses.replace(ENCODER, **changes)
    family, hf = families.writing(config)
    assert hf["model_type"] == model_type and hf.get("early_exit", {}).keys() == (unsaid or set())
    assert families.reading(family, hf, [e.name for e in family.entries(config)]) == config
    # What transformers makes of it has the same blocks, and no classifier of another kind.
    if unsaid:
        assert hf["architectures"][0].endswith("Model") and "id2label" not in hf
    else:
        assert hf["architectures"][0].endswith("ForSequenceClassification")


def test_what_no_encoder_can_be_is_still_refused():
    strange = dataclasses.replace(ENCODER, token_types=0, pad_position=1)
    with pytest.raises(ValueError, match="no family of transformers has a config that says"):
        families.writing(strange)


@pytest.mark.parametrize("unsaid", [{"colour": 1}, "mean", {"pooling": "median"}, {"heads": "2"}])
def test_an_entry_of_our_own_that_fits_nothing_is_refused(unsaid, tiny_llama, tmp_path):
    bert_folder = tiny_llama.parent / "tiny_bert"
    folder = shutil.copytree(bert_folder, tmp_path / "model")
    hf = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(hf | {"early_exit": unsaid}))
    with pytest.raises(ValueError, match="the config of .*model cannot be used"):
        describe(str(folder))
