"""Small sets prepared as TFDS prepares its own, read back without TensorFlow."""

import io
import sys

import numpy as np
import pytest
from PIL import Image

from early_exit.data.examples import examples
from early_exit.data.tfds_sets import tfds_set

tfds = pytest.importorskip("tensorflow_datasets")
features = tfds.features

NAMES = ["zebra", "ape"]  # the catalogue's order is not the alphabet's


def png(number):
    """A file, as sets that come as files pass it on; TFDS needs TensorFlow to encode arrays."""
    file = io.BytesIO()
    Image.fromarray(np.full((4, 5 + number % 2, 3), number, np.uint8)).save(file, "png")
    file.seek(0)
    return file


def define(name, inputs, example, splits):
    """Adds a set to the catalogue for the rest of the process."""
    kinds = inputs | {"label": features.ClassLabel(names=NAMES)}

    def _info(self):
        return tfds.core.DatasetInfo(builder=self, features=features.FeaturesDict(kinds))

    def _split_generators(self, _):
        return {split: self._generate_examples(count) for split, count in splits.items()}

    def _generate_examples(self, count):
        for i in range(count):
            yield i, {"label": i % 2} | example(i)

    methods = {f.__name__: f for f in (_info, _split_generators, _generate_examples)}
    version = {"VERSION": tfds.core.Version("1.0.0"), "__module__": __name__}
    type(name, (tfds.core.GeneratorBasedBuilder,), methods | version)


IMAGE = {"image": features.Image(shape=(None, None, 3))}
TWO_TEXTS = {"title": features.Text(), "body": features.Text()}
define("TinyAnimals", IMAGE, lambda i: {"image": png(i)}, {"train": 40, "test": 6})
define("TinyNews", TWO_TEXTS, lambda i: {"title": f"é {i}", "body": "x"}, {"train": 30})
define("TinyHidden", TWO_TEXTS, lambda i: {"title": "", "body": "", "label": -1}, {"train": 3})
define("TinyArrays", IMAGE, lambda i: {"image": np.zeros((2, 2, 3), np.uint8)}, {"train": 3})
define(
    "TinyBoxes",
    {"a": features.BBoxFeature()},
    lambda i: {"a": features.BBox(0, 0, 1, 1)},
    {"train": 3},
)


@pytest.fixture(autouse=True)
def data_dir(tmp_path_factory, monkeypatch):
    """One folder for all tests, so that a set is prepared once."""
    folder = tmp_path_factory.getbasetemp() / "tfds"
    monkeypatch.setattr("tensorflow_datasets.core.constants.DATA_DIR", str(folder))
    tfds.disable_progress_bar()


def test_images_come_back_with_their_labels_and_splits():
    names = ("train", "validation", "calibration", "test")
    splits = {split: examples("tfds:tiny_animals", split) for split in names[::3]}
    assert len(splits["test"]) == 6 and 30 < len(splits["train"]) <= 40
    for split in splits.values():
        assert split.classes == ("zebra", "ape")
        for example in split:
            number = int(example["image"][0, 0, 0])
            expected = np.full((4, 5 + number % 2, 3), number, np.uint8)
            np.testing.assert_array_equal(example["image"], expected)
            assert example["label"] == number % 2 and type(example["label"]) is int
    assert "tensorflow" not in sys.modules


def test_texts_are_joined():
    classes, train, test = tfds_set("tiny_news")
    assert test is None and len(list(train.identities)) == 30
    found = sorted(train.read(i)["text"] for i in range(30))
    assert found == sorted(f"é {i}\nx" for i in range(30))


def test_mocked_data_of_the_real_catalogue():
    with tfds.testing.mock_data(num_examples=5):
        classes, train, _ = tfds_set("fashion_mnist")
        assert classes[0] == "T-shirt/top" and len(classes) == 10
        assert train.read(4)["image"].shape == (28, 28, 1)
        assert isinstance(tfds_set("imdb_reviews").train.read(0)["text"], str)


def test_sets_that_cannot_be_used_say_why():
    with pytest.raises(ValueError, match="Dataset fashion_minst not found"):
        tfds_set("fashion_minst")
    with pytest.raises(ValueError, match="neither one image nor texts among its a, label"):
        tfds_set("tiny_boxes")
    with pytest.raises(ValueError, match="example 0 of tiny_hidden, split train, has no label"):
        tfds_set("tiny_hidden").train.read(0)
    with pytest.raises(
        ModuleNotFoundError, match="(?s)preparing tiny_arrays .* 'tensorflow'. Inst"
    ):
        tfds_set("tiny_arrays")
