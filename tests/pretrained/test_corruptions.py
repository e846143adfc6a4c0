"""Damaged and mismatched model folders: one clear error each, and never half a model.

The heads' artefact has the same in `tests/exits/test_artefact.py`, GGUF files in `test_tensors.py`.
"""

import json
import pathlib
import random
import shutil
import struct

import hypothesis
import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy
from hypothesis import strategies as st

from early_exit.pretrained.describe import describe
from early_exit.pretrained.load import load

FIXTURES = pathlib.Path(__file__).parents[1] / "fixtures"
MODELS = sorted(path.parent.name for path in FIXTURES.glob("*/config.json"))
NAME = "model.layers.1.mlp.up_proj.weight"
INDEX = "model.safetensors.index.json"
OTHER_WEIGHTS = FIXTURES / "tiny_llama/model.safetensors"
SHARDS = [f"model-{i:05d}-of-00002.safetensors" for i in (1, 2)]


@pytest.fixture
def folder(tmp_path):
    """A whole and good model folder with its tokenizer."""
    shutil.copytree(FIXTURES / "tiny_chat", tmp_path / "model")
    load(str(tmp_path / "model"))
    return tmp_path / "model"


def weights(change):
    """Changes the tensors; `change` may return others."""

    def damage(folder):
        path = folder / "model.safetensors"
        tensors = safetensors.numpy.load_file(path)
        tensors = change(tensors) or tensors
        safetensors.numpy.save_file({k: np.asarray(v, order="C") for k, v in tensors.items()}, path)

    return damage


def one(change):
    """Changes one tensor."""
    return weights(lambda tensors: tensors.update({NAME: change(tensors[NAME])}))


def content(change, name="model.safetensors"):
    """Changes the bytes of a file."""

    def damage(folder):
        path = folder / name
        path.write_bytes(change(path.read_bytes()))

    return damage


def header(change):
    """Changes the text of the header, whose length is then set right."""

    def rewritten(whole):
        (length,) = struct.unpack("<Q", whole[:8])
        text = change(whole[8 : 8 + length])
        return struct.pack("<Q", len(text)) + text + whole[8 + length :]

    return content(rewritten)


def entry(**changes):
    """Changes what the header says about one tensor, by the entry it had."""

    def rewritten(text):
        fields = json.loads(text)
        fields[NAME] |= {key: change(fields[NAME][key]) for key, change in changes.items()}
        return json.dumps(fields).encode()

    return header(rewritten)


def config(**changes):
    def damage(folder):
        path = folder / "config.json"
        fields = json.loads(path.read_text()) | changes
        path.write_text(json.dumps({k: v for k, v in fields.items() if v is not ...}))

    return damage


def sharded(change=lambda weight_map: None, after=lambda folder: None):
    """Splits the weights over two files, changes the index, then whatever else."""

    def damage(folder):
        tensors = safetensors.numpy.load_file(folder / "model.safetensors")
        (folder / "model.safetensors").unlink()
        names = sorted(tensors)
        weight_map = {}
        for shard, held in zip(SHARDS, (names[::2], names[1::2]), strict=True):
            safetensors.numpy.save_file({name: tensors[name] for name in held}, folder / shard)
            weight_map |= dict.fromkeys(held, shard)
        index = {"metadata": {}, "weight_map": change(weight_map) or weight_map}
        (folder / INDEX).write_text(json.dumps(index))
        after(folder)

    return damage


def other_config(model):
    return lambda folder: shutil.copy(FIXTURES / model / "config.json", folder)


def cut(share, name="model.safetensors"):
    return content(lambda whole: whole[: int(share * len(whole))], name)


def twice(text):
    """Says of one tensor, a second time, what is said of the next."""
    fields = json.loads(text)
    said = json.dumps({NAME: fields[NAME.replace("up", "down")]}).encode()
    return text.rstrip()[:-1] + b"," + said[1:]


