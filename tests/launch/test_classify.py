"""`launch.classify` as a user types it, on untrained runs: what it reads, prints and writes."""

import functools
import json
import pathlib
import re
import types

import jax
import numpy as np
import pytest
import stand_ins
from PIL import Image

from configs import digits_resnet
from early_exit import policy as policies
from early_exit import tree
from early_exit.calibration import drift
from early_exit.data import feed as feeds
from early_exit.evaluation.classes import score_batch
from early_exit.runs import assemble, checkpoint, layout
from early_exit.settings.read import read

ROOT = pathlib.Path(__file__).parents[2]


def save_run(config, folder, *, keeps=True):
    """A run with heads as drawn, and a policy by which about half of the test split leaves early.

    Args:
      keeps: whether it keeps the names of its classes, as older ones did not.

    Returns:
      The folder, the examples of the test split, and what they should be answered.
    """
    pretrained, model = assemble.load_backbone(config)
    params = {"backbone": pretrained.params}
    params["exits"] = model.init_exits(jax.random.key(3), pretrained.params, "random", None)
    layout.save_config(config, folder)
    feed = feeds.make(config, model.config, pretrained.tokenizer)
    belongs = {"backbone": tree.fingerprint(pretrained.params), "token_ids": []}
    if keeps:
        belongs["data"] = feed.about()
    with checkpoint.Saver(folder / layout.CHECKPOINTS) as saver:
        saver.save(1, {"params": {"exits": params["exits"]}}, {}, belongs)
    examples = feed.examples("test")
    inputs = feed.prepare()(list(examples), None)
    labels = np.array([example["label"] for example in examples])
    batch = inputs | {"labels": labels, "valid": labels >= 0}
    scored = jax.device_get(score_batch(params, batch, model=model))
    scores = scored["scores"]["max_prob"]
    heads = tree.fingerprint(params["exits"])
    policy = policies.make([float(np.median(scores[0])), policies.NEVER], heads=heads)
    policies.save(policy, folder / layout.POLICY)
    exits = policy.exit_index(scores, model.exit_depths)
    rows = np.arange(len(labels))
    return types.SimpleNamespace(
        folder=folder,
        heads=heads,
        examples=examples,
        labels=labels,
        answers=scored["predictions"][exits, rows],
        scores=scores[exits, rows],
        exits=exits,
        depths=model.exit_depths[exits],
    )


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    return save_run(
        read(digits_resnet.get_config("train=exits,width=4")), tmp_path_factory.mktemp("digits")
    )


@pytest.fixture(scope="module")
def texts(tmp_path_factory):
    root = tmp_path_factory.mktemp("texts")
    return save_run(read(stand_ins.topics(root, 60, train="exits")), root / "run")


@pytest.fixture(params=["kept", "exported", "not kept"])
def renamed(request, tmp_path):
    """(folder of a run, its pictures): one folder has another name than in training."""
    pictures, folder = tmp_path / "pictures", tmp_path / "run"
    rng = np.random.default_rng(0)
    for i in range(60):
        file = pictures / ["ant", "bat"][i % 2] / f"{i}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (8, 8), np.uint8)).save(file)
    config = digits_resnet.get_config("train=exits,width=4")
    config.data.source, config.model.new.num_classes = f"images:{pictures}", 2
    save_run(read(config), folder, keeps=request.param != "not kept")
    if request.param == "exported":
        tuned = assemble.load_tuned(folder)
        folder = tmp_path / "exported"
        assemble.export(tuned, folder)
    (pictures / "ant").rename(pictures / "zebra")
    return types.SimpleNamespace(folder=folder, input=pictures)


@pytest.fixture
def classify(launch):
    """What `python -m launch.classify <flags>` does."""
    return functools.partial(launch, "classify")


def summary(done):
    """{place: the numbers beside it}, and the last line of what was printed."""
    assert done.returncode == 0, done.stderr
    rows = re.findall(r"^(block \d+|all) +(.*)$", done.stdout, re.MULTILINE)
    return {place: numbers.split() for place, numbers in rows}


def test_a_split_is_answered_and_judged(classify, images, tmp_path):
    path = tmp_path / "new" / "answers.jsonl"
    done = classify(f"--workdir={images.folder}", "--split=test", "--batch=8", f"--output={path}")
    counts = summary(done)
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    assert [row["depth"] for row in rows] == images.depths.tolist()
    assert [int(row["label"]) for row in rows] == images.answers.tolist()
    assert [int(row["known_label"]) for row in rows] == images.labels.tolist()
    for row, answer, score in zip(rows, images.answers, images.scores, strict=True):
        assert row["score"] == pytest.approx(score, abs=1e-5) and not row["withheld"]
        assert row["probabilities"][answer] == pytest.approx(score, abs=1e-5)
        assert sum(row["probabilities"]) == pytest.approx(1, abs=1e-5)
    right = images.answers == images.labels
    for place, chosen in {
        "block 1": images.exits == 0,
        "block 2": images.exits == 1,
        "block 3": images.exits == 2,
        "all": np.ones(len(right), bool),
    }.items():
        count, share, accuracy = counts[place]
        assert int(count) == chosen.sum() and float(share) == pytest.approx(chosen.mean(), abs=1e-3)
        if chosen.any():
            assert float(accuracy) == pytest.approx(right[chosen].mean(), abs=1e-3)
    assert f"{len(rows)} examples, " in done.stdout
    assert f"{images.depths.mean():.2f} of 3 blocks per example\n{path}\n" in done.stdout


