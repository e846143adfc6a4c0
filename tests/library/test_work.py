"""Tuning, records and policies of a model in hand: the same as the commands', and as one's own."""

import dataclasses
import json

import in_process
import jax
import numpy as np
import pytest

import early_exit as ee
from early_exit import policy as policies
from early_exit.evaluation import run
from early_exit.runs import assemble, checkpoint, layout
from early_exit.runs.metrics import read_metrics
from early_exit.settings.read import read
from early_exit.training import loop
from early_exit.training.optimizer import make_optimizer

HEADS = ee.ExitConfig((2, 4), head="norm")
SMALL = {"batch_size": 2, "sequence_length": 32}


def leaves(params):
    return [np.asarray(x) for x in jax.tree.leaves(params)]


def equal(one, other):
    return all(np.array_equal(x, y) for x, y in zip(leaves(one), leaves(other), strict=True))


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    """A source of texts by name."""
    path = tmp_path_factory.mktemp("texts") / "texts.jsonl"
    rows = [{"text": f"Row {n}: {' '.join(map(str, range(n, n + 40)))}"} for n in range(200)]
    path.write_text("\n".join(map(json.dumps, rows)))
    return str(path)


@pytest.fixture(scope="module")
def ran(file, chat, tmp_path_factory):
    """(what a command tunes, the policy that it finds)."""
    folder = tmp_path_factory.mktemp("run")
    config = read(
        {
            "model": {"source": chat},
            "exits": {"points": (2, 4), "head": "norm"},
            "data": {"source": file, **SMALL},
            "tune": {"steps": 4, "learning_rate": 3e-3, "warmup_steps": 1},
            "calibrate": {"batches": 4, "epsilon": 0.6},
        }
    )
    loop.tune(config, folder)
    tuned = assemble.load_tuned(folder)
    policy, _ = run.calibrate(tuned)
    return tuned, policy


def tuned_from(chat, file, **how):
    model = ee.attach(ee.load(chat), HEADS)
    settings = {"tune.warmup_steps": 1}
    how = {"steps": 4, "learning_rate": 3e-3, "settings": settings, "progress": False} | how
    return ee.tune(model, file, **SMALL, **how)


def test_a_call_tunes_what_a_command_tunes(chat, file, ran):
    assert equal(tuned_from(chat, file).heads, ran[0].params["exits"])


def test_a_call_finds_the_policy_that_a_command_finds(chat, file, ran):
    model = ee.load(ran[0].workdir)
    assert equal(model.policy, ran[1])
    again = ee.calibrate(dataclasses.replace(model, policy=None), file, batches=4, **SMALL)
    found, wanted = (policies.as_json(policy) for policy in (again.policy, ran[1]))
    assert found == wanted


def test_records_give_the_policy_that_their_data_give(tuned):
    texts = [f"Number {n} {n + 1} {n + 2} {n + 3}" for n in range(12)]
    records = ee.record(tuned, texts, **SMALL)
    for asked in ({"epsilon": 0.5}, {"method": "search", "budget": 4, "confidence": "margin"}):
        by_records, by_data = (
            ee.calibrate(tuned, records, **asked),
            ee.calibrate(tuned, texts, **SMALL, **asked),
        )
        assert equal(by_records.policy, by_data.policy)


def test_a_promise_that_given_texts_cannot_keep_is_refused_at_once(tuned, monkeypatch):
    monkeypatch.setattr(run.exits, "record", None)
    texts = [f"Number {n} {n + 1} {n + 2}" for n in range(12)]
    with pytest.raises(ValueError, match="cannot be promised: .* independent texts"):
        ee.calibrate(tuned, texts, **SMALL, method="ltt", alpha=0.01)


def test_texts_are_tuned_on_as_a_source_of_these_texts(chat, tuned, bare):
    """Whose splits nobody makes: given texts are all tuned on."""
    texts = [f"Words {n}: {' '.join(map(str, range(n)))}" for n in range(20)]
    model = ee.attach(bare, HEADS)
    how = {"steps": 3, "progress": False}
    whole = ee.tune(model, texts, **SMALL, **how)
    again = ee.tune(model, iter(texts), **SMALL, **how)
    assert equal(whole.heads, again.heads) and not equal(whole.heads, model.heads)
    assert whole.settings.data.source == "given:texts"


