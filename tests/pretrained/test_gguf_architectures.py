"""GGUF files of every architecture, as llama.cpp's converter writes them, against their folders."""

import dataclasses
import json
import pathlib

import gguf
import numpy as np
import pytest
import safetensors.numpy

from early_exit import tree
from early_exit.backbones import rotary
from early_exit.pretrained import gguf_architectures, gguf_config
from early_exit.pretrained.describe import describe
from early_exit.pretrained.load import load

FIXTURES = pathlib.Path(__file__).parents[1] / "fixtures"
# What converters call the entries of a `config.json`, where it is not what they call all of them.
MORE = {
    "granite": {
        "attention_multiplier": "attention.scale",
        "embedding_multiplier": "embedding_scale",
        "residual_multiplier": "residual_scale",
        "logits_scaling": "logit_scale",
    },
    "phi3": {"sliding_window": "attention.sliding_window"},
    "gemma2": {
        "sliding_window": "attention.sliding_window",
        "attn_logit_softcapping": "attn_logit_softcapping",
        "final_logit_softcapping": "final_logit_softcapping",
    },
    "gemma3": {"sliding_window": "attention.sliding_window"},
}
ADDS_ONE, BY_PAIRS = ("gemma2", "gemma3"), ("llama", "smollm3", "granite")
# What a file of the architecture cannot say, or says in code: the fixture with this is the file's.
SAID = {
    "qwen2": {"window": None, "full_blocks": (), "rope_scaling": None},
    "smollm3": {"unturned_blocks": (3,)},
    "gemma2": {"attention_scale": 10**-0.5},
    "gemma3": {"attention_scale": 10**-0.5},
}
KEYS = {
    "num_hidden_layers": "block_count",
    "hidden_size": "embedding_length",
    "intermediate_size": "feed_forward_length",
    "max_position_embeddings": "context_length",
    "num_attention_heads": "attention.head_count",
    "num_key_value_heads": "attention.head_count_kv",
    "head_dim": "attention.key_length",
    "vocab_size": "vocab_size",
    "rms_norm_eps": "attention.layer_norm_rms_epsilon",
}
ARCHITECTURES = ("llama", "qwen2", "qwen3", "olmo2", "smollm3", "granite", "phi3", *ADDS_ONE)


def says(writer, key, value):
    add = {bool: writer.add_bool, int: writer.add_uint32, float: writer.add_float32}
    add.get(type(value), writer.add_string)(key, value)


def rope_of(name, hf):
    """Metadata of rotary positions."""
    rope = hf["rope_parameters"]
    if name == "gemma3":
        full, near = rope["full_attention"], rope["sliding_attention"]
        found = {"rope.freq_base": full["rope_theta"], "rope.freq_base_swa": near["rope_theta"]}
        return found | {"rope.scaling.type": "linear", "rope.scaling.factor": full["factor"]}
    found = {"rope.freq_base": float(rope["rope_theta"])}
    if name == "phi3":
        head_dim = hf["hidden_size"] // hf["num_attention_heads"]
        found["rope.dimension_count"] = int(head_dim * rope["partial_rotary_factor"])
        original = hf["original_max_position_embeddings"]
        found["rope.scaling.original_context_length"] = original
        longer = np.log(hf["max_position_embeddings"] / original) / np.log(original)
        found["rope.scaling.attn_factor"] = float(np.sqrt(1 + longer))
    return found


