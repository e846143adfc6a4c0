import dataclasses
import json

import jax
import numpy as np
import pytest
import safetensors.numpy

from conftest import TINY, build
from early_exit import tree
from early_exit.backbones import identity, rotary
from early_exit.exits import artefact
from early_exit.exits.heads import OUTPUTS

KINDS = TINY.head_kinds

CONFIG = {"model": {"source": "somewhere"}, "note": "ŋ"}


def known(backbone, config=TINY):
    return identity.of(config, backbone)


def attach(folder, config, backbone):
    return artefact.attach(folder, config, backbone, known(backbone, config))


def written(folder, **exits):
    """(model, params) of heads that lie in `folder`."""
    model, params = build(**exits)
    artefact.write(folder, model, params, known(params["backbone"]), CONFIG, step=7)
    return model, params


@pytest.fixture
def folder(tmp_path):
    written(tmp_path, classes=9)
    return tmp_path


@pytest.fixture
def backbone():
    return build(classes=9)[1]["backbone"]


@pytest.mark.parametrize("classes", [0, 9])
@pytest.mark.parametrize("output", OUTPUTS)
@pytest.mark.parametrize("head", KINDS)
def test_heads_come_back_bit_for_bit(head, output, classes, tmp_path):
    model, params = written(tmp_path, head=head, output=output, classes=classes)
    again, loaded = attach(tmp_path, TINY, params["backbone"])
    assert again == model
    assert tree.fingerprint(loaded) == tree.fingerprint(params)
    assert jax.tree.structure(loaded) == jax.tree.structure(params)


def test_half_precision_is_kept(tmp_path):
    model, params = build()
    params = jax.tree.map(lambda x: x.astype("bfloat16"), params)
    artefact.write(tmp_path, model, params, known(params["backbone"]), CONFIG, step=7)
    _, loaded = attach(tmp_path, TINY, params["backbone"])
    assert tree.fingerprint(loaded) == tree.fingerprint(params)


def test_the_description_says_what_they_are(folder, backbone):
    described = artefact.describe(folder)
    model, _ = build(classes=9)
    assert described.exits == model.exits
    assert described.backbone == str(known(backbone))
    assert (described.config, described.step, described.dtype) == (CONFIG, 7, "float32")
    # Anyone can read the arrays without this project.
    arrays = safetensors.numpy.load_file(folder / "exits.safetensors")
    assert arrays["token_ids"].dtype == np.int32 and "2/mlp/up/kernel" in arrays


def test_another_backbone_is_refused_naming_both(folder, backbone):
    backbone["final_norm"]["scale"] = backbone["final_norm"]["scale"] * 2
    both = artefact.describe(folder).backbone[:12], str(known(backbone))[:12]
    with pytest.raises(ValueError, match=f"exits.json.*{both[0]}….* this one has {both[1]}…"):
        attach(folder, TINY, backbone)


@pytest.mark.parametrize(
    "change",
    [
        {"norm_eps": 0.1},
        {"rope_theta": 5.0},
        {"rope_scaling": rotary.Linear(2.0)},
        {"window": 7},
        {"activation": "relu"},
    ],
)
def test_the_same_weights_under_another_config_are_another_backbone(folder, backbone, change):
    with pytest.raises(ValueError, match="by its weights or by its config"):
        attach(folder, dataclasses.replace(TINY, **change), backbone)


def test_heads_that_name_their_backbone_by_its_weights_alone_are_taken(folder, backbone):
    """Folders of before fingerprints were of the config, too."""
    described(backbone=tree.fingerprint(backbone))(folder)
    attach(folder, TINY, backbone)
    backbone["final_norm"]["scale"] = backbone["final_norm"]["scale"] * 2
    with pytest.raises(ValueError, match="use the backbone they were tuned on"):
        attach(folder, TINY, backbone)


def described(**changes):
    """Changes `exits.json`; None takes an entry away."""

    def change(folder):
        path = folder / "exits.json"
        fields = json.loads(path.read_text()) | changes
        path.write_text(json.dumps({k: v for k, v in fields.items() if v is not None}))

    return change


def exits(**changes):
    def change(folder):
        fields = json.loads((folder / "exits.json").read_text())["exits"] | changes
        described(exits={k: v for k, v in fields.items() if v is not None})(folder)

    return change


def arrays(change_arrays):
    """Changes `exits.safetensors` by a function of its arrays."""

    def change(folder):
        path = folder / "exits.safetensors"
        held = safetensors.numpy.load_file(path)
        change_arrays(held)
        safetensors.numpy.save_file(held, path)

    return change


def bytes_of(name, change_bytes):
    def change(folder):
        path = folder / name
        path.write_bytes(change_bytes(path.read_bytes()))

    return change


def flipped(content):
    """One bit of the last value."""
    return content[:-2] + bytes([content[-2] ^ 1]) + content[-1:]


def test_what_the_data_was_is_kept_if_it_is_known(tmp_path):
    model, params = build()
    for data in ({"classes": ["ŋ", "b"], "image_size": [8, 8]}, None):
        artefact.write(tmp_path, model, params, known(params["backbone"]), CONFIG, 7, data)
        assert artefact.describe(tmp_path).data == data
    described(data=None)(tmp_path)  # as earlier versions wrote it
    assert "data" not in json.loads((tmp_path / "exits.json").read_text())
    assert artefact.describe(tmp_path).data is None
    described(data=["a", "b"])(tmp_path)
    with pytest.raises(ValueError, match="does not describe exits: data is"):
        artefact.describe(tmp_path)


