"""The real model against golden vectors; see `tests/fixtures/make_minilm_golden.py`."""

import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from early_exit.backbones import base

pytestmark = pytest.mark.minilm


@pytest.fixture(scope="module")
def golden():
    path = pathlib.Path(__file__).parents[1] / "fixtures" / "minilm_golden.npz"
    return np.load(path, allow_pickle=False)


@pytest.fixture(scope="module")
def outputs(minilm, golden):
    """(hidden [B, S, T, D] after the golden blocks, features [S, D])."""
    definition, _ = base.abstract(minilm.config.build)

    @jax.jit
    def forward(params, tokens, mask):
        backbone = base.merge(definition, params)
        hidden, context = backbone.stem({"tokens": tokens, "mask": mask})
        start, kept = 0, []
        for stop in golden["blocks"].tolist():
            hidden = backbone.run_blocks(hidden, start, stop, context)
            kept.append(hidden)
            start = stop
        return jnp.stack(kept), backbone.features(hidden)

    return jax.tree.map(np.asarray, forward(minilm.params, golden["tokens"], golden["mask"]))


def test_it_is_a_bare_bert(minilm):
    config = minilm.config
    assert (config.depth, config.width, config.vocab_size) == (6, 384, 30522)
    assert (config.num_classes, config.pooler) == (0, "tanh")


def test_token_ids(minilm, golden):
    sentences = json.loads(str(golden["sentences"]))
    found = minilm.tokenizer(sentences, padding=True, return_tensors="np")
    np.testing.assert_array_equal(found["input_ids"], golden["tokens"])
    np.testing.assert_array_equal(found["attention_mask"].astype(bool), golden["mask"])
    # The file says to pad and cut everything to 128 tokens; nobody asked for that.
    assert minilm.tokenizer("Rates")["input_ids"] == [101, 6165, 102]
    assert len(minilm.tokenizer("word " * 200)["input_ids"]) == 202


def test_hidden_states_and_features_equal_torch(outputs, golden):
    hidden, features = outputs
    np.testing.assert_allclose(hidden[:, :, 0], golden["hidden"], rtol=0, atol=1e-4)
    np.testing.assert_allclose(features, golden["features"], rtol=0, atol=1e-4)


def test_cosines_of_sentences_equal_the_reference(outputs, golden):
    hidden, _ = outputs
    weights = golden["mask"][..., None].astype(np.float32)
    means = (hidden[-1] * weights).sum(1) / weights.sum(1)
    means /= np.linalg.norm(means, axis=1, keepdims=True)
    np.testing.assert_allclose(means @ means.T, golden["cosines"], rtol=0, atol=1e-4)
    # The golden values themselves make sense: of all sentences, the first two mean the same.
    others = golden["cosines"] - np.eye(len(means))
    assert np.unravel_index(others.argmax(), others.shape) == (0, 1)
