"""Images made ready as transformers does it, from the files that weights come with."""

import json
import pathlib
import shutil

import numpy as np
import pytest

import early_exit as ee
from early_exit.data import inputs
from early_exit.pretrained import preprocessor
from early_exit.runs import images
from early_exit.settings.read import read

PIL = pytest.importorskip("PIL.Image")
FIXTURES = pathlib.Path(__file__).parents[1] / "fixtures"
MEAN, STD = [0.48, 0.46, 0.41], [0.23, 0.22, 0.24]
RNG = np.random.default_rng(0)
PICTURES = [RNG.integers(0, 256, (*shape, 3), np.uint8) for shape in ((37, 61), (50, 40), (33, 33))]
# As repositories of published weights have them.
FILES = {
    "ViTImageProcessor": {
        "do_normalize": True, "do_resize": True, "image_mean": [0.5] * 3, "image_std": [0.5] * 3,
        "size": {"height": 20, "width": 24},
    },
    "ViTFeatureExtractor": {"image_mean": MEAN, "image_std": STD, "size": 18, "resample": 3},
    "DeiTImageProcessor": {
        "do_center_crop": True, "crop_size": {"height": 20, "width": 18}, "resample": 3,
        "size": {"height": 25, "width": 24}, "image_mean": MEAN, "image_std": STD,
    },
    "MobileNetV2ImageProcessor": {
        "do_center_crop": True, "crop_size": {"height": 16, "width": 16}, "rescale_factor": 1 / 255,
        "size": {"shortest_edge": 21}, "image_mean": [0.5] * 3, "image_std": [0.5] * 3,
        "resample": 2,
    },
    "ConvNextImageProcessor": {
        "size": {"shortest_edge": 28}, "crop_pct": 0.875, "resample": 3, "image_mean": MEAN,
        "image_std": STD,
    },
    "EfficientNetImageProcessor": {
        "size": {"height": 30, "width": 30}, "resample": 0, "image_mean": MEAN, "image_std": STD,
        "do_center_crop": False, "include_top": True, "rescale_offset": False,
        "rescale_factor": 1 / 255,
    },
}  # fmt: skip


def prepared(said):
    given = preprocessor.settings(said)
    given["size"] = given.pop("image_size", ())
    ready = inputs.image_inputs(given.pop("mean"), given.pop("std"), **given)
    return ready([{"image": picture} for picture in PICTURES], None)["images"]


