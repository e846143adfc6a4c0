"""What processes read of held-out data: each its own rows, and together the whole batches."""

import dataclasses
import json
import types

import numpy as np
import pytest

from configs import digits_resnet, tiny
from early_exit.data import examples, feed, labelled, pipeline
from early_exit.data.stream import Rank
from early_exit.runs import assemble
from early_exit.settings.read import changed, defaults, read

COUNT, ROWS, BATCHES = 4, 8, 3


def feed_of(config):
    config = changed(config, {"data.batch_size": ROWS})
    pretrained, model = assemble.load_backbone(config)
    return feed.make(config, model.config, pretrained.tokenizer)


def assert_shares_make_the_whole(feed):
    whole = list(feed.held_out("validation", BATCHES))
    shares = [list(feed.held_out("validation", BATCHES, Rank(i, COUNT))) for i in range(COUNT)]
    assert len(whole) == BATCHES and all(len(rows) == BATCHES for rows in shares)
    for batch, *parts in zip(whole, *shares, strict=True):
        for name, array in batch.items():
            assert all(len(part[name]) == ROWS // COUNT for part in parts)
            np.testing.assert_array_equal(np.concatenate([part[name] for part in parts]), array)


def test_processes_share_held_out_text():
    assert_shares_make_the_whole(feed_of(read(tiny.get_config())))


def test_processes_share_held_out_examples_and_read_no_others(monkeypatch):
    found = feed_of(read(digits_resnet.get_config("width=4")))
    assert_shares_make_the_whole(found)
    seen, open_ = [], examples.examples

    def watched(source, split):
        opened = open_(source, split)
        return dataclasses.replace(opened, read=lambda i: seen.append(i) or opened.read(i))

    monkeypatch.setattr(examples, "examples", watched)
    for i in range(COUNT):
        seen.clear()
        list(found.held_out("validation", BATCHES, Rank(i, COUNT)))
        assert len(seen) == BATCHES * ROWS // COUNT


@pytest.mark.parametrize(
    "config", [read(tiny.get_config()), read(digits_resnet.get_config("width=4"))]
)
def test_a_batch_that_processes_cannot_share(config):
    with pytest.raises(ValueError, match="batch_size=8 is not a positive multiple of the 3"):
        feed_of(config).held_out("validation", BATCHES, Rank(0, 3))


def labelled_feed(path, known=None, classes=3):
    config = read(defaults(model={"source": "none"}, data={"source": f"rows:{path}"}))
    network = types.SimpleNamespace(
        encodes_prompts=False,
        reads="text",
        classifies=True,
        num_classes=classes,
        context_length=512,
    )
    return feed.make(config, network, None, known)


def write_rows(path, names):
    lines = [json.dumps({"text": f"{i}", "label": names[i % len(names)]}) for i in range(90)]
    path.write_text("\n".join(lines))


def test_labels_are_what_the_run_was_trained_with_in_any_order(tmp_path):
    path = tmp_path / "a.jsonl"
    write_rows(path, ["ape", "bee", "cat"])
    kept = labelled_feed(path).about()
    assert kept == {"classes": ["ape", "bee", "cat"]}
    for order in (kept["classes"], ["cat", "ape", "bee"], ["bee", "ape", "cat"]):
        found = labelled_feed(path, {"classes": order})
        for split in ("train", "test"):
            rows = found.examples(split)
            assert list(rows.classes) == list(found.classes) == order
            assert [order[row["label"]] for row in rows] == [
                ["ape", "bee", "cat"][int(row["text"]) % 3] for row in rows
            ]
        assert found.about() == {"classes": order}


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["ape", "bee", "zebra"], "'zebra' new, and 'cat' missing"),
        (["ape", "bee"], "none new, and 'cat' missing"),
        (["ape", "bee", "cat", "dog"], "'dog' new, and none missing"),
        (["Ape", "bee", "cat"], "'Ape' new, and 'ape' missing"),
        ([f"x{i}" for i in range(9)], "'x0', 'x1', 'x2', 'x3', 'x4' and 4 more new, and 'ape'"),
    ],
)
def test_other_classes_than_those_of_the_run_are_refused_by_name(tmp_path, names, message):
    write_rows(tmp_path / "a.jsonl", names)
    found = labelled_feed(tmp_path / "a.jsonl", {"classes": ["ape", "bee", "cat"]})
    for use in (found.examples, found.data_hash):
        with pytest.raises(ValueError, match=f"a.jsonl are not those .*: {message}"):
            use("test")
    assert found.classes == ["ape", "bee", "cat"]  # what the network's outputs mean, as ever


def test_names_of_classes_need_no_data(tmp_path):
    names = ["ape", "bee", "cat"]
    assert labelled_feed(tmp_path / "none.jsonl", {"classes": names}).classes == names
    assert labelled_feed(tmp_path / "none.jsonl").classes == ["0", "1", "2"]
    with pytest.raises(ValueError, match="the names of 3 classes, but its network has 4"):
        labelled_feed(tmp_path / "none.jsonl", {"classes": names}, classes=4)


@pytest.mark.parametrize("shape", [(9, 8), (8, 9), (16, 16)])
def test_images_of_another_size_than_the_run_s_are_refused(shape):
    found = feed_of(read(digits_resnet.get_config("width=4")))
    kept = found.about()
    assert kept == {"classes": list("0123456789"), "image_size": [8, 8]}
    image = {"image": np.zeros((*shape, 1), np.uint8)}
    assert found.prepare()([image], None)["images"].shape == (1, *shape, 1)
    found = dataclasses.replace(found, known=kept)
    assert found.prepare()([found.examples("test")[0]], None)["images"].shape == (1, 8, 8, 1)
    size = " × ".join(map(str, shape))
    with pytest.raises(ValueError, match=f"images are {size} high and wide, but .* on 8 × 8"):
        found.prepare()([image], None)


def test_text_that_changed_after_tuning_is_told_before_it_is_calibrated_on(tmp_path, caplog):
    path = tmp_path / "book.txt"
    path.write_text("".join(f"line {i}, and so on\n" for i in range(20_000)))
    config = changed(
        read(tiny.get_config()),
        {"data.source": str(path), "data.sequence_length": 16, "calibrate.batches": 1},
    )
    tokenizer = assemble.load_backbone(config)[0].tokenizer
    network = types.SimpleNamespace(
        reads="tokens", classifies=False, encodes_prompts=False, context_length=16
    )
    kept = feed.make(config, network, tokenizer).about()
    path.write_bytes(path.read_bytes().replace(b"\n", b"\r\n"))  # the same text
    for known in (kept, None):
        assert feed.make(config, network, tokenizer, known).calibration(1)
    assert not caplog.records
    path.write_text(f"new\n{path.read_text()}")
    assert feed.make(config, network, tokenizer, kept).calibration(1)
    assert "book.txt has changed since the run was tuned on it" in caplog.text


def test_the_number_of_threads_is_a_setting(monkeypatch):
    taken = []
    for room in (labelled, pipeline):
        for name in ("training_batches", "evaluation_batches"):
            monkeypatch.setattr(room, name, lambda *_, num_threads, **__: taken.append(num_threads))
    for config in (tiny.get_config(), digits_resnet.get_config("width=4")):
        for threads in (2, 7):
            found = feed_of(changed(read(config), {"data.num_threads": threads}))
            found.training(0)
            found.held_out("validation", BATCHES)
    assert taken == [2, 2, 7, 7] * 2