def test_image_files_are_answered_like_the_data_they_were(classify, images, tmp_path):
    chosen = {"a.png": 0, "b/c.png": 1, "b/d.PNG": 2, "e.png": 3}
    (tmp_path / "b").mkdir()
    (tmp_path / "notes.txt").write_text("no image")
    for name, i in chosen.items():
        Image.fromarray(images.examples[i]["image"][..., 0]).save(tmp_path / name)
    done = classify(f"--workdir={images.folder}", f"--input={tmp_path}", "--batch=3")
    assert summary(done)["all"] == ["4", "1.000", "–"]
    found = re.findall(r"^(\d+) +([\d.]+)% +depth +(\d) +(\S+)$", done.stdout, re.MULTILINE)
    assert [(label, depth, name) for label, _, depth, name in found] == [
        (str(images.answers[i]), str(images.depths[i]), name) for name, i in sorted(chosen.items())
    ]
    for i, (_, sure, *_) in zip(chosen.values(), found, strict=True):
        assert float(sure) == pytest.approx(100 * images.scores[i], abs=0.06)


def test_texts_are_answered_by_the_names_of_their_classes(classify, texts, tmp_path):
    path = tmp_path / "texts.jsonl"
    lines = [json.dumps({"text": example["text"]}) for example in texts.examples]
    path.write_text("\n\n".join(lines))
    done = classify(f"--workdir={texts.folder}", f"--input={path}", "--budget=1.5")
    counts = summary(done)
    assert int(counts["block 1"][0]) >= len(lines) / 2
    found = re.findall(r"^(art|law|sea) .* depth +(\d)  (word.*)$", done.stdout, re.MULTILINE)
    assert [text for _, _, text in found] == [
        text if len(text) <= 60 else f"{text[:59]}…"
        for text in (example["text"] for example in texts.examples)
    ]
    names = texts.examples.classes
    for (label, depth, _), want, deepest in zip(found, texts.answers, texts.depths, strict=True):
        assert int(depth) < deepest or label == names[want]


def test_a_classifier_writes_nothing(launch, images, texts):
    for run in (images, texts):
        done = launch("generate", f"--workdir={run.folder}", "--prompt=x")
        assert done.returncode == 1 and "Traceback" not in done.stderr
        assert f"{run.folder} holds a classifier; use launch.classify" in done.stderr


def test_answers_unlike_calibration_s_are_told(classify, images, tmp_path):
    """What a temperature does to probabilities is no drift; other probabilities are."""
    everyone, path = [policies.ALWAYS, policies.NEVER], tmp_path / "policy.json"

    def answered(**kept):
        policies.save(policies.make(everyone, heads=images.heads, **kept), path)
        output = tmp_path / "answers.jsonl"
        flags = f"--workdir={images.folder}", f"--policy={path}", f"--output={output}"
        done = classify(*flags, "--split=train", "--batch=256")
        assert done.returncode == 0, done.stderr
        return done, [json.loads(line) for line in output.read_text().splitlines()]

    done, rows = answered()
    assert "warning" not in done.stderr and {row["depth"] for row in rows} == {1}
    top = np.array([row["score"] for row in rows])
    exits = np.zeros(len(rows), int)
    kept = {"temperatures": [3.0, 1.0, 1.0], "drift": drift.histogram(exits, top, 3)}
    done, rows = answered(**kept)
    assert "warning" not in done.stderr and rows[0]["score"] < top[0]
    done, _ = answered(drift=drift.histogram(exits, top**3, 3))
    assert "warning: these answers are unlike what the policy was calibrated on" in done.stderr


def test_answers_are_named_as_in_training(request, classify, renamed, tmp_path):
    """Whatever the folders are called now; only a run that kept no names takes today's."""
    kept = "not kept" not in request.node.name
    path = tmp_path / "answers.jsonl"
    flags = f"--workdir={renamed.folder}", "--full", f"--output={path}"
    done = classify(*flags, f"--input={renamed.input}")
    assert done.returncode == 0, done.stderr
    names = ["ant", "bat"] if kept else ["bat", "zebra"]
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    assert len(rows) == 60
    for row in rows:
        assert row["label"] == names[np.argmax(row["probabilities"])]
    unknown = "run does not say which classes it was trained with"
    assert (done.stderr.count(unknown), unknown in done.stderr) == (int(not kept), not kept)
    done = classify(*flags, "--split=test")
    assert done.returncode == int(kept) and "Traceback" not in done.stderr
    assert ("'zebra' new, and 'ant' missing; give them their old names" in done.stderr) == kept


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--input=x", "--split=test"], "give either --input or --split"),
        (["--input=launch"], "launch holds no image; put .png, .jpg, .jpeg files there"),
        (["--input=LICENSE"], "these examples are texts, which make no images"),
    ],
)
def test_what_cannot_be_classified_is_told(classify, images, flags, message):
    done = classify(f"--workdir={images.folder}", *flags)
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert message in done.stderr
