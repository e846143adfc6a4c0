"""Runs and what they are exported to: the same network, or a refusal."""

import json
import pathlib
import shutil
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tokenizers
import transformers

from configs import tiny
from early_exit import tree
from early_exit.pretrained.load import load
from early_exit.runs import assemble, checkpoint, layout
from early_exit.settings import read

FIXTURES = pathlib.Path(__file__).parents[1] / "fixtures"
PROMPT = {"tokens": jnp.asarray([[5, 9, 4, 7, 3]])}


def change(path, **entries):
    path.write_text(json.dumps(json.loads(path.read_text()) | entries))


def save_run(folder, source, *, trained=False, name=None, changes=None, **settings):
    """A run whose heads are as drawn; its backbone moved a little, where it is `trained`.

    Args:
      name: of the backbone in the checkpoint, instead of today's.
    """
    settings = {"model.source": str(source), "tune.train": "all" if trained else "exits"} | settings
    settings |= {"exits.head": "mlp", "exits.classes": 0, "model.changes": changes or {}}
    config = read.changed(read.read(tiny.get_config()), settings)
    pretrained, model = assemble.load_backbone(config)
    params = {"exits": model.init_exits(jax.random.key(0), pretrained.params, "random", None)}
    if trained:
        params["backbone"] = jax.tree.map(lambda x: x * 1.01, pretrained.params)
    params = jax.tree.map(lambda x: x.astype(jnp.float32), params)
    layout.save_config(config, folder)
    with checkpoint.Saver(folder / layout.CHECKPOINTS) as saver:
        belongs = {"backbone": name or str(pretrained.identity), "token_ids": []}
        saver.save(1, {"params": params}, {}, belongs)
    return types.SimpleNamespace(folder=folder, weights=tree.fingerprint(pretrained.params))


@pytest.fixture
def source(tmp_path):
    return shutil.copytree(FIXTURES / "tiny_chat", tmp_path / "source")


@pytest.fixture
def run(source, tmp_path):
    return save_run(tmp_path / "run", source).folder


def exported(run, folder, **settings):
    tuned = assemble.load_tuned(run)
    assemble.export(tuned, folder, **settings)
    return tuned, folder


def logits(tuned, inputs=PROMPT):
    backbone = tuned.model.bind(tuned.params).backbone
    hidden, context = backbone.stem(inputs)
    hidden = backbone.run_blocks(hidden, 0, tuned.model.config.depth, context)
    return backbone.readout(hidden, context)


@pytest.mark.parametrize("exits_only", [False, True])
def test_an_export_ends_answers_where_the_run_does(run, source, tmp_path, exits_only):
    change(source / "tokenizer_config.json", eos_token="<|endoftext|>")
    (source / "generation_config.json").write_text('{"eos_token_id": [9, 0], "top_p": 0.9}')
    tuned, folder = exported(run, tmp_path / "out", exits_only=exits_only)
    again = assemble.load_tuned(folder)
    assert tuned.stop_ids == again.stop_ids == [0, 2, 9]
    assert again.generation.stored["top_p"] == 0.9


@pytest.mark.parametrize("entry", [{"rms_norm_eps": 0.1}, {"rope_theta": 5.0}])
def test_another_config_beside_the_same_weights_is_refused(run, source, tmp_path, entry):
    _, folder = exported(run, tmp_path / "out")
    change(folder / "config.json", rope_parameters=None, **entry)
    with pytest.raises(ValueError, match="exits.json .*by its weights or by its config"):
        assemble.load_tuned(folder)
    change(source / "config.json", **entry)
    with pytest.raises(ValueError, match="run were tuned on .*by its weights or by its config"):
        assemble.load_tuned(run)


def test_runs_and_exports_of_before_are_known_by_their_weights(source, tmp_path):
    weights = tree.fingerprint(load(str(source)).params)
    run = save_run(tmp_path / "run", source, name=weights)
    tuned, folder = exported(run.folder, tmp_path / "out")
    assert tuned.metadata["backbone"] == str(tuned.identity) != weights
    change(folder / "exits.json", backbone=weights)
    assert assemble.load_tuned(folder).metadata["backbone"] == str(tuned.identity)


@pytest.mark.parametrize("exits_only", [False, True])
def test_an_export_without_its_tokenizer_says_so(run, source, tmp_path, exits_only):
    _, folder = exported(run, tmp_path / "out", exits_only=exits_only)
    (source if exits_only else folder).joinpath("tokenizer.json").unlink()
    with pytest.raises(FileNotFoundError, match="has no tokenizer.json, .* put it back"):
        assemble.load_tuned(folder)


def test_every_weight_is_hashed_once(run, tmp_path, monkeypatch):
    hashed, fingerprint = [], tree.fingerprint

    def counted(params, *read):
        hashed.append(tree.count(params))
        return fingerprint(params, *read)

    monkeypatch.setattr(tree, "fingerprint", counted)
    tuned, _ = exported(run, tmp_path / "out")
    assert hashed.count(tree.count(tuned.params["backbone"])) == 1
    assert tuned.backbone.identity is tuned.identity
    assert hashed.count(tree.count(tuned.params["backbone"])) == 1


CLASSIFIER = {
    "changes": {"num_classes": 3, "pooling": "mean"},
    "exits.points": (1,),
    "exits.gate": False,
}


def encoder(name, tmp_path):
    """A bare encoder with a tokenizer."""
    folder = shutil.copytree(FIXTURES / name, tmp_path / "encoder")
    words = tokenizers.models.WordLevel({f"w{i}": i for i in range(40)}, "w1")
    fast = tokenizers.Tokenizer(words)
    transformers.PreTrainedTokenizerFast(tokenizer_object=fast, pad_token="w0").save_pretrained(
        folder
    )
    return folder


@pytest.mark.parametrize(
    ("name", "trained"),
    [("tiny_bert", False), ("tiny_bert", True), ("tiny_roberta", True), ("tiny_distilbert", True)],
)
def test_a_classifier_that_transformers_has_not_goes_out_and_comes_back(name, tmp_path, trained):
    run = save_run(tmp_path / "run", encoder(name, tmp_path), trained=trained, **CLASSIFIER)
    tuned, folder = exported(run.folder, tmp_path / "out")
    again = assemble.load_tuned(folder)
    assert again.model == tuned.model and again.model.config.pooling == "mean"
    assert tree.fingerprint(again.params) == tree.fingerprint(tuned.params)
    np.testing.assert_array_equal(logits(again), logits(tuned))
    assert logits(again).shape == (1, 3)
    # It is a source like any other, too.
    assert load(str(folder)).identity == tuned.identity


@pytest.mark.parametrize("trained", [False, True])
def test_exits_alone_go_with_a_source_as_it_was_changed(tmp_path, trained):
    run = save_run(tmp_path / "run", encoder("tiny_bert", tmp_path), trained=trained, **CLASSIFIER)
    tuned, folder = exported(run.folder, tmp_path / "out", exits_only=True)
    if trained:
        with pytest.raises(ValueError, match="use the backbone they were tuned on"):
            assemble.load_tuned(folder)
    else:
        np.testing.assert_array_equal(logits(assemble.load_tuned(folder)), logits(tuned))