@pytest.mark.parametrize("form", [list, iter, lambda rows: ({"tokens": row} for row in rows)])
def test_batches_are_taken_as_they_are(bare, form):
    rows = np.random.default_rng(0).integers(0, 300, (3, 2, 16))
    model = ee.attach(bare, HEADS)
    met = []
    tuned = ee.tune(
        model,
        form(list(rows)),
        steps=3,
        progress=False,
        on_step=lambda step, metrics: met.append((step, metrics["loss"])),
    )
    assert [step for step, _ in met] == [1, 2, 3]
    # What one's own loop over the same batches gives.
    recipe = ee.Recipe("kl", ee.ExitWeights((1.0, 1.0)))
    optimizer = make_optimizer(tuned.settings.tune)
    state = ee.init_state({"exits": model.heads}, optimizer)
    frozen = {"backbone": model.params["backbone"]}
    losses = []
    for row in rows.astype(np.int32):
        places = np.tile(np.arange(16, dtype=np.int32), (2, 1))
        batch = {"tokens": row, "documents": np.ones_like(row), "positions": places}
        how = {"model": model.static, "recipe": recipe, "optimizer": optimizer}
        state, metrics = ee.tune_step(state, frozen, batch, **how)
        losses.append(float(metrics["loss"]))
    np.testing.assert_allclose([loss for _, loss in met], losses, rtol=1e-5)
    for x, y in zip(leaves(tuned.heads), leaves(state["params"]["exits"]), strict=True):
        np.testing.assert_allclose(x, y, atol=1e-5)


def test_a_list_of_batches_is_gone_through_again_and_a_generator_ends(bare):
    rows = list(np.random.default_rng(0).integers(0, 300, (2, 2, 16)))
    model = ee.attach(bare, HEADS)
    assert ee.tune(model, rows, steps=5, progress=False).step == 5
    with pytest.raises(ValueError, match="have ended after 2; give more, a list"):
        ee.tune(model, iter(rows), steps=5, progress=False)


def test_batches_that_are_not_alike_are_named(bare):
    rows = list(np.random.default_rng(0).integers(0, 300, (2, 2, 16)))
    model = ee.attach(bare, HEADS)
    for last in (rows[1][:, :15], rows[1][:1]):
        with pytest.raises(ValueError, match="batch 2 has the shapes .* the first had"):
            ee.tune(model, [rows[0], last], steps=2, progress=False)
    with pytest.raises(ValueError, match=r"are \[rows, positions\], not \[16\]"):
        ee.tune(model, [rows[0][0]], steps=1)
    with pytest.raises(ValueError, match="a batch for this network holds tokens; this one has x"):
        ee.tune(model, [{"x": rows[0]}], steps=1)


def test_what_is_given_stays_as_it_was(bare):
    """Also where the network is trained, too: training gives its arrays away from step to step."""
    model = ee.attach(bare, HEADS)
    before = jax.tree.map(np.array, model.params)
    rows = list(np.random.default_rng(0).integers(0, 300, (2, 2, 16)))
    joint = ee.tune(model, rows, steps=2, train="all", progress=False)
    assert equal(model.params, before)
    assert not equal(joint.params["backbone"], before["backbone"])
    assert joint.metadata["backbone"] != model.metadata["backbone"]
    assert joint.policy is None and joint.settings.tune.train == "all"


def test_a_folder_keeps_the_run_and_goes_on(chat, file, tmp_path):
    whole = tuned_from(chat, file)
    half = tmp_path / "run"

    class Stop(Exception):
        pass

    def stop(step, metrics):
        if step == 3:
            raise Stop

    settings = {"tune.warmup_steps": 1, "tune.checkpoint_every": 2}
    with pytest.raises(Stop):
        tuned_from(chat, file, workdir=half, on_step=stop, settings=settings)
    assert checkpoint.latest_step(half / layout.CHECKPOINTS) == 2
    steps = []
    again = tuned_from(
        chat, file, workdir=half, settings=settings, on_step=lambda step, _: steps.append(step)
    )
    assert steps == [3, 4] and equal(again.heads, whole.heads)
    assert equal(ee.load(half).heads, whole.heads)


