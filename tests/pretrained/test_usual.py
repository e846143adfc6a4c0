"""Families that spell their config as Llama does: what entries mean, and what is refused."""

import json
import math
import pathlib

import pytest

from early_exit.backbones import identity, rotary
from early_exit.backbones.mixture import Mixture
from early_exit.pretrained import experts, families, gemma, granite, mixtral, olmo2, phi3, smollm3

FIXTURES = pathlib.Path(__file__).parents[1] / "fixtures"
SIZES = {
    "vocab_size": 100,
    "hidden_size": 48,
    "num_hidden_layers": 6,
    "num_attention_heads": 6,
    "intermediate_size": 64,
    "max_position_embeddings": 128,
}
GEMMA2, GEMMA3 = SIZES | {"model_type": "gemma2"}, SIZES | {"model_type": "gemma3_text"}
SLIDING, FULL = "sliding_attention", "full_attention"
FACTORS = {"short_factor": [1.0, 1.5, 2.0, 2.5], "long_factor": [2.0, 4.0, 8.0, 16.0]}
NAMES = ("olmo2", "smollm3", "granite", "phi3", "gemma2", "gemma3")
NAMES += ("mixtral", "qwen2_moe", "qwen3_moe", "olmoe")


def test_absent_entries_of_olmo2_are_transformers_defaults():
    config = olmo2.config(SIZES)
    assert (config.norms, config.qk_norm, config.qk_norm_whole) == ("after", True, True)
    assert (config.norm_eps, config.kv_heads, config.tied) == (1e-5, 6, False)
    assert not (config.qkv_bias or config.attention_output_bias)


def test_absent_entries_of_smollm3_are_transformers_defaults():
    config = smollm3.config(SIZES | {"num_attention_heads": 8})
    assert (config.unturned_blocks, config.rope_theta) == ((3,), 2e6)
    assert (config.kv_heads, config.tied, config.window) == (4, True, None)
    config = smollm3.config(SIZES | {"no_rope_layer_interval": 2, "num_key_value_heads": 6})
    assert config.unturned_blocks == (1, 3, 5)


def test_absent_entries_of_granite_are_transformers_defaults():
    config = granite.config(SIZES)
    scales = config.embedding_scale, config.residual_scale, config.logit_divisor
    assert scales == (1, 1, 1) and config.attention_scale == 1


def test_absent_entries_of_phi3_are_transformers_defaults():
    config = phi3.config(SIZES)
    assert (config.norm_eps, config.window, config.tied) == (1e-5, None, False)
    assert (config.rotary_fraction, config.rope_scaling, config.context_length) == (1, None, 128)


def test_absent_entries_of_gemma_are_transformers_defaults():
    config = gemma.config(GEMMA2 | {"num_attention_heads": 8})
    assert (config.kv_heads, config.head_dim, config.tied) == (4, 256, True)
    assert (config.attention_cap, config.logit_cap, config.attention_scale) == (50, 30, 1 / 16)
    assert (config.window, config.full_blocks) == (4096, (1, 3, 5))
    assert config.embedding_scale == math.sqrt(48) and config.activation == "gelu_tanh"
    config = gemma.config(GEMMA3 | {"num_attention_heads": 8})
    assert (config.attention_cap, config.logit_cap, config.qk_norm) == (None, None, True)
    assert (config.full_blocks, config.rope_theta, config.local_rope_theta) == ((5,), 1e6, 1e4)
    without = {"final_logit_softcapping": None, "attn_logit_softcapping": None}
    config = gemma.config(GEMMA2 | {"num_attention_heads": 8} | without)
    assert (config.attention_cap, config.logit_cap) == (None, None)


@pytest.mark.parametrize(
    "entries",
    [
        {
            "rope_theta": 700.0,
            "rope_local_base_freq": 30.0,
            "rope_scaling": {"rope_type": "linear", "factor": 8.0},
        },
        {
            "rope_parameters": {
                FULL: {"rope_type": "linear", "factor": 8.0, "rope_theta": 700.0},
                SLIDING: {"rope_type": "default", "rope_theta": 30.0},
            }
        },
        {
            "rope_theta": 700.0,
            "rope_local_base_freq": 30.0,
            "rope_parameters": {FULL: {"rope_type": "linear", "factor": 8.0}, SLIDING: None},
        },
    ],
)
def test_both_spellings_of_gemma3_s_rotary_positions(entries):
    config = gemma.config(GEMMA3 | {"num_attention_heads": 8} | entries)
    assert (config.rope_theta, config.rope_scaling) == (700, rotary.Linear(8.0))
    assert config.local_rope_theta == 30


