import itertools

import numpy as np
import pytest

from early_exit.data.inputs import CHANCES, image_inputs, text_inputs

RNG = np.random.default_rng(0)
# 9 × 17: an eighth of the sides is 1 and 2. All pixels differ, so a window is found only in place.
ONE = (1 + RNG.permutation(9 * 17)).astype(np.uint8).reshape(9, 17, 1)


def rows(*images):
    return [{"image": image, "label": 0} for image in images]


def raw(batch):
    """Pixels 0 to 255 of images made with mean 0 and std 1."""
    return np.rint(batch["images"] * 255).astype(np.uint8)


def window_of(image):
    """(top, left, mirrored) of the only window of ONE in its frame that looks so."""
    framed = np.pad(ONE, ((1, 1), (2, 2), (0, 0)))
    found = [
        (top, left, mirrored)
        for top, left, mirrored in itertools.product(range(3), range(5), (False, True))
        if (framed[top : top + 9, left : left + 17][:, :: -1 if mirrored else 1] == image).all()
    ]
    (place,) = found  # a window, and only one
    return place


def test_pixels_are_scaled_channel_by_channel():
    images = RNG.integers(0, 256, (3, 4, 5, 2), np.uint8)
    mean, std = (0.25, 0.5), (0.5, 2.0)
    batch = image_inputs(mean, std)(rows(*images), None)
    assert batch.keys() == {"images"} and batch["images"].dtype == np.float32
    for b, h, w, c in np.ndindex(images.shape):
        expected = (images[b, h, w, c] / 255 - mean[c]) / std[c]
        assert abs(batch["images"][b, h, w, c] - expected) < 1e-6


@pytest.mark.parametrize("augment", ["crop", "crop_flip"])
def test_a_crop_is_a_window_of_the_framed_image_and_all_windows_come_alike(augment):
    count = 3000
    prepare = image_inputs([0], [1], augment=augment)
    images = raw(prepare(rows(*[ONE] * count), RNG.random((count, CHANCES))))
    places = np.array([window_of(image) for image in images])
    for column, choices in enumerate((3, 5)):
        found = np.bincount(places[:, column], minlength=choices)
        spread = 5 * (count * (1 / choices) * (1 - 1 / choices)) ** 0.5
        assert (abs(found - count / choices) < spread).all()
    mirrored = places[:, 2].sum()
    if augment == "crop":
        assert mirrored == 0
    else:
        assert abs(mirrored - count / 2) < 5 * (count / 4) ** 0.5
        # Independent of each other: mirrored ones lie as the others do.
        assert abs(np.corrcoef(places.T)[np.triu_indices(3, 1)]).max() < 5 / count**0.5


def test_the_frame_is_black():
    chances = np.array([[0.0, 0.0, 1.0]])  # down and right as far as it goes, not mirrored
    batch = image_inputs([0.5], [0.25], augment="crop")(rows(ONE), chances)
    (image,) = batch["images"]
    frame = np.concatenate([image[:1].ravel(), image[:, :2].ravel()])
    np.testing.assert_allclose(frame, (0 - 0.5) / 0.25)
    np.testing.assert_allclose(image[1:, 2:], (ONE[:-1, :-2] / 255 - 0.5) / 0.25, atol=1e-6)


def test_an_examples_augmentation_is_its_own():
    prepare = image_inputs([0], [1], augment="crop_flip")
    chances = RNG.random((8, CHANCES))
    together = prepare(rows(*[ONE] * 8), chances)["images"]
    for i in range(8):
        alone = prepare(rows(ONE), chances[i : i + 1])["images"]
        np.testing.assert_array_equal(together[i : i + 1], alone)


@pytest.mark.parametrize("augment", ["", "crop_flip"])
def test_without_augmentation_images_stay_as_they_are(augment):
    chances = None if augment else RNG.random((1, CHANCES))
    images = raw(image_inputs([0], [1], augment=augment)(rows(ONE), chances))
    np.testing.assert_array_equal(images, ONE[None])


def test_grey_images_may_become_three_channels():
    colour = RNG.integers(0, 256, (9, 17, 3), np.uint8)
    images = raw(image_inputs([0] * 3, [1] * 3, channels=3)(rows(ONE, colour), None))
    for channel in range(3):
        np.testing.assert_array_equal(images[0, ..., channel], ONE[..., 0])
    np.testing.assert_array_equal(images[1], colour)


