"""What a GGUF file says of the network beside its sizes is used or refused, never dropped."""

import math

import numpy as np
import pytest

from early_exit.backbones import rotary
from early_exit.pretrained.describe import describe
from early_exit.pretrained.export import export_backbone
from early_exit.pretrained.load import load

SCALING = "llama.rope.scaling."
YARN = {f"{SCALING}type": "yarn", f"{SCALING}factor": 4.0}


def sharpened(factor, by=1.0):
    return pytest.approx(by * (1 + 0.1 * math.log(factor)))


@pytest.mark.parametrize(
    ("more", "scaling"),
    [
        ({}, None),
        ({f"{SCALING}type": "linear", f"{SCALING}factor": 4.0}, rotary.Linear(4.0)),
        ({f"{SCALING}factor": 4.0}, rotary.Linear(4.0)),
        ({"llama.rope.scale_linear": 4.0}, rotary.Linear(4.0)),
        ({f"{SCALING}factor": 2.0, "llama.rope.scale_linear": 4.0}, rotary.Linear(2.0)),
        ({f"{SCALING}type": "none", f"{SCALING}factor": 4.0}, None),
        ({f"{SCALING}type": "linear"}, None),
        ({f"{SCALING}factor": 0.0, f"{SCALING}finetuned": True}, None),
        (YARN, rotary.Yarn(4.0, 64, sharpened(4))),
        (
            YARN | {f"{SCALING}original_context_length": 16, f"{SCALING}attn_factor": 1.5},
            rotary.Yarn(4.0, 16, sharpened(4, by=1.5)),
        ),
        (
            YARN | {f"{SCALING}yarn_beta_fast": 8.0, f"{SCALING}yarn_beta_slow": -1.0},
            rotary.Yarn(4.0, 64, sharpened(4), beta_fast=8.0),
        ),
    ],
)
def test_scaled_positions_in_every_spelling(write_gguf, more, scaling):
    assert describe(str(write_gguf(more=more))).config.rope_scaling == scaling


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({f"{SCALING}type": "longrope"}, "llama.rope.scaling.type = 'longrope'; only 'none'"),
        ({f"{SCALING}type": "yarn"}, "'yarn' without a scaling.factor"),
        ({f"{SCALING}attn_factor": 1.5}, "attn_factor = 1.5 without yarn"),
        ({f"{SCALING}factor": "4"}, "needs a number llama.rope.scaling.factor, not '4'"),
        ({f"{SCALING}factor": -4.0}, "factor = -4.0 .* no positive number"),
        (YARN | {f"{SCALING}factor": -4.0}, "factor = -4.0 .* no positive number"),
        (YARN | {f"{SCALING}yarn_log_multiplier": 0.5}, "yarn_log_multiplier = 0.5"),
        ({f"{SCALING}alpha": 1000.0}, "not read from GGUF files: llama.rope.scaling.alpha = 1000"),
        (
            {"llama.logit_scale": 0.25, "llama.attention.temperature_length": 8},
            "llama.logit_scale = 0.25, llama.attention.temperature_length = 8. Use the model's",
        ),
        ({"llama.expert_count": 8}, "llama.expert_count = 8"),
        ({"llama.attention.causal": False}, "llama.attention.causal = False"),
        ({"llama.attention.value_length": 7}, "key_length = 14, value_length = 7"),
        ({"llama.attention.sliding_window": 32}, "sliding_window = 32"),
    ],
)
def test_what_is_not_read_is_refused_by_name(write_gguf, more, message):
    with pytest.raises(ValueError, match=message):
        describe(str(write_gguf(more=more)))


def test_keys_that_say_nothing_are_taken(write_gguf):
    plain = describe(str(write_gguf())).config
    more = {"llama.expert_count": 0, "llama.attention.causal": True, "llama.logit_scale": 0.0}
    more |= {"llama.attention.value_length": 14, "llama.attention.sliding_window": 0}
    more |= {"llama.tensor_data_layout": "Meta AI original pth", "general.name": "x"}
    assert describe(str(write_gguf(more=more))).config == plain


def test_divisors_of_the_frequencies_are_used(write_gguf, tmp_path):
    """Llama 3.1's converter writes its scaling as a tensor, one divisor for each frequency."""
    llama3 = rotary.Llama3(8.0, 32, 1.0, 4.0)
    plain = rotary.frequencies(14, 700.0)
    divisors = plain / rotary.frequencies(14, 700.0, llama3)
    assert len(set(divisors.tolist())) > 2
    pretrained = load(str(write_gguf(divisors=divisors)))
    config = pretrained.config
    found = rotary.frequencies(14, config.rope_theta, config.rope_scaling)
    np.testing.assert_allclose(found, rotary.frequencies(14, 700.0, llama3), rtol=1e-6)
    export_backbone(tmp_path / "out", config, pretrained.params)
    assert load(str(tmp_path / "out")).config == config


@pytest.mark.parametrize(
    ("divisors", "more", "message"),
    [
        ([1.0] * 6, {}, "6 divisors of rotary frequencies for 7 pairs"),
        ([1.0] * 6 + [0.0], {}, "no positive numbers"),
        ([2.0] * 7, {f"{SCALING}factor": 4.0}, "rope_freqs.weight and llama.rope.scaling.factor"),
    ],
)
def test_divisors_that_make_no_frequencies_are_refused(write_gguf, divisors, more, message):
    with pytest.raises(ValueError, match=message):
        describe(str(write_gguf(divisors=divisors, more=more)))
