import pytest

from early_exit.pretrained import llama

CONFIG = {
    "vocab_size": 100,
    "hidden_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 6,
    "intermediate_size": 64,
    "max_position_embeddings": 128,
}


def test_absent_entries_are_transformers_defaults():
    config = llama.config(CONFIG)
    assert (config.kv_heads, config.head_dim, config.tied) == (6, 8, False)
    assert (config.norm_eps, config.rope_theta) == (1e-6, 10_000.0)


@pytest.mark.parametrize(
    "entries",
    [
        {"rope_theta": 500.0, "rope_scaling": None},
        {"rope_theta": 500.0, "rope_scaling": {"type": "default"}},
        {"rope_parameters": {"rope_theta": 500.0, "rope_type": "default"}},
    ],
)
def test_both_spellings_of_rotary_positions(entries):
    assert llama.config(CONFIG | entries).rope_theta == 500.0


@pytest.mark.parametrize(
    "entries, message",
    [
        ({"rope_scaling": {"type": "linear", "factor": 2.0}}, "rope_type = 'linear'"),
        ({"rope_parameters": {"rope_type": "llama3", "factor": 8.0}}, "rope_type = 'llama3'"),
        ({"rope_parameters": {"partial_rotary_factor": 0.5}}, "partial_rotary_factor = 0.5"),
        ({"attention_bias": True}, "attention_bias = True"),
        ({"mlp_bias": True}, "mlp_bias = True"),
        ({"hidden_act": "gelu"}, r"hidden_act = 'gelu' \(only 'silu'"),
        ({"sliding_window": 4096}, "sliding_window = 4096"),
        ({"mlp_bias": True, "hidden_act": "relu"}, "hidden_act.*mlp_bias"),
    ],
)
def test_what_the_decoder_cannot_do_is_named(entries, message):
    with pytest.raises(ValueError, match=f"what the decoder does not do: .*{message}"):
        llama.config(CONFIG | entries)


def test_missing_entries_are_named():
    with pytest.raises(ValueError, match="config lacks 'hidden_size'"):
        llama.config({k: v for k, v in CONFIG.items() if k != "hidden_size"})
