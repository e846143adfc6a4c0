import json
import pathlib

import numpy as np
import pytest
import safetensors.numpy

from early_exit import tree
from early_exit.pretrained import gpt2
from early_exit.pretrained.load import load

FIXTURE = pathlib.Path(__file__).parents[1] / "fixtures" / "tiny_gpt2"
CONFIG = {"vocab_size": 100, "n_embd": 48, "n_layer": 2, "n_head": 6, "n_positions": 128}


def test_absent_entries_are_transformers_defaults():
    config = gpt2.config(CONFIG)
    assert (config.mlp_width, config.head_dim, config.tied) == (192, 8, True)
    assert (config.activation, config.norm_eps, config.rotary_fraction) == ("gelu_tanh", 1e-5, 0)
    assert gpt2.config(CONFIG | {"n_inner": 50}).mlp_width == 50


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        ({"scale_attn_by_inverse_layer_idx": True}, "scale_attn_by_inverse_layer_idx = True"),
        ({"scale_attn_weights": False}, r"scale_attn_weights = False \(only True"),
        ({"add_cross_attention": True}, "add_cross_attention = True"),
        ({"activation_function": "quick_gelu"}, "activation_function = 'quick_gelu'"),
        ({"n_head": None, "scale_attn_weights": False}, "lacks 'n_head'; .*scale_attn_weights"),
        ({"n_head": 5}, "n_embd = 48 is not a multiple of n_head = 5"),
    ],
)
def test_what_the_decoder_cannot_do_is_named(entries, message):
    with pytest.raises(ValueError, match=message):
        gpt2.config(CONFIG | entries)


def test_a_config_goes_back_out_as_what_it_was():
    hf = json.loads((FIXTURE / "config.json").read_text())
    config = gpt2.config(hf)
    exported = json.loads(json.dumps(gpt2.to_hf(config)))
    assert gpt2.config(exported) == config
    assert exported["n_inner"] == 4 * hf["n_embd"]
    for key in exported.keys() - {"n_inner"}:
        assert exported[key] == hf[key], key


def test_files_without_the_outer_class_and_with_masks(tmp_path):
    """As the first GPT-2 checkpoints are: `h.0.…`, and the causal mask among the tensors."""
    tensors = safetensors.numpy.load_file(FIXTURE / "model.safetensors")
    bare = {name.removeprefix("transformer."): tensor for name, tensor in tensors.items()}
    assert "h.0.attn.c_attn.weight" in bare and "lm_head.weight" not in bare
    for i in range(3):
        bare[f"h.{i}.attn.bias"] = np.tril(np.ones((1, 1, 48, 48), np.float32))
        bare[f"h.{i}.attn.masked_bias"] = np.array(-1e4, np.float32)
    safetensors.numpy.save_file(bare, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text((FIXTURE / "config.json").read_text())
    want = tree.flatten(load(str(FIXTURE)).params)
    for path, leaf in tree.flatten(load(str(tmp_path)).params).items():
        np.testing.assert_array_equal(leaf, want[path], err_msg=path)
