import dataclasses
import json
import pathlib

import pytest

from early_exit.backbones import rotary
from early_exit.pretrained import llama

FIXTURES = pathlib.Path(__file__).parents[1] / "fixtures"
CONFIG = {
    "model_type": "llama",
    "vocab_size": 100,
    "hidden_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 6,
    "intermediate_size": 64,
    "max_position_embeddings": 128,
}
LONGROPE = {
    "rope_type": "longrope",
    "short_factor": [1.0, 2.0, 3.0, 4.0],
    "long_factor": [1.0, 2.0, 3.0, 4.0],
    "attention_factor": 1.0,
}
LLAMA3 = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}


def test_absent_entries_are_transformers_defaults():
    config = llama.config(CONFIG)
    assert (config.kv_heads, config.head_dim, config.tied) == (6, 8, False)
    assert (config.norm_eps, config.rope_theta, config.window) == (1e-6, 10_000.0, None)

    config = llama.config(CONFIG | {"model_type": "mistral", "num_attention_heads": 8})
    assert (config.kv_heads, config.window, config.qkv_bias) == (8, 4096, False)
    config = llama.config(CONFIG | {"model_type": "mistral", "num_key_value_heads": None})
    assert config.kv_heads == 6

    qwen = CONFIG | {"num_key_value_heads": 2}
    config = llama.config(qwen | {"model_type": "qwen2"})
    assert (config.head_dim, config.qk_norm, config.window) == (8, False, None)
    assert (config.qkv_bias, config.attention_output_bias, config.mlp_bias) == (True, False, False)
    config = llama.config(qwen | {"model_type": "qwen3"})
    assert (config.head_dim, config.qk_norm, config.qkv_bias) == (128, True, False)


@pytest.mark.parametrize(
    "entries",
    [
        {"rope_theta": 500.0, "rope_scaling": None},
        {"rope_theta": 500.0, "rope_scaling": {"type": "default"}},
        {"rope_parameters": {"rope_theta": 500.0, "rope_type": "default"}},
        {"rope_theta": 3.0, "rope_parameters": {"rope_theta": 500.0}},
    ],
)
def test_both_spellings_of_rotary_positions(entries):
    config = llama.config(CONFIG | entries)
    assert (config.rope_theta, config.rope_scaling) == (500.0, None)


@pytest.mark.parametrize("entry", ["rope_scaling", "rope_parameters"])
@pytest.mark.parametrize(
    ("rope", "scaling"),
    [
        ({"rope_type": "linear", "factor": 2.0}, rotary.Linear(2.0)),
        (
            LLAMA3 | {"rope_type": "llama3", "original_max_position_embeddings": 32},
            rotary.Llama3(8.0, 32, 1.0, 4.0),
        ),
        (LLAMA3 | {"rope_type": "llama3"}, rotary.Llama3(8.0, 128, 1.0, 4.0)),
        (
            {"type": "yarn", "factor": 1.0, "beta_fast": 8.0, "truncate": False},
            rotary.Yarn(1.0, 128, 1.0, 8.0, 1.0, False),
        ),
        (
            {"rope_type": "yarn", "factor": 4.0, "attention_factor": 0.5},
            rotary.Yarn(4.0, 128, 0.5),
        ),
        ({"rope_type": "linear", "factor": 2.0, "finetuned": True}, rotary.Linear(2.0)),
        (LONGROPE, rotary.PerPair((1.0, 2.0, 3.0, 4.0))),
        (
            LONGROPE | {"long_factor": [9.0] * 4, "original_max_position_embeddings": 32},
            rotary.LongRope((1.0, 2.0, 3.0, 4.0), 1.0, 32, (9.0,) * 4, 128),
        ),
    ],
)
def test_scaled_rotary_positions(entry, rope, scaling):
    assert llama.config(CONFIG | {entry: rope}).rope_scaling == scaling


def test_entries_that_switch_nothing_on_are_taken():
    """SmolLM2's config has the first, Qwen2.5's the second."""
    hf = CONFIG | {"rope_interleaved": False, "use_mrope": False, "rope_local_base_freq": None}
    assert llama.config(hf) == llama.config(CONFIG)


def test_an_original_context_beside_the_rope_entries_comes_first():
    rope = LLAMA3 | {"rope_type": "llama3", "original_max_position_embeddings": 32}
    hf = CONFIG | {"rope_scaling": rope, "original_max_position_embeddings": 16}
    assert llama.config(hf).rope_scaling.original_context == 16


@pytest.mark.parametrize(
    ("entries", "window", "full_blocks"),
    [
        ({"use_sliding_window": False, "sliding_window": 9, "max_window_layers": 1}, None, ()),
        ({"use_sliding_window": True, "sliding_window": None, "max_window_layers": 1}, None, ()),
        ({"use_sliding_window": True, "sliding_window": 9}, None, ()),  # 28 full ones first
        ({"use_sliding_window": True, "sliding_window": 9, "max_window_layers": 3}, 9, (0, 1, 2)),
        (
            {
                "use_sliding_window": True,
                "sliding_window": 9,
                "layer_types": ["sliding_attention", "full_attention"] * 2,
            },
            9,
            (1, 3),
        ),
    ],
)
@pytest.mark.parametrize("model_type", ["qwen2", "qwen3"])
def test_which_blocks_of_a_qwen_have_a_window(model_type, entries, window, full_blocks):
    config = llama.config(CONFIG | {"model_type": model_type, "num_key_value_heads": 2} | entries)
    assert (config.window, config.full_blocks) == (window, full_blocks)