def test_absent_entries_of_experts_are_transformers_defaults():
    hf = SIZES | {"num_attention_heads": 16, "hidden_size": 64}
    config = mixtral.config(hf | {"num_attention_heads": 8})
    assert config.mixture == Mixture(8, 2, 64, balance=0.001)
    assert (config.kv_heads, config.norm_eps, config.window) == (8, 1e-5, None)
    config = experts.config(hf | {"model_type": "qwen2_moe"})
    assert config.mixture == Mixture(60, 4, 1408, False, 5632, balance=0.001)
    assert (config.kv_heads, config.qkv_bias, config.attention_output_bias) == (16, True, False)
    config = experts.config(hf | {"model_type": "qwen3_moe"})
    assert config.mixture == Mixture(128, 8, 768, False, balance=0.001)
    assert (config.kv_heads, config.qk_norm, config.qkv_bias) == (4, True, False)
    config = experts.config(hf | {"model_type": "olmoe"})
    assert config.mixture == Mixture(64, 8, 64, False, balance=0.01)
    assert (config.kv_heads, config.qk_norm_whole, config.norm_eps) == (16, True, 1e-5)


@pytest.mark.parametrize(
    ("entries", "dense"),
    [
        ({"mlp_only_layers": [0, 3]}, (0, 3)),
        ({"decoder_sparse_step": 2}, (0, 2, 4)),
        ({"decoder_sparse_step": 3, "mlp_only_layers": [2]}, (0, 1, 2, 3, 4)),
    ],
)
def test_which_blocks_of_a_qwen_have_no_experts(entries, dense):
    hf = SIZES | {"model_type": "qwen3_moe", "num_attention_heads": 4} | entries
    assert experts.config(hf).mixture.dense_blocks == dense


def test_a_gemma3_whose_blocks_see_everything_has_no_frequencies_of_windows():
    config = gemma.config(GEMMA3 | {"num_attention_heads": 8, "layer_types": [FULL] * 6})
    assert (config.window, config.local_rope_theta, config.full_blocks) == (None, None, ())


@pytest.mark.parametrize("kind", ["longrope", "su", "yarn"])
@pytest.mark.parametrize(
    ("entries", "attention_factor"),
    [
        ({}, math.sqrt(1 + math.log(4) / math.log(32))),
        ({"factor": 2.0}, math.sqrt(1 + math.log(2) / math.log(32))),
        ({"attention_factor": 1.3}, 1.3),
        ({"factor": 0.5}, 1.0),
    ],
)
def test_a_phi_of_long_texts_is_taken_in_its_original_context(kind, entries, attention_factor):
    """By whichever name its scaling goes; the factors of longer texts are kept for export."""
    rope = FACTORS | {"type": kind, "rope_theta": 300.0} | entries
    hf = SIZES | {"rope_scaling": rope, "original_max_position_embeddings": 32}
    config = phi3.config(hf)
    short, long = map(tuple, FACTORS.values())
    assert config.rope_scaling == rotary.LongRope(
        short, pytest.approx(attention_factor), 32, long, 128
    )
    assert config.context_length == 32
    written = phi3.to_hf(config)
    assert written["max_position_embeddings"] == 128
    assert written["rope_parameters"]["long_factor"] == list(long)


def test_a_phi_s_heads_are_turned_in_part():
    hf = SIZES | {"partial_rotary_factor": 0.75, "num_attention_heads": 3}
    assert phi3.config(hf).rotary_dim == 12


SMOLLM3 = {"use_sliding_window": True, "sliding_window": 9, "num_key_value_heads": 6}


@pytest.mark.parametrize(
    ("entries", "window", "full_blocks"),
    [
        ({}, 9, (0, 1, 2, 4, 5)),  # by themselves, those that are not turned
        ({"layer_types": [SLIDING] * 6}, 9, ()),
        ({"use_sliding_window": False}, None, ()),
        ({"sliding_window": None}, None, ()),
    ],
)
def test_which_blocks_of_a_smollm3_have_a_window(entries, window, full_blocks):
    config = smollm3.config(SIZES | SMOLLM3 | entries)
    assert (config.window, config.full_blocks) == (window, full_blocks)


