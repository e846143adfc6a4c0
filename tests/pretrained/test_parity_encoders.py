"""Our import of encoders against torch and transformers, in one process; sizes at random."""

import pathlib
import runpy

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from early_exit.backbones import base
from early_exit.pretrained.load import load

pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

pytestmark = pytest.mark.parity

FIXTURES = pathlib.Path(__file__).parents[1] / "fixtures"
SIZES = dict(vocab_size=71, hidden_size=36, num_attention_heads=9, num_hidden_layers=2)
SIZES |= dict(intermediate_size=50, max_position_embeddings=32)
DISTILLED = dict(vocab_size=71, dim=28, n_heads=7, n_layers=4, hidden_dim=30)
DISTILLED |= dict(max_position_embeddings=20)


def run(pretrained, inputs):
    """(hidden [L + 1, B, T, D], features [B, D], logits [B, C] or None)."""
    definition, _ = base.abstract(pretrained.config.build)

    @jax.jit
    def forward(params):
        backbone = base.merge(definition, params)
        hidden, context = backbone.stem(inputs)
        states = [hidden]
        for block in range(backbone.config.depth):
            states.append(backbone.run_blocks(states[-1], block, block + 1, context))
        read = backbone.readout(states[-1], context) if backbone.config.num_classes else None
        return jnp.stack(states), backbone.features(states[-1], context), read

    return forward(pretrained.params)


@pytest.mark.parametrize(
    "name, config, options",
    [
        ("BertModel", dict(hidden_act="gelu_new", type_vocab_size=3), {}),
        ("BertModel", dict(num_attention_heads=1), dict(add_pooling_layer=False)),
        ("BertForSequenceClassification", dict(num_labels=1, hidden_act="relu"), {}),
        ("BertForSequenceClassification", dict(num_labels=2, layer_norm_eps=1e-2), {}),
        ("BertForMaskedLM", dict(hidden_act="silu"), {}),
        ("BertForPreTraining", dict(num_hidden_layers=5), {}),
        ("RobertaModel", dict(pad_token_id=0), {}),
        ("RobertaModel", dict(type_vocab_size=1), dict(add_pooling_layer=False)),
        ("RobertaForMaskedLM", dict(type_vocab_size=1), {}),
        ("RobertaForSequenceClassification", dict(pad_token_id=7, num_labels=6), {}),
        ("XLMRobertaForSequenceClassification", dict(num_labels=3), {}),
        ("XLMRobertaModel", dict(type_vocab_size=1), {}),
        ("CamembertForSequenceClassification", dict(num_labels=2), {}),
        ("ElectraModel", dict(embedding_size=36), {}),
        ("ElectraForPreTraining", dict(embedding_size=10, type_vocab_size=3), {}),
        ("ElectraForMaskedLM", dict(embedding_size=12, hidden_act="relu"), {}),
        ("ElectraForSequenceClassification", dict(embedding_size=40, num_labels=5), {}),
        ("ModernBertModel", dict(num_hidden_layers=5, local_attention=4), {}),
        ("ModernBertForMaskedLM", dict(attention_bias=True, mlp_bias=True), {}),
        (
            "ModernBertForSequenceClassification",
            dict(num_labels=2, classifier_bias=True, hidden_activation="relu"),
            {},
        ),
        (
            "ModernBertForSequenceClassification",
            dict(classifier_pooling="mean", layer_types=["sliding_attention", "full_attention"]),
            {},
        ),
        ("DebertaV2Model", dict(position_buckets=4, type_vocab_size=2), {}),
        ("DebertaV2ForMaskedLM", dict(position_buckets=16, max_relative_positions=20), {}),
        (
            "DebertaV2ForSequenceClassification",
            dict(position_buckets=8, num_labels=2, pooler_hidden_act="relu", hidden_act="relu"),
            {},
        ),
        ("DistilBertModel", {}, {}),
        ("DistilBertForMaskedLM", dict(activation="relu"), {}),
        ("DistilBertForSequenceClassification", dict(sinusoidal_pos_embds=True), {}),
    ],
)
def test_random_encoders(name, config, options, tmp_path):
    helpers = runpy.run_path(str(FIXTURES / "make_encoders.py"))
    sizes = DISTILLED if name.startswith("DistilBert") else SIZES
    if name.startswith("ModernBert"):
        sizes = SIZES | helpers["MODERN"] | dict(num_attention_heads=6)
    if name.startswith("Deberta"):
        sizes = SIZES | helpers["THIRD"]
    kind = getattr(transformers, name)
    model = kind(kind.config_class(**sizes | config), **options)
    model = helpers["randomized"](model, seed=1)
    model.save_pretrained(tmp_path, max_shard_size="20KB")
    assert (tmp_path / "model.safetensors.index.json").exists()

    inputs = helpers["random_inputs"](model, lengths=(11, -4, 7, 1), seed=2)
    expected = helpers["evaluate"](model, inputs)
    pretrained = load(str(tmp_path))
    hidden, features, logits = run(pretrained, inputs)
    # Near padding, a window may hold no token; nobody reads what is made of that.
    real = inputs["mask"] if name.startswith("ModernBert") else slice(None)
    np.testing.assert_allclose(hidden[:, real], expected["hidden"][:, real], rtol=0, atol=1e-4)
    if "features" in expected:
        np.testing.assert_allclose(features, expected["features"], rtol=0, atol=1e-4)
    assert (logits is None) == ("Classification" not in name)
    if logits is not None:
        np.testing.assert_allclose(logits, expected["logits"], rtol=0, atol=1e-4)
