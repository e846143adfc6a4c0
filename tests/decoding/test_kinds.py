"""Every kind of decoder, decoded with exits, against the slow decoder."""

import dataclasses

import jax
import numpy as np
import pytest
from decoder_kinds import CONFIGS
from slow_decoder import CLOSE, SlowDecoder, mixed_policy

from conftest import build
from early_exit.decoding.generate import generate
from early_exit.decoding.mode import DEFERRED, LOSSY

PROMPT = [7, 3, 52, 11, 29]
NEWER = ("olmo2", "smollm3", "granite", "phi3", "gemma2", "gemma3", "mixtral", "qwen2_moe")


@pytest.mark.parametrize(
    "mode",
    [
        pytest.param(LOSSY, marks=pytest.mark.long, id="lossy"),
        pytest.param(DEFERRED, id="deferred"),
    ],
)
@pytest.mark.parametrize("kind", NEWER)
def test_exits_of_every_kind_equal_the_slow_decoder(kind, mode):
    """Thresholds by which some positions leave at each exit; windows are filled on the way."""
    # Untied: where the embedding is the output matrix, random networks say their last token again.
    model, params = build(dataclasses.replace(CONFIGS[kind], tied=False), points=(1, 2))
    policy = mixed_policy(model, params, PROMPT, mode)
    (got,) = generate(model, params, [PROMPT], policy=policy, max_new_tokens=30, mode=mode)
    key = jax.random.split(jax.random.key(0), 1)[0]
    slow = SlowDecoder(model, params).decode(PROMPT, policy, mode, 30, key)
    assert got.tokens.tolist() == slow.tokens
    assert got.exits.tolist() == slow.exits and len(set(slow.exits)) > 1
    np.testing.assert_allclose(got.log_probs, slow.log_probs, atol=CLOSE)
