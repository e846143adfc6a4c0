"""The real model against golden vectors; see `tests/fixtures/make_smollm2_golden.py`."""

import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from early_exit import policy as policies
from early_exit.backbones import base
from early_exit.decoding.generate import generate
from early_exit.exits.heads import ExitConfig
from early_exit.exits.multi_exit import MultiExit

pytestmark = pytest.mark.smollm2


@pytest.fixture(scope="module")
def golden():
    path = pathlib.Path(__file__).parents[1] / "fixtures" / "smollm2_golden.npz"
    return np.load(path, allow_pickle=False)


@pytest.fixture(scope="module")
def outputs(smollm2, golden):
    """(logits [P, T, V], hidden states [P, B, T, D] after the golden blocks)."""
    definition, _ = base.abstract(smollm2.config.build)

    @jax.jit
    def forward(params, tokens):
        backbone = base.merge(definition, params)
        hidden, context = backbone.stem({"tokens": tokens})
        start, kept = 0, []
        for stop in golden["blocks"].tolist():
            hidden = backbone.run_blocks(hidden, start, stop, context)
            kept.append(hidden)
            start = stop
        return backbone.readout(hidden), jnp.stack(kept, axis=1)

    return jax.tree.map(np.asarray, forward(smollm2.params, jnp.asarray(golden["tokens"])))


def test_logits_equal_torch(outputs, golden):
    logits, _ = outputs
    np.testing.assert_allclose(
        logits[..., golden["vocab_ids"]], golden["logits"], rtol=0, atol=1e-3
    )
    # The sum sees every logit, not only the sampled ones.
    np.testing.assert_allclose(
        jax.nn.logsumexp(logits, axis=-1), golden["logsumexp"], rtol=0, atol=1e-3
    )
    # Two logits that are each within 1e-3 of torch's can change places within 2e-3.
    best = np.take_along_axis(logits, golden["argmax"][..., None], axis=-1)[..., 0]
    assert (logits.max(-1) - best).max() <= 2e-3


def test_hidden_states_equal_torch(outputs, golden):
    _, hidden = outputs
    # Relative to each vector's largest entry (up to 25,000 here), which sets what rounds away.
    scale = np.abs(golden["hidden"]).max(-1, keepdims=True)
    error = np.abs(hidden[:, :, golden["positions"]] - golden["hidden"]) / scale
    assert error.max() <= 1e-5


def test_token_ids(smollm2, golden):
    texts = json.loads(str(golden["strings"]))
    ids = np.split(golden["string_ids"], np.cumsum(golden["string_lengths"])[:-1])
    for text, expected in zip(texts, ids, strict=True):
        found = smollm2.tokenizer(text)["input_ids"]
        assert found == expected.tolist(), text
        assert smollm2.tokenizer.decode(found) == text


def test_digits_are_split_one_by_one(smollm2):
    assert smollm2.tokenizer.tokenize("a 12  345") == ["a", "Ġ", "1", "2", "ĠĠ", "3", "4", "5"]


def test_special_tokens_and_chat_template(smollm2):
    tokenizer = smollm2.tokenizer
    assert len(tokenizer) == smollm2.config.vocab_size == 49152
    assert (tokenizer.bos_token, tokenizer.eos_token) == ("<|im_start|>", "<|im_end|>")
    assert (tokenizer.pad_token, tokenizer.unk_token) == ("<|im_end|>", "<|endoftext|>")
    chat = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"}]
    text = tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
    assert text == (
        "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n"
        "<|im_start|>assistant\n"
    )


@pytest.mark.long
@pytest.mark.parametrize("exits", [False, True], ids=["full model", "exits that never fire"])
def test_greedy_tokens_equal_torch(smollm2, golden, exits):
    """Ten prompts of several lengths in one batch, through the cached, jitted loop."""
    model = MultiExit(smollm2.config, ExitConfig((10, 20), head="norm", output="shared"))
    heads = model.init_exits(jax.random.key(0), smollm2.params, "copy", None)
    prompts = [row[row >= 0].tolist() for row in golden["greedy_prompts"]]
    assert len({len(prompt) for prompt in prompts}) > 1
    # No step of the golden texts is a tie that rounding could decide.
    assert golden["greedy_gap"].min() > 1e-4
    answers = generate(
        model,
        {"backbone": smollm2.params, "exits": heads},
        prompts,
        policy=policies.never(2) if exits else None,
        max_new_tokens=64,
    )
    for answer, expected in zip(answers, golden["greedy_tokens"], strict=True):
        assert answer.tokens.tolist() == expected.tolist()