def test_given_data_go_on_in_a_folder_too(bare, tmp_path):
    rows = list(np.random.default_rng(0).integers(0, 300, (3, 2, 16)))
    model = ee.attach(bare, HEADS)
    short = {"tune.checkpoint_every": 2}

    class Stop(Exception):
        pass

    def stop(step, metrics):
        if step == 3:
            raise Stop

    whole = ee.tune(model, rows, steps=5, progress=False)
    for data in (rows, (row for row in rows * 2)):
        folder = tmp_path / type(data).__name__
        with pytest.raises(Stop):
            ee.tune(
                model, rows, steps=5, workdir=folder, settings=short, on_step=stop, progress=False
            )
        again = ee.tune(model, data, steps=5, workdir=folder, settings=short, progress=False)
        assert equal(again.heads, whole.heads)
    with pytest.raises(ValueError, match="were handed over in Python"):
        run.calibrate(assemble.load_tuned(folder))


def test_validation_is_told_of_given_data(bare, tmp_path):
    texts = [f"Words {n}: {' '.join(map(str, range(n)))}" for n in range(20)]
    model = ee.attach(bare, HEADS)
    ee.tune(
        model,
        texts[:15],
        validation=iter(texts[15:]),
        steps=2,
        **SMALL,
        workdir=tmp_path,
        progress=False,
    )
    (row,) = (row for row in read_metrics(tmp_path) if "validation/loss/exit_2" in row)
    assert row["step"] == 2


def test_bad_calls_are_told_together_and_early(bare):
    model = ee.attach(bare, HEADS)
    with pytest.raises(ValueError, match="(?s)tune.steps=0 .*tune.learning_rate=-1"):
        ee.tune(model, ["text"], steps=0, learning_rate=-1)
    with pytest.raises(ValueError, match="no setting 'tune.warmup'; did you mean 'tune.warmup_ste"):
        ee.tune(model, ["text"], settings={"tune.warmup": 1})
    with pytest.raises(ValueError, match="no setting 'calibrate.epsilom'"):
        ee.calibrate(model, ["text"], epsilom=0.9)
    with pytest.raises(ValueError, match="is empty"):
        ee.tune(model, [])
    with pytest.raises(ValueError, match="texts, prompts .*, examples .*, not int objects"):
        ee.tune(model, [1, 2, 3])
    with pytest.raises(ValueError, match="tuned on texts, .* and not on labelled examples"):
        ee.tune(model, [{"text": "a", "label": 0}])
    with pytest.raises(ValueError, match="has no exits; give it some"):
        ee.record(bare, ["some text"], **SMALL)
    with pytest.raises(ValueError, match="nothing to tune: no exits"):
        ee.tune(bare, ["some text"] * 8, **SMALL, progress=False)


def test_records_of_other_heads_are_refused(tuned, bare):
    texts = [f"Number {n} {n + 1} {n + 2} {n + 3}" for n in range(12)]
    other = ee.attach(bare, HEADS)
    with pytest.raises(ValueError, match="records are of other heads"):
        ee.calibrate(other, ee.record(tuned, texts, **SMALL))


def test_a_classifier_is_tuned_on_labelled_texts_by_number_and_by_name(classifier):
    texts = [{"text": f"number {n}", "label": n % 2} for n in range(16)]
    named = [{**row, "label": str(row["label"])} for row in texts]
    how = {"steps": 3, "batch_size": 4, "sequence_length": 16, "loss": "cross_entropy"}
    by_number, by_name = (
        ee.tune(classifier, rows, **how, progress=False) for rows in (texts, named)
    )
    assert equal(by_number.heads, by_name.heads) and by_number.classes == ("0", "1")
    calibrated = ee.calibrate(by_number, texts, epsilon=0.6, batch_size=4, sequence_length=16)
    inputs = [row["text"] for row in texts]
    found, whole = (ee.classify(model, inputs, batch=8) for model in (calibrated, by_number))
    assert (whole.depths == by_number.depth).all() and found.labels.shape == (16,)
    with pytest.raises(ValueError, match="'2' is none of the network's classes, 0, 1"):
        ee.tune(classifier, [{"text": "a", "label": "2"}] * 4, **how, progress=False)