@pytest.mark.parametrize("name", FILES)
def test_pixels_are_those_of_transformers(name):
    """Its processors that need no torch, on images that are taller, wider and square."""
    import transformers

    said = FILES[name]
    kind = name.replace("FeatureExtractor", "ImageProcessor") + "Pil"
    theirs = getattr(transformers, kind)(**said)
    if said["size"] == 18:
        theirs = getattr(transformers, kind)(**said | {"size": {"height": 18, "width": 18}})
    want = np.stack(theirs(PICTURES, return_tensors="np")["pixel_values"]).transpose(0, 2, 3, 1)
    found = prepared(said | {"image_processor_type": name})
    assert found.shape == want.shape
    np.testing.assert_allclose(found, want, rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", ["EfficientNetImageProcessorFast", "EfficientNetFeatureExtractor"])
def test_what_is_added_and_divided_twice(name):
    said = {"rescale_offset": True, "rescale_factor": 1 / 127.5, "do_resize": False}
    said |= {"image_mean": [0.1], "image_std": [0.5], "image_processor_type": name}
    line = preprocessor.settings(said)
    pixel = 100
    want = ((pixel / 127.5 - 1) - 0.1) / 0.5 / 0.5
    assert (pixel / 255 - line["mean"][0]) / line["std"][0] == pytest.approx(want)
    bare = preprocessor.settings({"do_resize": False, "do_normalize": False, "do_rescale": False})
    assert (pixel / 255 - bare["mean"][0]) / bare["std"][0] == pytest.approx(pixel)


@pytest.mark.parametrize(
    ("said", "message"),
    [
        (
            {"size": {"longest_edge": 8}, "do_pad": True},
            "do_pad = True; size = {'longest_edge': 8}",
        ),
        ({"size": {"shortest_edge": 8}}, "size = {'shortest_edge': 8}, crop_size = None"),
        ({"size": 8, "resample": 7}, "resample = 7, which is not done here"),
        ({"size": 8, "image_mean": "x"}, "has one of a wrong kind"),
        ({"size": 8, "image_mean": None}, "wrong kind"),
        ({"do_resize": False, "rescale_factor": 0}, "wrong kind"),
    ],
)
def test_what_is_not_done_is_named(said, message):
    whole = {"image_mean": MEAN, "image_std": STD} | said
    with pytest.raises(ValueError, match=f"the preprocessor_config.json of the weights.*{message}"):
        preprocessor.settings(whole)


@pytest.fixture
def folder(tmp_path):
    folder = shutil.copytree(FIXTURES / "tiny_vit", tmp_path / "weights")
    said = {"image_mean": MEAN, "image_std": STD, "size": {"height": 16, "width": 16}}
    (folder / preprocessor.FILE).write_text(json.dumps(said))
    return folder


def test_a_loaded_network_reads_pictures_as_its_weights_want_them(folder, tmp_path):
    model = ee.load(folder)
    want = prepared(json.loads((folder / preprocessor.FILE).read_text()))
    said = ee.classify(model, PICTURES).probabilities
    np.testing.assert_array_equal(said, ee.classify(model, {"images": want}).probabilities)
    # And so does what is saved of it, in both of the ways in which it is read again.
    saved = ee.save(ee.attach(model, ee.ExitConfig((1,), "norm")), tmp_path / "saved")
    kept, given = (json.loads((of / preprocessor.FILE).read_text()) for of in (saved, folder))
    assert kept == given
    np.testing.assert_array_equal(ee.classify(ee.load(saved), PICTURES).probabilities, said)


def test_what_is_set_goes_before_what_the_weights_say(folder):
    settings = {"model": {"source": str(folder)}, "data": {"source": "digits"}}
    found = images.settled(read(settings)).data
    assert found.mean == tuple(MEAN) and found.resize == found.image_size == (16, 16)
    settings["data"] |= {"mean": (0.1,), "std": (0.2,)}
    found = images.settled(read(settings)).data
    assert (found.mean, found.std, found.resize) == ((0.1,), (0.2,), (16, 16))
    settings["data"] |= {"std": ()}  # the one alone goes with nothing, and not with the weights'
    assert images.settled(read(settings)).data.std == ()
    settings["data"] |= {"image_size": (12, 12)}
    found = images.settled(read(settings)).data
    assert (found.image_size, found.resize) == ((12, 12), ())


def test_weights_without_the_file_ask_how_pictures_are_made_ready(folder):
    (folder / preprocessor.FILE).unlink()
    model = ee.load(folder)
    assert ee.classify(model, {"images": np.zeros((1, 16, 16, 3), np.float32)}).labels.shape == (1,)
    with pytest.raises(ValueError, match="came without a preprocessor_config.json; give data.mean"):
        ee.classify(model, [PICTURES[0]])


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ({"resize": (20,)}, r"data.resize=\(20,\) must be .* needs data.image_size"),
        ({"resize": (20, 20, 20), "image_size": (8, 8)}, "data.resize=.* must be .height, width."),
        ({"resize": (7,), "image_size": (8, 8)}, "image_size=.* does not fit into data.resize"),
        ({"resize": (9, 7), "image_size": (8, 8)}, "image_size=.* does not fit into data.resize"),
        ({"mean": (0.5,), "std": (1.0, 2.0)}, "data.mean=.* and data.std=.* one number each"),
        ({"resample": "cubic"}, "data.resample"),
    ],
)
def test_settings_that_make_no_picture(data, message):
    with pytest.raises(ValueError, match=message):
        read({"model": {"source": "x"}, "data": {"source": "digits"} | data})