QWEN = {"model_type": "qwen2", "use_sliding_window": True, "num_key_value_heads": 6}


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        ({"rope_scaling": {"type": "dynamic", "factor": 2.0}}, "rope_type = 'dynamic'"),
        ({"rope_parameters": {"rope_type": "ntk"}}, r"'ntk' \(only 'default' or 'linear'"),
        ({"rope_parameters": {"rope_type": "longrope"}}, "'longrope' without short_factor"),
        (
            {"rope_parameters": LONGROPE | {"long_factor": [0.0] * 4}},
            "long_factor = .* no positive",
        ),
        (
            {"rope_parameters": LONGROPE | {"short_factor": 2.0}},
            "short_factor = 2.0 .* no positive",
        ),
        ({"rope_parameters": {"type": "yarn", "factor": 2.0, "mscale_all": 1.0}}, "mscale_all = 1"),
        ({"rope_scaling": {"type": "yarn", "factor": 2.0, "truncate": "no"}}, "truncate = 'no'"),
        ({"rope_scaling": {"type": "linear", "factor": float("inf")}}, "factor = inf"),
        ({"rotary_emb_base": 500}, "rotary_emb_base = 500, which this family does not have"),
        ({"no_rope_layers": [1, 0]}, r"no_rope_layers = \[1, 0\]"),
        ({"rope_scaling": {"type": "linear"}}, "rope_type = 'linear' without factor"),
        (
            {"rope_scaling": {"type": "llama3", "factor": 8.0}},
            "without low_freq_factor; rope_type = 'llama3' without high_freq_factor",
        ),
        ({"rope_scaling": {"type": "yarn", "factor": "4"}}, "factor = '4' .* no positive number"),
        ({"rope_theta": -1.0}, "rope_theta = -1.0 of rotary positions"),
        (
            {"rope_scaling": LLAMA3 | {"type": "llama3", "high_freq_factor": 1.0}},
            "high_freq_factor = 1.0 is not above low_freq_factor = 1.0",
        ),
        (
            {"rope_parameters": {"full_attention": {"rope_theta": 1e6}, "x": {}}},
            r"differ by layer type \(full_attention, x\)",
        ),
        ({"rope_parameters": {"partial_rotary_factor": 0.5}}, "partial_rotary_factor = 0.5"),
        ({"hidden_act": "mish"}, r"hidden_act = 'mish' \(only 'silu' or"),
        ({"sliding_window": 4096}, "sliding_window = 4096"),
        ({"quantization_config": {"quant_method": "gptq"}}, "quantization_config = .*gptq"),
        (QWEN | {"layer_types": ["chunked_attention"] * 4}, r"layer_types = \['chunked_attention"),
        (QWEN | {"layer_types": ["full_attention"] * 3}, "length of layer_types = 3"),
        ({"rope_theta": -1.0, "hidden_act": "mish"}, "hidden_act.*rope_theta"),
    ],
)
def test_what_the_decoder_cannot_do_is_named(entries, message):
    with pytest.raises(ValueError, match=f"what the decoder does not do: .*{message}"):
        llama.config(CONFIG | entries)


def test_missing_entries_are_named_together_with_what_is_refused():
    hf = {k: v for k, v in CONFIG.items() if k not in ("hidden_size", "vocab_size")}
    message = "config lacks 'vocab_size', 'hidden_size'; the model needs .*hidden_act = 'mish'"
    with pytest.raises(ValueError, match=message):
        llama.config(hf | {"hidden_act": "mish"})


@pytest.mark.parametrize("name", ["llama", "llama3", "mistral", "qwen2", "qwen3"])
def test_a_config_goes_back_out_as_what_it_was(name):
    hf = json.loads((FIXTURES / f"tiny_{name}" / "config.json").read_text())
    config = llama.config(hf)
    exported = json.loads(json.dumps(llama.to_hf(config)))
    assert exported["model_type"] == hf["model_type"]
    assert exported["architectures"] == hf["architectures"]
    assert llama.config(exported) == config
    for key in exported.keys() & hf.keys() - {"rope_parameters", "max_window_layers"}:
        assert exported[key] == hf[key], key


def test_a_llama_whose_heads_do_not_divide_its_width_goes_out_as_a_mistral():
    config = llama.config(CONFIG | {"hidden_size": 50, "head_dim": 8})
    hf = llama.to_hf(config)
    assert (hf["model_type"], hf["sliding_window"]) == ("mistral", None)


def test_a_decoder_that_transformers_has_not_is_not_exported():
    config = llama.config(CONFIG | {"model_type": "mistral", "num_key_value_heads": 2})
    config = dataclasses.replace(config, mlp_bias=True)
    with pytest.raises(ValueError, match="none of llama, mistral, qwen2, qwen3 .* mlp_bias=True"):
        llama.to_hf(config)