def test_reduced_heads_predict_the_tokens_that_they_are_given(bare):
    texts = ["one two three", "two three", "three"]
    ids = ee.frequent_tokens(bare, texts, 8)
    with pytest.raises(ValueError, match=r"give token_ids=frequent_tokens\(model, texts, 8\)"):
        ee.attach(bare, ee.ExitConfig((2,), classes=8))
    model = ee.attach(bare, ee.ExitConfig((2,), classes=8, head="norm"), token_ids=ids)
    tuned = ee.tune(model, texts * 4, steps=2, **SMALL, progress=False)
    records = ee.record(tuned, texts, **SMALL)
    assert set(records.predictions[0]) <= set(ids.tolist())


def test_a_recurrent_exit_is_calibrated_on_data(bare):
    """Its chains are no part of the records."""
    texts = [f"Words {n}: {' '.join(map(str, range(n, n + 12)))}" for n in range(12)]
    exits = ee.ExitConfig((2,), head="norm", recurrent_taps=(2, 6))
    tuned = ee.tune(ee.attach(bare, exits), texts, steps=2, **SMALL, progress=False)
    calibrated = ee.calibrate(tuned, texts, epsilon=0.3, **SMALL)
    assert calibrated.policy.drafts is not None and "chains" in calibrated.policy.provenance
    with pytest.raises(ValueError, match="calibrated on data, not on records; give the data"):
        ee.calibrate(tuned, ee.record(tuned, texts, **SMALL), epsilon=0.3)


def test_it_says_in_a_line_what_it_is(bare, leaving, chat):
    assert repr(bare) == f"Model({chat!r}, 6 blocks, no exits, no policy)"
    assert "norm exits after (2, 4), leaves by max_prob" in repr(leaving)


def test_saved_and_loaded_it_is_the_same(leaving, tmp_path):
    loaded = ee.load(ee.save(leaving, tmp_path / "model"))
    assert equal(loaded.params, leaving.params) and equal(loaded.policy, leaving.policy)
    assert loaded.metadata == leaving.metadata and loaded.static == leaving.static
    other = dataclasses.replace(loaded, heads=jax.tree.map(lambda x: x + 1, loaded.heads))
    with pytest.raises(ValueError, match="policy was fitted to other heads"):
        ee.save(other, tmp_path / "other")
    assert not (tmp_path / "other").exists()
    with pytest.raises(FileExistsError):
        ee.save(leaving, tmp_path / "model")
    exits = ee.save(leaving, tmp_path / "exits", exits_only=True)
    assert equal(ee.load(exits).params, leaving.params)


def test_a_saved_model_is_one_that_commands_take(leaving, tmp_path):
    folder = ee.save(leaving, tmp_path / "model")
    prompts = ["Why?", "What is 1 2 3"]
    file, out = tmp_path / "prompts.txt", tmp_path / "answers.jsonl"
    file.write_text("\n".join(prompts))
    for mode in ("lossy", "deferred", "verified"):
        flags = (f"--workdir={folder}", f"--input={file}", f"--output={out}", f"--mode={mode}")
        done = in_process.run("generate", *flags, "--max_new_tokens=12")
        assert not done.returncode, done.stderr
        rows = [json.loads(line) for line in out.read_text().splitlines()]
        found = ee.generate(leaving, prompts, mode=mode, max_new_tokens=12, batch=8)
        assert [row["tokens"] for row in rows] == [answer.tokens.tolist() for answer in found]
        assert [row["text"] for row in rows] == [answer.text for answer in found]
        assert [row["depths"] for row in rows] == [answer.depths.tolist() for answer in found]