NAME = "2/mlp/up/kernel"
DAMAGE = {
    "no description": (lambda f: (f / "exits.json").unlink(), "exits.json is missing"),
    "no weights": (lambda f: (f / "exits.safetensors").unlink(), "lacks exits.safetensors"),
    "description cut": (bytes_of("exits.json", lambda b: b[:90]), "exits.json is not valid JSON"),
    "description empty": (bytes_of("exits.json", lambda b: b""), "exits.json is not valid JSON"),
    "not an object": (bytes_of("exits.json", lambda b: b"[1]"), "exits.json holds a JSON list"),
    "not text": (bytes_of("exits.json", lambda b: b"\xff" + b), "exits.json is not valid JSON"),
    "too deep": (
        bytes_of("exits.json", lambda b: b'{"a":' * 100_000),
        "exits.json is not valid JSON",
    ),
    "a name twice": (
        bytes_of("exits.json", lambda b: b.replace(b'"step"', b'"arrays"')),
        "exits.json .*'arrays' stands twice",
    ),
    "newer format": (described(format=2), "exits.json is of format 2, and only 1 is read"),
    "no format": (described(format=None), "exits.json is of format None"),
    "no exits": (described(exits=None), "exits.json does not describe exits: 'exits'"),
    "exits a list": (described(exits=[2, 4]), "exits.json does not describe exits"),
    "no points": (exits(points=None), "exits.json does not describe exits: 'points'"),
    "unknown head": (exits(head="grid"), "exits.json: .*carries no head 'grid'"),
    "unknown setting": (exits(width=3), "exits.json does not describe exits: .*'width'"),
    "points as text": (exits(points="24"), "exits.json .*exit points must be ints"),
    "classes as text": (exits(classes="9"), "exits.json does not describe exits"),
    "another type": (described(dtype="float31"), "exits.json does not describe exits: .*float31"),
    "step as text": (described(step="7"), "exits.json does not describe exits: step is '7'"),
    "no config": (described(config=None), "exits.json does not describe exits: 'config'"),
    "another backbone": (described(backbone="0" * 64), "exits.json.*fingerprint 000000000000…"),
    "points beyond": (exits(points=[2, 6]), r"exit points \[6\] lie outside 1…5"),
    "other points": (exits(points=[2, 5]), r"(?s)missing: 5/mlp/up/kernel.*unexpected: 4/mlp"),
    "one point less": (exits(points=[2]), r"exits.safetensors (?s:.*)unexpected: 4/mlp/up/kernel"),
    "another kind": (exits(head="norm"), "unexpected: 2/mlp/down/kernel"),
    "other classes": (exits(classes=8), r"misfit: token_ids I32 \[9\], wanted .* \[8\]"),
    "all classes": (exits(classes=0), "unexpected: token_ids"),
    "a head lacking": (
        arrays(lambda a: [a.pop(n) for n in list(a) if n.startswith("4/")]),
        r"exits.safetensors (?s:.*)missing: 4/mlp/down/kernel float32 \[40, 24\]",
    ),
    "an array lacking": (arrays(lambda a: a.pop(NAME)), f"missing: {NAME}"),
    "an extra array": (arrays(lambda a: a.update(x=np.ones(3))), r"unexpected: x \[3\]"),
    "transposed": (
        arrays(lambda a: a.update({NAME: a[NAME].T.copy()})),
        rf"misfit: {NAME} F32 \[40, 24\], wanted {NAME} float32 \[24, 40\]",
    ),
    "narrower": (
        arrays(lambda a: a.update({NAME: a[NAME].astype(np.float16)})),
        rf"misfit: {NAME} F16 \[24, 40\]",
    ),
    "integers": (arrays(lambda a: a.update({NAME: a[NAME].astype(np.int64)})), "I64"),
    "no token ids": (arrays(lambda a: a.pop("token_ids")), r"missing: token_ids int32 \[9\]"),
    "another token": (arrays(lambda a: a["token_ids"].put(0, 1)), "damaged, or of another art"),
    "other values": (arrays(lambda a: a[NAME].put(5, 0.25)), "damaged, or of another artefact"),
    "not a number": (arrays(lambda a: a[NAME].put(5, np.nan)), "damaged, or of another artefact"),
    "a bit flipped": (bytes_of("exits.safetensors", flipped), "damaged, or of another artefact"),
    "weights cut": (bytes_of("exits.safetensors", lambda b: b[:-1]), "safetensors is truncated"),
    "weights empty": (bytes_of("exits.safetensors", lambda b: b""), "safetensors is truncated"),
    "header cut": (bytes_of("exits.safetensors", lambda b: b[:99]), "safetensors is truncated"),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_damage_is_one_clear_error(damage, folder, backbone):
    change, message = DAMAGE[damage]
    change(folder)
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        attach(folder, TINY, backbone)


def test_a_smaller_backbone_is_another_one(folder):
    config = dataclasses.replace(TINY, width=12)
    _, params = build(config)
    with pytest.raises(ValueError, match="use the backbone they were tuned on"):
        attach(folder, config, params["backbone"])
