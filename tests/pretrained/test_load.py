import dataclasses
import json
import pathlib
import sys

import fake_devices
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from early_exit import tree
from early_exit.backbones import base
from early_exit.pretrained import llama, table
from early_exit.pretrained import tensors as tensor_files
from early_exit.pretrained.load import load
from early_exit.pretrained.tokenizer import load_tokenizer
from early_exit.storage import files

ROOT = pathlib.Path(__file__).parents[2]


def bind(pretrained):
    definition, _ = base.abstract(pretrained.config.build)
    return base.merge(definition, pretrained.params)


def assert_same_params(ours, theirs):
    for path, leaf in tree.flatten(ours).items():
        np.testing.assert_array_equal(leaf, tree.flatten(theirs)[path], err_msg=path)


def test_hidden_states_equal_torch_block_by_block(tiny_llama):
    golden = np.load(tiny_llama / "expected.npz", allow_pickle=False)
    backbone = bind(load(str(tiny_llama)))
    hidden, context = backbone.stem({"tokens": jnp.asarray(golden["tokens"])})
    np.testing.assert_array_equal(hidden, golden["hidden"][0])
    for block in range(backbone.config.depth):
        hidden = backbone.run_blocks(hidden, block, block + 1, context)
        np.testing.assert_allclose(hidden, golden["hidden"][block + 1], rtol=0, atol=1e-4)
    np.testing.assert_allclose(backbone.readout(hidden), golden["logits"], rtol=0, atol=1e-4)


def test_the_tree_is_the_one_the_config_builds(tiny_llama):
    pretrained = load(str(tiny_llama))
    _, abstract = base.abstract(pretrained.config.build)
    assert jax.tree.structure(pretrained.params) == jax.tree.structure(abstract)
    assert pretrained.tokenizer is None and pretrained.source == str(tiny_llama)


def test_loading_compiles_nothing(write_gguf, tiny_llama, caplog):
    """A program for each shape would take longer than the weights themselves."""
    for source in (tiny_llama, write_gguf()):
        jax.clear_caches()
        with jax.log_compiles():
            load(str(source))
        assert not [told for told in caplog.messages if "ompil" in told]
    with jax.log_compiles():
        jnp.array(np.zeros((3, 5, 7)))
    assert [told for told in caplog.messages if "ompil" in told]


def test_gguf_equals_its_folder(write_gguf, tiny_llama):
    pretrained = load(str(write_gguf()))
    # The file stores the rounding of 1e-3 to float32.
    config = dataclasses.replace(load(str(tiny_llama)).config, norm_eps=float(np.float32(1e-3)))
    assert pretrained.config == config and len(pretrained.tokenizer) == 101
    assert_same_params(pretrained.params, load(str(tiny_llama)).params)
    assert pretrained.identity == load(str(tiny_llama)).identity


@pytest.mark.parametrize("dtype", [ml_dtypes.bfloat16, np.float16])
def test_narrow_weights_are_widened_without_change(write_folder, tiny_tensors, dtype):
    narrow = {name: tensor.astype(dtype) for name, tensor in tiny_tensors.items()}
    first = load(str(write_folder(narrow)))
    widened = {name: tensor.astype(np.float32) for name, tensor in narrow.items()}
    again, ours = load(str(write_folder(widened))), first.params
    assert_same_params(ours, again.params)
    assert first.identity == again.identity
    assert {leaf.dtype for leaf in jax.tree.leaves(ours)} == {jnp.dtype(jnp.float32)}


def test_parameters_have_the_dtype_asked_for(tiny_llama):
    ours = load(str(tiny_llama), dtype=jnp.bfloat16).params
    full = load(str(tiny_llama)).params
    assert_same_params(ours, jax.tree.map(lambda x: x.astype(jnp.bfloat16), full))


def test_all_misfits_are_reported_together_before_anything_is_read(
    write_folder, tiny_tensors, monkeypatch
):
    tensors = dict(tiny_tensors)
    del tensors["model.layers.1.mlp.up_proj.weight"]
    del tensors["lm_head.weight"]
    tensors["model.layers.0.self_attn.q_proj.bias"] = np.zeros(84, np.float32)
    tensors["model.layers.3.input_layernorm.weight"] = np.zeros(30, np.float32)
    tensors["model.layers.2.mlp.down_proj.weight"] = np.zeros((50, 30), np.float32)
    tensors["model.norm.weight"] = np.zeros((30, 1), np.float32)
    folder = write_folder(tensors)
    opened = tensor_files.open_checkpoint(folder)
    monkeypatch.setattr(
        tensor_files, "open_checkpoint", lambda _: dataclasses.replace(opened, read=None)
    )
    with pytest.raises(ValueError) as error:
        load(str(folder))
    assert str(error.value).split("\n")[1:] == [
        "  misshaped: model.layers.2.mlp.down_proj.weight [50, 30], wanted [30, 50]",
        "  misshaped: model.norm.weight [30, 1], wanted [30]",
        "  missing: lm_head.weight [101, 30]",
        "  missing: model.layers.1.mlp.up_proj.weight [50, 30]",
        "  unexpected: model.layers.0.self_attn.q_proj.bias [84]",
        "  unexpected: model.layers.3.input_layernorm.weight [30]",
    ]