BROKEN = r"model/model\.safetensors is truncated or damaged"
CONFIG = r"config of \S+/model "
TENSORS = r"(?s)the tensors of \S+/model do not fit its config.*"
DAMAGE = {
    # The file of the weights.
    "cut in the length": (cut(0.00003), BROKEN),
    "cut in the header": (cut(0.01), BROKEN),
    "cut in the first tensor": (cut(0.1), BROKEN),
    "cut in the last tensor": (cut(0.999), BROKEN),
    "longer than it says": (content(lambda whole: whole + b"\0"), BROKEN),
    "zeros": (content(lambda whole: bytes(len(whole))), BROKEN),
    "the header one byte longer": (
        content(lambda whole: struct.pack("<Q", struct.unpack("<Q", whole[:8])[0] + 1) + whole[8:]),
        BROKEN,
    ),
    "the header longer than the file": (
        content(lambda whole: struct.pack("<Q", len(whole)) + whole[8:]),
        BROKEN,
    ),
    "the header 2⁶⁴ bytes long": (content(lambda whole: b"\xff" * 8 + whole[8:]), BROKEN),
    "no JSON": (header(lambda text: text[:-9]), BROKEN),
    "a list": (header(lambda text: b"[1, 2]"), BROKEN),
    "nested too deep": (header(lambda text: b'{"a":' * 100_000), BROKEN),
    "no UTF-8": (header(lambda text: text.replace(b"model.norm", b"model.\xff\xfe")), BROKEN),
    "a name twice": (header(twice), BROKEN),
    "an offset too far": (entry(data_offsets=lambda x: [x[0], x[1] + (1 << 40)]), BROKEN),
    "offsets that overlap": (entry(data_offsets=lambda x: [x[0] - 4, x[1] - 4]), BROKEN),
    "offsets in reverse": (entry(data_offsets=lambda x: x[::-1]), BROKEN),
    "a negative offset": (entry(data_offsets=lambda x: [-8, x[1]]), BROKEN),
    "a shape of another size": (entry(shape=lambda x: [x[0], x[1] + 1]), BROKEN),
    "a negative shape": (entry(shape=lambda x: [-n for n in x]), BROKEN),
    "a shape that overflows": (entry(shape=lambda x: [1 << 40, 1 << 40]), BROKEN),
    "an unknown type": (entry(dtype=lambda x: "F31"), BROKEN),
    "another name": (
        header(lambda text: text.replace(b"model.norm", b"model.form")),
        TENSORS + r"missing: model\.norm\.weight \[32\].*unexpected: model\.form\.weight \[32\]",
    ),
    # Whole files that hold something else.
    "flattened": (one(np.ravel), TENSORS + rf"misshaped: {NAME} \[2048\], wanted \[64, 32\]"),
    "transposed": (one(np.transpose), TENSORS + rf"misshaped: {NAME} \[32, 64\], wanted \[64, 3"),
    "a scalar": (one(lambda x: x[0, 0]), TENSORS + rf"misshaped: {NAME} \[\], wanted \[64, 32\]"),
    "empty": (one(lambda x: x[:0]), TENSORS + rf"misshaped: {NAME} \[0, 32\], wanted \[64, 32\]"),
    "integers": (one(lambda x: x.astype(np.int32)), TENSORS + f"mistyped: {NAME} I32, wanted F64"),
    "bits": (one(lambda x: x > 0), TENSORS + f"mistyped: {NAME} BOOL"),
    "complex": (one(lambda x: x.astype(np.complex64)), TENSORS + f"mistyped: {NAME} C64"),
    "eight bits": (
        one(lambda x: x.astype(ml_dtypes.float8_e4m3fn)),
        TENSORS + f"mistyped: {NAME} F8_E4M3, wanted F64, F32, F16, BF16",
    ),
    "one block less": (
        weights(lambda t: {k: v for k, v in t.items() if "layers.5" not in k}),
        TENSORS + r"missing: model\.layers\.5\.input_layernorm\.weight \[32\]",
    ),
    "adapters beside": (
        weights(lambda t: t.update({NAME.replace("weight", "lora_A.weight"): np.ones((8, 32))})),
        TENSORS + r"unexpected: \S+lora_A\.weight \[8, 32\]",
    ),
    "nothing": (weights(lambda t: {"x": np.ones(1)}), CONFIG),
    "not a number": (one(lambda x: x * np.float16(np.nan)), f"{NAME} of .*/model holds NaN"),
    "one infinity": (
        one(lambda x: np.where(np.arange(32) == 7, np.float16(np.inf), x)),
        f"{NAME} of .*/model holds NaN or infinite values",
    ),
    # The config.
    "no config": (lambda f: (f / "config.json").unlink(), "model has no config.json"),
    "config cut": (cut(0.5, "config.json"), "config.json is not valid JSON"),
    "config empty": (cut(0, "config.json"), "config.json is not valid JSON"),
    "config of bytes": (content(lambda whole: b"\xff" * 99, "config.json"), "not valid JSON"),
    "config too deep": (content(lambda _: b'{"a":' * 100_000, "config.json"), "not valid JSON"),
    "an entry twice": (
        content(lambda x: x.replace(b'"rms_norm_eps"', b'"hidden_size"'), "config.json"),
        "config.json is not valid JSON .*'hidden_size' stands twice",
    ),
    "no type": (config(model_type=...), "model holds a model of type None; supported are llama"),
    "a list for a type": (config(model_type=["llama"]), r"holds a model of type \['llama'\]"),
    "another family's": (other_config("tiny_bert"), TENSORS + r"missing: bert\.embeddings"),
    "another family's name": (config(model_type="gpt2"), CONFIG + "cannot be used"),
    "a sister's": (other_config("tiny_llama"), TENSORS + r"misshaped: model\.embed_tokens\.weight"),
    "wider": (config(hidden_size=48), TENSORS + r"misshaped: lm_head\.weight .*wanted \[320, 48\]"),
    "deeper": (config(num_hidden_layers=7), TENSORS + r"missing: model\.layers\.6\.mlp"),
    "shallower": (config(num_hidden_layers=5), TENSORS + r"unexpected: model\.layers\.5\.mlp"),
    "a billion blocks": (config(num_hidden_layers=10**9), CONFIG + ".* asks for 1000000000 blocks"),
    "no blocks": (config(num_hidden_layers=0), CONFIG + ".* asks for 0 blocks"),
    "a size as text": (config(hidden_size="32"), CONFIG + "has an entry of a wrong kind"),
    "a negative size": (config(intermediate_size=-64), CONFIG + "cannot be used: .* = -64"),
    "a fractional size": (config(vocab_size=320.5), CONFIG + "cannot be used: .* = 320.5"),
    "a size of 2⁷⁰": (config(vocab_size=1 << 70), CONFIG + "cannot be used"),
    "a trillion parameters": (config(intermediate_size=1 << 30), CONFIG + ".* parameters, for"),
    "no heads": (config(num_attention_heads=0), CONFIG + "has an entry of a wrong kind"),
    "no size": (config(hidden_size=None), CONFIG),
    "an infinite epsilon": (config(rms_norm_eps=float("inf")), CONFIG + "cannot be used: .* inf"),
    # The index of shards.
    "a shard cut": (sharded(after=cut(0.5, SHARDS[1])), SHARDS[1] + " is truncated or damaged"),
    "a shard missing": (sharded(after=lambda f: (f / SHARDS[0]).unlink()), "lacks " + SHARDS[0]),
    "a shard of another model": (
        sharded(after=lambda f: shutil.copy(OTHER_WEIGHTS, f / SHARDS[0])),
        "index of .*/model says .* its parts are of different models",
    ),
    "a tensor in the other shard": (
        sharded(lambda w: w.update({NAME: SHARDS[0], "lm_head.weight": SHARDS[1]})),
        "index of .*/model says .*safetensors holds .*, but it does not",
    ),
    "a tensor not in the index": (
        sharded(lambda w: {k: v for k, v in w.items() if k != NAME}),
        TENSORS + f"missing: {NAME}",
    ),
    "an empty index": (sharded(after=content(lambda _: b"{}", INDEX)), 'has no "weight_map"'),
    "an index cut": (sharded(after=cut(0.7, INDEX)), f"{INDEX} is not valid JSON"),
    "an index of numbers": (sharded(lambda w: w | {NAME: 1}), f"{INDEX} names 1, which is no file"),
    "an index that leads out": (
        sharded(lambda w: w | {NAME: f"../{SHARDS[0]}"}),
        f"{INDEX} names '../{SHARDS[0]}', which is no file of its own folder",
    ),
    # The tokenizer.
    "a tokenizer cut": (cut(0.5, "tokenizer.json"), "tokenizer.json is not a readable tokenizer"),
    "an empty tokenizer": (content(lambda _: b"{}", "tokenizer.json"), "tokenizer.json is not a"),
    "a larger tokenizer": (
        content(lambda text: text.replace(b'"on": 306', b'"on": 9306'), "tokenizer.json"),
        "tokenizer of .*/model has 9307 tokens, but the embedding table has 320 rows",
    ),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_damage_is_one_clear_error(damage, folder):
    change, message = DAMAGE[damage]
    change(folder)
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        load(str(folder))


@hypothesis.settings(
    suppress_health_check=[hypothesis.HealthCheck.function_scoped_fixture], deadline=None
)
@hypothesis.given(place=st.floats(0, 1, exclude_max=True), value=st.integers(0, 255))
def test_a_damaged_header_fits_or_is_refused(folder, place, value):
    path = folder / "model.safetensors"
    whole = bytearray((FIXTURES / "tiny_chat/model.safetensors").read_bytes())
    whole[int(place * (8 + struct.unpack("<Q", whole[:8])[0]))] = value
    path.write_bytes(whole)
    try:
        describe(str(folder))
    except ValueError as error:
        assert str(folder) in str(error)


ODD = [None, "", "x", -1, 0, 1, 3, 1.5, 10**12, 2**70, float("nan"), [], [1, 2], {}, True, False]


@pytest.mark.parametrize("model", MODELS)
def test_a_config_of_anything_fits_or_is_refused(model, tmp_path):
    """Any entry may hold any value: at worst the config is refused, at once and by name."""
    shutil.copy(FIXTURES / model / "model.safetensors", tmp_path)
    fields = json.loads((FIXTURES / model / "config.json").read_text())
    rng = random.Random(model)
    for _ in range(12):
        odd = fields | {rng.choice(list(fields)): rng.choice(ODD)}
        (tmp_path / "config.json").write_text(json.dumps(odd))
        try:
            found = describe(str(tmp_path))
        except ValueError as error:
            assert str(tmp_path) in str(error)
        else:
            assert found.config.depth <= len(found.checkpoint.shapes)
