import json
import pathlib

import pytest

from early_exit.backbones import rotary
from early_exit.pretrained import neox

FIXTURES = pathlib.Path(__file__).parents[1] / "fixtures"
CONFIG = {
    "vocab_size": 100,
    "hidden_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 3,
    "intermediate_size": 64,
    "max_position_embeddings": 128,
}


def test_absent_entries_are_transformers_defaults():
    config = neox.config(CONFIG)
    assert (config.rotary_fraction, config.rotary_dim, config.rope_theta) == (0.25, 4, 10_000.0)
    assert (config.parallel, config.qkv_bias, config.mlp_bias) == (True, True, True)
    assert (config.activation, config.norm_eps, config.tied) == ("gelu", 1e-5, False)


@pytest.mark.parametrize(
    "entries",
    [
        {"rotary_pct": 0.5, "rotary_emb_base": 500},
        {
            "rotary_pct": 0.5,
            "partial_rotary_factor": 0.5,
            "rotary_emb_base": 500,
            "rope_theta": 500,
        },
        {"rope_parameters": {"partial_rotary_factor": 0.5, "rope_theta": 500}},
        {"rope_parameters": {"partial_rotary_factor": 0.5, "rope_theta": 500}, "rotary_pct": 0.1},
    ],
)
def test_both_spellings_of_rotary_positions(entries):
    config = neox.config(CONFIG | entries)
    assert (config.rotary_fraction, config.rope_theta) == (0.5, 500)


def test_scaled_rotary_positions():
    config = neox.config(CONFIG | {"rope_scaling": {"type": "linear", "factor": 2.0}})
    assert (config.rope_scaling, config.rotary_fraction) == (rotary.Linear(2.0), 0.25)


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        ({"hidden_act": "gelu_10"}, "hidden_act = 'gelu_10'"),
        ({"rope_scaling": {"type": "dynamic", "factor": 2.0}}, "rope_type = 'dynamic'"),
        ({"rope_theta": 500}, "rope_theta = 500, though rotary_emb_base = 10000"),
        ({"rotary_ndims": 4}, "rotary_ndims = 4, which this family does not have"),
        ({"rotary_pct": 0.0}, "no rotary positions"),
        ({"rotary_pct": 0.2}, "an even number of dimensions, not 3"),
        ({"num_attention_heads": 5}, "hidden_size = 48 is not a multiple of 5 attention heads"),
        ({"hidden_size": None, "hidden_act": "x"}, "lacks 'hidden_size'; .*hidden_act = 'x'"),
    ],
)
def test_what_the_decoder_cannot_do_is_named(entries, message):
    with pytest.raises(ValueError, match=message):
        neox.config(CONFIG | entries)


@pytest.mark.parametrize("name", ["neox", "neox_serial"])
def test_a_config_goes_back_out_as_what_it_was(name):
    hf = json.loads((FIXTURES / f"tiny_{name}" / "config.json").read_text())
    config = neox.config(hf)
    exported = json.loads(json.dumps(neox.to_hf(config)))
    assert neox.config(exported) == config
    for key in exported:
        assert exported[key] == hf[key], key