@pytest.mark.parametrize("inner", ["model.", ""])
@pytest.mark.parametrize(
    "prefix", ["module.", "_orig_mod.", "language_model.", "base_model.model.", "net.0."]
)
def test_what_a_wrapper_puts_before_all_names_is_told(write_folder, tiny_tensors, prefix, inner):
    wrapped = {
        name.replace("model.", prefix + inner, 1) if "model." in name else prefix + name: x
        for name, x in tiny_tensors.items()
    }
    buffer = {f"{prefix}layers.0.self_attn.rotary_emb.inv_freq": np.ones(3, np.float32)}
    message = f"missing: model.norm.weight (?s:.*)All names begin with '{prefix}', which a wrapper"
    with pytest.raises(ValueError, match=message):
        load(str(write_folder(wrapped | buffer)))


def test_names_of_another_model_are_not_a_wrapper_s(write_folder, tiny_tensors):
    some = {f"module.{name}": x for name, x in tiny_tensors.items() if "layers.1" not in name}
    other = {f"other.{i}": x for i, x in enumerate(tiny_tensors.values())}
    for tensors in (some, other):
        with pytest.raises(ValueError, match="of another model") as refused:
            load(str(write_folder(tensors)))
        assert "wrapper" not in str(refused.value)


def test_rotary_buffers_of_old_checkpoints_are_passed_over(write_folder, tiny_tensors, tiny_llama):
    buffer = {"model.layers.0.self_attn.rotary_emb.inv_freq": np.zeros(7, np.float32)}
    assert_same_params(
        load(str(write_folder(tiny_tensors | buffer))).params, load(str(tiny_llama)).params
    )


def test_a_stored_copy_of_a_tied_output_matrix(write_folder, tiny_tensors, tiny_llama):
    config = json.loads((tiny_llama / "config.json").read_text()) | {"tie_word_embeddings": True}
    table = tiny_tensors["model.embed_tokens.weight"]
    equal = tiny_tensors | {"lm_head.weight": table}
    pretrained = load(str(write_folder(equal, json.dumps(config))))
    assert "output" not in pretrained.params
    np.testing.assert_array_equal(pretrained.params["embedding"]["embedding"], table)

    with pytest.raises(ValueError, match="lm_head.weight .* tied to embedding/.* differs"):
        load(str(write_folder(tiny_tensors, json.dumps(config))))


def test_weights_too_large_for_the_dtype_are_refused(write_folder, tiny_tensors):
    tiny_tensors["model.norm.weight"][0] = 1e6
    load(str(write_folder(tiny_tensors)))
    with pytest.raises(ValueError, match="model.norm.weight .* infinite values as float16"):
        load(str(write_folder(tiny_tensors)), dtype=jnp.float16)


def test_a_tokenizer_with_more_tokens_than_rows_is_refused(
    write_folder, write_gguf, tiny_tensors, tmp_path
):
    tokenizer = load_tokenizer(write_gguf())
    tokenizer.save_pretrained(tmp_path)
    assert len(load(str(write_folder(tiny_tensors))).tokenizer) == 101
    tokenizer.add_tokens(["one more"])
    tokenizer.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="102 tokens, but the embedding table has 101 rows"):
        load(str(tmp_path))


def test_an_unknown_family_is_named(write_folder, tiny_tensors):
    with pytest.raises(ValueError, match="a model of type 'mamba'; supported are llama"):
        load(str(write_folder(tiny_tensors, config='{"model_type": "mamba"}')))


# In a process of its own: it needs several devices, and a peak of memory that is its own.
SCRIPT = """
import functools, json, resource, sys
import jax, numpy as np
from early_exit.storage import files
from early_exit import sharding, tree
from early_exit.settings.sections import MeshSettings
from early_exit.backbones import base
from early_exit.pretrained import describe, llama, table
from early_exit.pretrained.load import load

folder, small = sys.argv[1:]
mesh = sharding.make_mesh(MeshSettings(fsdp=2, tensor=2))
place = functools.partial(sharding.shardings, mesh=mesh)
plain, sharded = load(small).params, load(small, shardings=place).params  # and warms up
for path, leaf in tree.flatten(sharded).items():
    assert leaf.sharding == tree.flatten(place(plain))[path], path
    np.testing.assert_array_equal(leaf, tree.flatten(plain)[path])
assert sum(not leaf.is_fully_replicated for leaf in jax.tree.leaves(sharded)) > 10

def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024

describe.describe(folder)
before = peak()
params = load(folder, shardings=place).params
largest = max(leaf.nbytes for leaf in jax.tree.leaves(params))
print(json.dumps([peak() - before, tree.size_in_bytes(params), largest]))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="ru_maxrss is in other units elsewhere")
def test_tensors_go_to_their_devices_one_at_a_time(tmp_path, tiny_llama):
    """The peak of memory is one copy of the model and a tensor or two, not two copies."""
    fields = json.loads((tiny_llama / "config.json").read_text())
    fields |= {"num_hidden_layers": 20, "hidden_size": 512, "intermediate_size": 2048}
    (tmp_path / "config.json").write_text(json.dumps(fields))
    config = llama.config(fields)
    _, abstract = base.abstract(config.build)
    flat = tree.flatten(abstract)
    shapes = {
        entry.name: table.stored_shape(entry, [flat[path].shape for path in entry.paths])
        for entry in llama.entries(config)
    }
    files.write_tensors(
        tmp_path / "model.safetensors",
        [(name, shape, np.float32) for name, shape in shapes.items()],
        lambda name: np.ones(shapes[name], np.float32),
    )
    peak, size, largest = fake_devices.found(SCRIPT, tmp_path, tiny_llama, devices=4)
    assert size > 200e6 and peak < size + 2 * largest + 32e6