@pytest.mark.parametrize(
    ("family", "entries", "message"),
    [
        (olmo2, {"hidden_act": "mish"}, r"hidden_act = 'mish' \(only 'silu' or"),
        (olmo2, {"rope_scaling": {"type": "dynamic", "factor": 2.0}}, "rope_type = 'dynamic'"),
        (olmo2, {"partial_rotary_factor": 0.5}, "partial_rotary_factor = 0.5"),
        (smollm3, {"no_rope_layers": [1, 0]}, "no_rope_layers of 2 blocks, where there are 6"),
        (smollm3, SMOLLM3 | {"layer_types": ["chunked_attention"] * 6}, "layer_types = .'chunked"),
        (granite, {"quantization_config": {"quant_method": "fp8"}}, "quantization_config = .*fp8"),
        (granite, {"position_embedding_type": "rope", "rope_kind": 3}, "rope_kind = 3, which this"),
        (phi3, {"rope_scaling": {"type": "linear", "factor": 2.0}}, "rope_type = 'linear' .only"),
        (phi3, {"attention_bias": True}, "attention_bias = True"),
        (phi3, {"rope_scaling": FACTORS | {"type": "su", "long_mscale": 1.2}}, "long_mscale = 1.2"),
        (gemma, GEMMA2 | {"use_bidirectional_attention": True}, "use_bidirectional_attention = T"),
        (gemma, GEMMA2 | {"hidden_activation": "mish"}, "hidden_activation = 'mish'"),
        (gemma, GEMMA2 | {"sliding_window": None}, "sliding_window = None of blocks with a window"),
        (gemma, GEMMA2 | {"rope_local_base_freq": 30.0}, "rope_local_base_freq = 30.0, which this"),
        (gemma, GEMMA3 | {"attn_logit_softcapping": 50.0}, "attn_logit_softcapping = 50.0"),
        (
            gemma,
            GEMMA3 | {"rope_parameters": {SLIDING: {"rope_type": "linear", "factor": 2.0}}},
            r"rope_type of blocks with a window = \('linear', 1.0\)",
        ),
        (gemma, GEMMA3 | {"rope_parameters": {"rope_type": "linear"}}, "rope_parameters of rope_"),
        (gemma, GEMMA3 | {"layer_types": [FULL] * 5}, "length of layer_types = 5"),
        (experts, {"model_type": "olmoe", "clip_qkv": 8.0}, "clip_qkv = 8.0"),
        (
            experts,
            {"model_type": "qwen2_moe", "use_sliding_window": True},
            "use_sliding_window = True",
        ),
        (mixtral, {"hidden_act": "mish"}, "hidden_act = 'mish'"),
    ],
)
def test_what_the_decoder_cannot_do_is_named(family, entries, message):
    with pytest.raises(ValueError, match=f"what the decoder does not do: .*{message}"):
        family.config(SIZES | entries)


@pytest.mark.parametrize(("family", "kind"), [(phi3, None), (olmo2, None), (gemma, "gemma3_text")])
def test_missing_entries_are_named(family, kind):
    hf = {"model_type": kind} | {k: v for k, v in SIZES.items() if k != "hidden_size"}
    with pytest.raises(ValueError, match="the model's config lacks 'hidden_size'"):
        family.config(hf)


@pytest.mark.parametrize("name", NAMES)
def test_a_config_goes_back_out_as_what_it_was(name):
    hf = json.loads((FIXTURES / f"tiny_{name}" / "config.json").read_text())
    family = families.by_model_type()[hf["model_type"]]
    config = family.config(hf)
    exported = json.loads(json.dumps(family.to_hf(config)))
    assert (exported["model_type"], exported["architectures"]) == (
        hf["model_type"],
        hf["architectures"],
    )
    assert family.config(exported) == config
    for key in exported.keys() & hf.keys() - {"rope_parameters"}:
        assert exported[key] == hf[key], key


def test_the_length_that_changes_a_phi_s_factors_is_no_part_of_its_identity():
    """Nor are the factors beyond it: in the original context they compute nothing."""
    hf = SIZES | {"rope_scaling": FACTORS | {"type": "longrope", "attention_factor": 1.2}}
    hf["original_max_position_embeddings"] = 32
    longer = hf | {"max_position_embeddings": 256}
    other = hf | {"rope_scaling": hf["rope_scaling"] | {"short_factor": [1.0] * 4}}
    names = [identity.of(phi3.config(x), {}).config for x in (hf, longer, other)]
    assert names[0] == names[1] != names[2]
