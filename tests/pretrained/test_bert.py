"""BERT, RoBERTa, DistilBERT and ELECTRA from folders; see `tests/fixtures/make_encoders.py`."""

import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy

from early_exit import tree
from early_exit.backbones import base
from early_exit.pretrained import bert, distilbert, electra, roberta
from early_exit.pretrained.export import export_backbone
from early_exit.pretrained.load import load

FIXTURES = pathlib.Path(__file__).parents[1] / "fixtures"
FAMILIES = {
    "tiny_bert": bert,
    "tiny_roberta": roberta,
    "tiny_distilbert": distilbert,
    "tiny_electra": electra,
}
TYPED = ("tiny_bert", "tiny_electra")
INPUTS = ("tokens", "mask", "token_types")


def read(name):
    """(transformers' config, tensors, what torch says)."""
    folder = FIXTURES / name
    config = json.loads((folder / "config.json").read_text())
    tensors = safetensors.numpy.load_file(folder / "model.safetensors")
    return config, tensors, dict(np.load(folder / "expected.npz", allow_pickle=False))


def write(folder, config, tensors):
    (folder / "config.json").write_text(json.dumps(config))
    safetensors.numpy.save_file(tensors, folder / "model.safetensors")
    return str(folder)


def run(pretrained, inputs):
    """(hidden [L + 1, B, T, D], features [B, D], logits [B, C] or None), block by block."""
    definition, _ = base.abstract(pretrained.config.build)

    @jax.jit
    def forward(params):
        backbone = base.merge(definition, params)
        hidden, context = backbone.stem(inputs)
        states = [hidden]
        for block in range(backbone.config.depth):
            states.append(backbone.run_blocks(states[-1], block, block + 1, context))
        read = backbone.readout(states[-1]) if backbone.config.num_classes else None
        return jnp.stack(states), backbone.features(states[-1]), read

    return forward(pretrained.params)


def assert_equals_torch(found, expected):
    for ours, name in zip(found, ("hidden", "features", "logits"), strict=True):
        if ours is not None:
            np.testing.assert_allclose(ours, expected[name], rtol=0, atol=1e-4, err_msg=name)


@pytest.fixture(params=FAMILIES)
def name(request):
    return request.param


def test_every_block_and_the_readout_equal_torch(name):
    pretrained = load(str(FIXTURES / name))
    _, _, expected = read(name)
    inputs = {key: expected[key] for key in INPUTS if key in expected}
    assert not inputs["mask"].all() and ("token_types" in inputs) == (name in TYPED)
    found = run(pretrained, inputs)
    assert found[-1].shape == (len(inputs["tokens"]), pretrained.config.num_classes)
    assert_equals_torch(found, expected)


def test_a_bare_encoder_keeps_its_features_and_has_no_logits(tmp_path):
    """BertModel, as sentence encoders are stored: no prefix, and a buffer of positions."""
    config, tensors, expected = read("tiny_bert")
    bare = {k.removeprefix("bert."): v for k, v in tensors.items() if k.startswith("bert.")}
    bare["embeddings.position_ids"] = np.arange(24)[None]
    pretrained = load(write(tmp_path, config | {"architectures": ["BertModel"]}, bare))
    assert pretrained.config.num_classes == 0 and "output" not in pretrained.params
    found = run(pretrained, {key: expected[key] for key in INPUTS})
    assert found[-1] is None
    assert_equals_torch(found, expected)


def test_a_checkpoint_without_pooler_gives_the_first_position(name, tmp_path):
    """As saved after training with masked words, the heads of which are not needed."""
    config, tensors, expected = read(name)
    prefix = config["model_type"] + "."
    family = config["architectures"][0].removesuffix("ForSequenceClassification")
    body = {k: v for k, v in tensors.items() if k.startswith(prefix) and "pooler" not in k}
    body |= dict.fromkeys(
        {
            "tiny_bert": ["cls.predictions.bias", "cls.seq_relationship.weight"],
            "tiny_roberta": ["lm_head.bias", "lm_head.dense.weight"],
            "tiny_distilbert": ["vocab_transform.weight", "vocab_projector.bias"],
            "tiny_electra": ["discriminator_predictions.dense.bias", "generator_lm_head.bias"],
        }[name],
        np.zeros(3, np.float32),
    )
    source = write(tmp_path, config | {"architectures": [f"{family}ForMaskedLM"]}, body)
    pretrained = load(source)
    assert pretrained.config.pooler == "none" and "pooler" not in pretrained.params
    hidden, features, _ = run(pretrained, {k: expected[k] for k in INPUTS if k in expected})
    np.testing.assert_allclose(hidden, expected["hidden"], rtol=0, atol=1e-4)
    np.testing.assert_allclose(features, hidden[-1, :, 0], rtol=0, atol=1e-6)

    export_backbone(tmp_path / "out", pretrained.config, pretrained.params)
    assert load(str(tmp_path / "out")).config == pretrained.config


