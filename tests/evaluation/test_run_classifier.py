"""All that a classifier goes through, on scikit-learn's digits: from tuning to the page."""

import base64
import dataclasses
import io
import json
import re

import numpy as np
import pytest
from PIL import Image

from configs import digits_resnet
from early_exit.data import feed as feeds
from early_exit.data.examples import examples
from early_exit.evaluation import exits, run, run_classifier
from early_exit.report import page
from early_exit.runs import assemble
from early_exit.settings.overrides import override
from early_exit.settings.read import changed, read
from early_exit.training.loop import tune

SHORT = {
    "tune.warmup_steps": 4,
    "tune.validation_batches": 1,
    "evaluate.epsilons": (0.9,),
    "evaluate.rounds": 1,
    "evaluate.singles": 3,
    "evaluate.rows": 64,
    "evaluate.examples": 5,
    "evaluate.explored": 250,
}


def tuned(folder, arg=None, **changes):
    config = read(override(digits_resnet.get_config(arg), SHORT | changes))
    tune(config, folder)
    return assemble.load_tuned(folder, config)


@pytest.fixture(scope="module")
def digits(tmp_path_factory):
    return tuned(tmp_path_factory.mktemp("digits"), **{"tune.steps": 80})


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "small"
    return tuned(folder, "points=,width=4", **{"tune.steps": 5})


@pytest.fixture(scope="module")
def results(digits, plain):
    run.calibrate(digits)
    return run_classifier.evaluate(digits, [plain.workdir])


def test_rows_are_of_the_run_s_own_data(digits, results):
    """Accuracies of the test split by another way: the records of all exits, one by one."""
    count = len(examples("digits", "test"))
    assert results["data"] == {"source": "digits", "split": "test", "count": count}
    full, own, fitted = results["classification"]["rows"]
    assert [row["policy"] for row in (full, own, fitted)] == [
        "full model",
        "epsilon 0.99",
        "epsilon 0.9",
    ]
    feed = feeds.make(digits.config, digits.model.config, None)
    found = exits.record(digits.model, digits.params, feed.held_out("test", None))
    assert full["accuracy"] == pytest.approx(found.correct[-1].mean())
    assert full["accuracy"] > 0.5  # of ten classes: it has learnt
    assert [row["correct"] for row in results["exits"]] == pytest.approx(found.correct.mean(1))
    policy = assemble.load_policy(digits)
    left = policy.exit_index(found.score(policy.confidence), found.exit_depths)
    assert own["accuracy"] == pytest.approx(found.correct[left, np.arange(count)].mean(), abs=0.01)
    assert own["mean_depth"] == pytest.approx(found.exit_depths[left].mean(), abs=0.02)
    assert fitted["multiply_adds"] < own["multiply_adds"] < results["parts"][-1]["multiply_adds"]
    assert results["classification"]["oracle"]["accuracy"] >= max(found.correct.mean(1))


def test_a_baseline_is_measured_beside_it(plain, results):
    (static,) = results["classification"]["static"]
    assert static["policy"] == "small" and static["exit_shares"] == [1]
    full = results["classification"]["rows"][0]
    assert static["multiply_adds"] < full["multiply_adds"] / 2  # a quarter, but for the stem
    assert static["latency"]["mean"] > 0 and static["throughput"]["64"] > 0


def test_examples_are_shown_as_they_are(digits, results):
    shown, test = results["examples"], examples("digits", "test")
    pictures = {example["image"].tobytes(): example["label"] for example in test}
    for example in shown["first"] + shown["last"]:
        picture = np.asarray(Image.open(io.BytesIO(base64.b64decode(example["png"]))))
        assert str(pictures[picture[..., None].tobytes()]) == example["label"]
        assert example["right"] == (example["label"] == example["prediction"])
    depths = [[example["depth"] for example in shown[name]] for name in ("first", "last")]
    assert len(depths[0]) == 5 and max(depths[0]) <= min(depths[1])


def test_the_first_examples_can_be_looked_into(digits, results):
    found, test = results["explorer"], examples("digits", "test")
    (answer,) = found["answers"]
    feed = feeds.make(digits.config, digits.model.config, None)
    known = exits.record(digits.model, digits.params, feed.held_out("test", None))
    assert answer["said"] == known.predictions[:, :250].tolist()
    policy = assemble.load_policy(digits)
    left = policy.exit_index(known.score(policy.confidence), known.exit_depths)[:250]
    assert np.mean(left == answer["exits"]) > 0.99  # but for rounding in other batches
    for i in (0, 99, 249):
        picture = Image.open(io.BytesIO(base64.b64decode(answer["pieces"][i].partition(",")[2])))
        np.testing.assert_array_equal(np.asarray(picture), test[i]["image"][..., 0])
        assert found["words"][str(answer["labels"][i])] == str(test[i]["label"])
    assert found["speed"]["points"] == 2 and found["speed"]["slope"] > 0


def test_it_is_saved_printed_and_shown(digits, results):
    saved = json.loads((digits.workdir / "evaluation.json").read_text())
    assert saved == json.loads(json.dumps(results))
    text = "\n\n".join(run_classifier.tables(saved))
    for row in saved["classification"]["rows"] + saved["classification"]["static"]:
        accuracy = f"{row['accuracy']:.3f}"
        assert re.search(rf"^{row['policy']} +{accuracy} ", text, re.MULTILINE)
    html = page.write(digits.workdir).read_text(encoding="utf-8")
    assert html.count("<img ") == 10 and html.count("<svg ") == 4
    assert "resnet_cifar (" in html


def test_a_baseline_with_its_classes_in_another_order_is_refused(digits, plain):
    other = dataclasses.replace(plain, data=plain.data | {"classes": plain.data["classes"][::-1]})
    with pytest.raises(ValueError, match="small was trained with the classes 9, 8, .* in this or"):
        run_classifier.measure(digits, {}, [other])


def test_baselines_with_exits_or_of_other_data_are_refused(digits, plain):
    with pytest.raises(ValueError, match=r"has exits after blocks \(1, 2\); a baseline is a netw"):
        run_classifier.measure(digits, {}, [digits])
    other = assemble.load_tuned(plain.workdir)
    data = changed(other.config, {"data.mean": (0.5,)})
    other = dataclasses.replace(other, config=data)
    with pytest.raises(ValueError, match=r"data.mean=\(0.5,\).* with \(0.3,\); they cannot be com"):
        run_classifier.measure(digits, {}, [other])