def test_another_size_is_cut_at_the_middle_and_resized():
    thirds = np.repeat(np.eye(3, dtype=np.uint8) * 255, 8, axis=0)  # red, green, blue columns
    wide = np.broadcast_to(thirds, (8, 24, 3))
    fitting = RNG.integers(0, 256, (4, 4, 3), np.uint8)
    images = raw(image_inputs([0] * 3, [1] * 3, size=(4, 4))(rows(wide, fitting), None))
    assert (images[0][:, 1:3] == [0, 255, 0]).all()
    assert (images[0].argmax(-1) == 1).all()  # smoothing mixes in what lies just beyond the cut
    np.testing.assert_array_equal(images[1], fitting)
    grey = np.full((7, 3, 1), 9, np.uint8)
    assert (raw(image_inputs([0], [1], size=(5, 8))(rows(grey), None)) == 9).all()
    assert image_inputs([0], [1], size=(5, 8))(rows(grey), None)["images"].shape == (1, 5, 8, 1)


def encode(text):
    return [101, *map(ord, text), 102]


def test_texts_are_padded_and_cut_before_their_last_token():
    prepare = text_inputs(encode, sequence_length=5, pad_id=7)
    examples = [{"text": text, "label": 0} for text in ("", "ab", "abc", "abcd", "abcdefgh")]
    batch = prepare(examples, None)
    assert batch["tokens"].tolist() == [
        [101, 102, 7, 7, 7],
        [101, 97, 98, 102, 7],
        [101, 97, 98, 99, 102],
        [101, 97, 98, 99, 102],
        [101, 97, 98, 99, 102],
    ]
    assert batch["mask"].sum(1).tolist() == [2, 4, 5, 5, 5]
    assert (np.diff(batch["mask"].astype(int)) <= 0).all()  # padding is at the end
    assert (batch["tokens"].dtype, batch["mask"].dtype) == (np.int32, bool)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (dict(augment="flip"), "augment='flip' is not one of '', 'crop', 'crop_flip'"),
        (dict(channels=1), "channels must be 3, or None for what the images have, not 1"),
        (dict(std=[1, 1]), r"mean \(0,\) and std \(1, 1\) must hold one number"),
        (dict(std=[0]), "and std a positive one, for each of the image channels"),
        (dict(std=[float("nan")]), r"std \(nan,\) must hold one number, and std a positive"),
        (dict(mean=[float("inf")]), r"mean \(inf,\) and std"),
        (dict(mean=[], std=[]), r"mean \(\) and std \(\) must hold one number"),
        (dict(channels=3), "for each of the 3 channels"),
    ],
)
def test_settings_that_do_not_fit(arguments, message):
    with pytest.raises(ValueError, match=message):
        image_inputs(**dict(mean=[0], std=[1]) | arguments)


def test_examples_that_do_not_fit():
    prepare = image_inputs([0], [1])
    other = np.zeros((9, 16, 1), np.uint8)
    with pytest.raises(
        ValueError, match=r"size, such as \(9, 16, 1\) and \(9, 17, 1\); give size="
    ):
        prepare(rows(ONE, other), None)
    with pytest.raises(ValueError, match="some images are grey and some are not; give channels=3"):
        prepare(rows(ONE, np.zeros((9, 17, 3), np.uint8)), None)
    with pytest.raises(ValueError, match="the images have 3 channels, but mean and std 1"):
        prepare(rows(np.zeros((9, 17, 3), np.uint8)), None)
    with pytest.raises(ValueError, match="these examples are texts, which make no images"):
        prepare([{"text": "a", "label": 0}], None)
    with pytest.raises(ValueError, match="these examples are images, which make no tokens"):
        text_inputs(encode, sequence_length=5, pad_id=0)(rows(ONE), None)
    with pytest.raises(ValueError, match="no tokens come of the text 'abc'"):
        text_inputs(lambda text: [], sequence_length=5, pad_id=0)([{"text": "abc"}], None)
    with pytest.raises(ValueError, match="sequence_length must be at least 2, not 1"):
        text_inputs(encode, sequence_length=1, pad_id=0)