@pytest.fixture
def write(tmp_path):
    """Writes the fixture of that name as a file of an architecture, by the converter's rules."""

    def write(name, fixture=None, **more):
        folder = FIXTURES / f"tiny_{fixture or name}"
        hf = json.loads((folder / "config.json").read_text())
        tensors = safetensors.numpy.load_file(folder / "model.safetensors")
        path = tmp_path / f"{name}.gguf"
        writer = gguf.GGUFWriter(path, name)
        entries = {key: hf[entry] for entry, key in KEYS.items() if hf.get(entry) is not None}
        entries |= {key: hf[entry] for entry, key in MORE.get(name, {}).items()}
        if name in ADDS_ONE:
            entries["attention.sliding_window_pattern"] = 2
        for key, value in (entries | rope_of(name, hf) | more).items():
            says(writer, f"{name}.{key}", value)
        writer.add_tokenizer_model("gpt2")
        writer.add_tokenizer_pre("gpt-2")
        tokens = [chr(ord("A") + i) for i in range(hf["vocab_size"] - 1)] + ["AB"]
        writer.add_token_list(tokens)
        writer.add_token_types([1] * len(tokens))
        writer.add_token_merges(["A B"])
        writer.add_eos_token_id(2)
        if name == "phi3":
            for length in ("short", "long"):
                factors = np.array(hf["rope_parameters"][f"{length}_factor"], np.float32)
                writer.add_tensor(f"rope_factors_{length}.weight", factors)
        architecture = next(a for a, n in gguf.MODEL_ARCH_NAMES.items() if n == name)
        names = gguf.get_tensor_name_map(architecture, hf["num_hidden_layers"])
        for theirs, tensor in tensors.items():
            heads = {"q_proj": "num_attention_heads", "k_proj": "num_key_value_heads"}
            part = theirs.split(".")[-2]
            if name in BY_PAIRS and part in heads:  # convert_hf_to_gguf.py, LlamaModel.permute
                rows = tensor.reshape(hf[heads[part]], 2, -1, *tensor.shape[1:])
                tensor = rows.swapaxes(1, 2).reshape(tensor.shape)
            if name in ADDS_ONE and theirs.endswith("norm.weight"):
                tensor = tensor + 1
            stored = names.get_name(theirs, try_suffixes=(".weight", ".bias"))
            writer.add_tensor(stored, np.ascontiguousarray(tensor))
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        return path

    return write


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_a_file_is_what_its_folder_is(write, name):
    folder = load(str(FIXTURES / f"tiny_{name}"))
    found = load(str(write(name)))
    want = dataclasses.replace(folder.config, **SAID.get(name, {}))
    for field in dataclasses.fields(want):  # numbers are float32 in files
        ours, theirs = getattr(found.config, field.name), getattr(want, field.name)
        if isinstance(theirs, rotary.LongRope):
            ours, theirs = (
                np.hstack([x for x in dataclasses.astuple(y) if x is not None])
                for y in (ours, theirs)
            )
        if isinstance(theirs, float | np.ndarray):
            np.testing.assert_allclose(ours, theirs, rtol=1e-6, err_msg=field.name)
        else:
            assert ours == theirs, field.name
    flat = tree.flatten(folder.params)
    assert tree.shapes(found.params) == tree.shapes(folder.params)
    for path, array in tree.flatten(found.params).items():
        # What has been stored with 1 added has lost what 1 needs.
        atol = 3e-7 if name in ADDS_ONE and path.endswith("scale") else 0
        np.testing.assert_allclose(array, flat[path], rtol=0, atol=atol, err_msg=path)


def test_biases_of_rows_that_go_by_pairs(write):
    """A Llama with biases: those of queries and keys are in llama.cpp's order, too."""
    path = write("llama", fixture="llama3", **{"rope.freq_base": 700.0})
    found, folder = load(str(path)), load(str(FIXTURES / "tiny_llama3"))
    assert found.config.mlp_bias and found.config.attention_output_bias
    assert tree.fingerprint(found.params) == tree.fingerprint(folder.params)


@pytest.mark.parametrize(
    ("name", "more", "message"),
    [
        ("olmo2", {"attention.sliding_window": 8}, "olmo2.attention.sliding_window = 8"),
        ("qwen3", {"expert_count": 4}, "qwen3.expert_count = 4"),
        ("granite", {"rope.scaling.finetuned": False}, "a Granite has no rotary positions"),
        ("phi3", {"rope.scaling.type": "yarn"}, "of this architecture only 'longrope'"),
        ("gemma3", {"attention.sliding_window_pattern": 0}, "sliding_window_pattern, not 0"),
        ("gemma3", {"router_logit_softcapping": 3.0}, "gemma3.router_logit_softcapping = 3"),
        ("smollm3", {"attention.value_length": 3}, "smollm3.attention.key_length = "),
        ("gemma2", {"rope.dimension_count": 4}, "partial_rotary_factor = 0.4"),
    ],
)
def test_what_is_not_read_is_refused_by_name(write, name, more, message):
    with pytest.raises(ValueError, match=message):
        describe(str(write(name, **more)))


@pytest.mark.parametrize(
    ("name", "depth", "scalar"), [("gemma2", 46, 7), ("gemma3", 62, 7), ("gemma3", 26, 10)]
)
def test_the_largest_gemmas_scale_by_another_width(name, depth, scalar):
    metadata = {"general.architecture": name}
    known = {"num_hidden_layers": depth, "hidden_size": 28, "num_attention_heads": 4}
    said = gguf_config.Metadata(pathlib.Path("x"), metadata)
    own = gguf_architectures.BY_NAME[name].own(said, known | {"head_dim": 10})
    assert own["query_pre_attn_scalar"] == scalar
    # Without a key, every second block of the one and every sixth of the other sees everything.
    every = {"gemma2": 2, "gemma3": 6}[name]
    near = [kind == "sliding_attention" for kind in own["layer_types"]]
    has_window = name == "gemma2"  # which the other has by a key alone
    assert near == [has_window and (i + 1) % every != 0 for i in range(depth)]