def test_names_of_the_first_checkpoints(tmp_path):
    """Google's BERTs on the hub still call LayerNorms' parameters gamma and beta."""
    config, tensors, _ = read("tiny_bert")
    old = {
        k.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta")
        if "LayerNorm" in k
        else k: v
        for k, v in tensors.items()
    }
    assert any(k.endswith("LayerNorm.gamma") for k in old)
    ours = tree.flatten(load(write(tmp_path, config, old)).params)
    for path, leaf in tree.flatten(load(str(FIXTURES / "tiny_bert")).params).items():
        np.testing.assert_array_equal(ours[path], leaf, err_msg=path)


def test_config_there_and_back(name):
    config, _, _ = read(name)
    family = FAMILIES[name]
    ours = family.config(config)
    written = family.to_hf(ours)
    assert family.config(written) == ours
    differing = {k: (config.get(k), v) for k, v in written.items() if config.get(k, v) != v}
    assert not differing  # what the original says and what is written never contradict


def test_absent_entries_are_transformers_defaults():
    config, _, _ = read("tiny_bert")
    sizes = ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads")
    sizes += ("intermediate_size", "max_position_embeddings")
    ours = bert.config({name: config[name] for name in sizes})
    assert (ours.activation, ours.norm_eps, ours.token_types) == ("gelu", 1e-12, 2)
    assert (ours.num_classes, ours.pooler, ours.pad_position) == (0, "tanh", None)
    classifier = {"architectures": ["BertForSequenceClassification"]}
    assert bert.config({name: config[name] for name in sizes} | classifier).num_classes == 2


def test_the_positions_of_roberta_shorten_its_context():
    config, _, _ = read("tiny_roberta")
    assert roberta.config(config).context_length == 24 - 5


@pytest.mark.parametrize(
    "name, entries, message",
    [
        ("tiny_bert", {"hidden_act": "quick_gelu"}, "hidden_act = 'quick_gelu'.*but 'gelu', "),
        ("tiny_bert", {"position_embedding_type": "relative_key"}, "type = 'relative_key'"),
        ("tiny_bert", {"is_decoder": True}, "is_decoder = True"),
        ("tiny_bert", {"add_cross_attention": True}, "add_cross_attention = True"),
        ("tiny_bert", {"quantization_config": {"bits": 4}}, "quantization_config = {'bits': 4}"),
        (
            "tiny_bert",
            {"architectures": ["BertForQuestionAnswering"]},
            "architectures = 'BertForQuestionAnswering'.*'BertForSequenceClassification'",
        ),
        ("tiny_roberta", {"architectures": ["RobertaForTokenClassification"]}, "ForTokenClass"),
        ("tiny_roberta", {"is_decoder": True, "hidden_act": "mish"}, "'mish'.*is_decoder = True"),
        ("tiny_distilbert", {"activation": "mish"}, "activation = 'mish'"),
        ("tiny_distilbert", {"architectures": ["DistilBertForMultipleChoice"]}, "MultipleChoice"),
        ("tiny_bert", {"hidden_size": None, "is_decoder": True}, "lacks 'hidden_size'; is_decoder"),
        (
            "tiny_roberta",
            {"vocab_size": None, "pad_token_id": None},
            "'vocab_size'.*'pad_token_id'",
        ),
        ("tiny_electra", {"architectures": ["ElectraForTokenClassification"]}, "ForTokenClass"),
        ("tiny_electra", {"hidden_size": None, "hidden_act": "mish"}, "'hidden_size'; hidden_act"),
        ("tiny_distilbert", {"n_layers": None}, "the model's config lacks 'n_layers'"),
    ],
)
def test_all_that_is_missing_or_not_supported_is_named(name, entries, message):
    with pytest.raises(ValueError, match=message):
        FAMILIES[name].config(read(name)[0] | entries)


def test_absent_sizes_are_all_named():
    with pytest.raises(ValueError, match="lacks 'vocab_size'; .*lacks 'dim'; .* 'hidden_dim'"):
        distilbert.config({"n_layers": 2})


def test_a_bert_without_token_types_cannot_be_written():
    with pytest.raises(ValueError, match="a Bert has token types, and this encoder has none"):
        bert.to_hf(distilbert.config(read("tiny_distilbert")[0]))
