import gzip
import struct

import numpy as np
import pytest
from PIL import Image

from early_exit.data import image_sets

IMAGES = np.random.default_rng(0).integers(0, 256, (5, 3, 4), np.uint8)
LABELS = np.array([2, 0, 1, 1, 0], np.uint8)


def idx(array):
    """MNIST's format, as its page describes it."""
    sizes = struct.pack(f">{array.ndim}I", *array.shape)
    return bytes([0, 0, 8, array.ndim]) + sizes + array.tobytes()


# Without the time of day: a test's name holds it, and every worker must have the same names.
PACKED = gzip.compress(idx(IMAGES), mtime=0)


def write_idx(folder, prefix="train", images=IMAGES, labels=LABELS):
    (folder / f"{prefix}-images-idx3-ubyte").write_bytes(idx(images))
    (folder / f"{prefix}-labels-idx1-ubyte").write_bytes(idx(labels))


def test_idx_files_plain_and_gzipped(tmp_path):
    write_idx(tmp_path)
    assert image_sets.idx_files(str(tmp_path)).test is None
    write_idx(tmp_path, "t10k", IMAGES[:2], np.array([4, 3], np.uint8))
    for path in tmp_path.glob("*-images*"):
        path.with_name(f"{path.name}.gz").write_bytes(gzip.compress(path.read_bytes()))
        path.unlink()
    classes, train, test = image_sets.idx_files(str(tmp_path))
    assert classes == ("0", "1", "2", "3", "4")  # of both parts
    for i, (image, label) in enumerate(zip(IMAGES, LABELS, strict=True)):
        example = train.read(i)
        np.testing.assert_array_equal(example["image"], image[..., None])
        assert example["label"] == label and type(example["label"]) is int
    assert [test.read(i)["label"] for i in range(2)] == [4, 3]
    assert (len(list(train.identities)), len(list(test.identities))) == (5, 2)


def test_idx_files_whose_classes_have_names(tmp_path):
    write_idx(tmp_path)
    names = tmp_path / "labels.txt"
    names.write_text("T-shirt/top\n Trouser\nPullover\n\n")
    assert image_sets.idx_files(str(tmp_path)).classes == ("T-shirt/top", "Trouser", "Pullover")
    for text, found in (("one\ntwo\n", "2 lines with 2"), ("one\ntwo\none\n", "3 lines with 2")):
        names.write_text(text)
        with pytest.raises(ValueError, match=f"labels.txt must name 3 classes, .* has {found}"):
            image_sets.idx_files(str(tmp_path))


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("train-images-idx3-ubyte", idx(LABELS), "begins with 00000801, not with 00000803"),
        ("train-labels-idx1-ubyte", b"<html>", "begins with 3c68746d, not with 00000801"),
        ("train-images-idx3-ubyte", idx(IMAGES)[:-1], "75 bytes, .* 5 × 3 × 4, makes 76"),
        ("train-images-idx3-ubyte", idx(IMAGES) + b"!", "77 bytes, .* 5 × 3 × 4, makes 76"),
        ("train-images-idx3-ubyte", idx(IMAGES)[:9], "9 bytes, but its header, 5 × 0 × 0, makes"),
        ("train-labels-idx1-ubyte", idx(LABELS[:4]), "holds 5 train images, but 4 train labels"),
        ("train-images-idx3-ubyte", idx(IMAGES[:0]), "holds 0 train images, but 5 train labels"),
        ("train-images-idx3-ubyte.gz", PACKED[:-9], "is truncated or damaged"),
        ("train-images-idx3-ubyte.gz", b"plain", "is truncated or damaged"),
    ],
)
def test_a_damaged_idx_file_is_named(tmp_path, name, content, message):
    write_idx(tmp_path)
    if name.endswith(".gz"):
        (tmp_path / name.removesuffix(".gz")).unlink()
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=message) as raised:
        image_sets.idx_files(str(tmp_path))
    assert ("holds" in message) or name in str(raised.value)


def test_idx_files_that_are_missing_or_empty(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"train-images-idx3-ubyte\.gz, nor one without"):
        image_sets.idx_files(str(tmp_path))
    write_idx(tmp_path)
    (tmp_path / "t10k-labels-idx1-ubyte").write_bytes(idx(LABELS))
    with pytest.raises(FileNotFoundError, match=r"t10k-images-idx3-ubyte\.gz, nor one without"):
        image_sets.idx_files(str(tmp_path))
    write_idx(tmp_path, "t10k", IMAGES[:0], LABELS[:0])
    with pytest.raises(ValueError, match="holds no t10k images"):
        image_sets.idx_files(str(tmp_path))


def save(path, mode="RGB", colour=(200, 100, 50), size=(5, 4)):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, colour).convert(mode).save(path)


def read_all(part):
    return [part.read(i) for i in range(len(list(part.identities)))]


def test_a_folder_a_class(tmp_path):
    for name in ("dog/1.png", "dog/2.JPG", "dog/more/3.png", "cat/1.png", "bird/1.jpeg"):
        save(tmp_path / name)
    for name in ("cat/notes.txt", "cat/.hidden.png", ".git/x.png"):
        save(tmp_path / "a.png")
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / "a.png").rename(tmp_path / name)
    classes, train, test = image_sets.image_folder(str(tmp_path))
    assert classes == ("bird", "cat", "dog") and test is None
    assert list(train.identities) == [
        name.encode()
        for name in ("bird/1.jpeg", "cat/1.png", "dog/1.png", "dog/2.JPG", "dog/more/3.png")
    ]
    train = image_sets.image_folder(str(tmp_path)).train
    assert [example["label"] for example in read_all(train)] == [0, 1, 2, 2, 2]


@pytest.mark.parametrize("held_out", ["test", "val"])
def test_a_folder_may_have_its_own_test_set(tmp_path, held_out):
    for name in ("train/dog/1.png", "train/cat/1.png", f"{held_out}/eel/1.png"):
        save(tmp_path / name)
    classes, train, test = image_sets.image_folder(str(tmp_path))
    assert classes == ("cat", "dog", "eel")
    assert [example["label"] for example in read_all(train)] == [0, 1]
    assert [example["label"] for example in read_all(test)] == [2]


@pytest.mark.parametrize(
    ("mode", "channels"), [("L", 1), ("1", 1), ("LA", 1), ("RGB", 3), ("RGBA", 3), ("P", 3)]
)
def test_pixels_of_every_kind_of_png(tmp_path, mode, channels):
    white = (255, 255, 255)
    save(tmp_path / "a.png", mode, white)
    np.testing.assert_array_equal(
        image_sets.read_image(tmp_path / "a.png"), np.full((4, 5, channels), 255, np.uint8)
    )
    if mode != "1":  # which dithers
        levels = np.arange(60, dtype=np.uint8).reshape(4, 5, 3)[..., :channels]
        image = Image.fromarray(levels[..., 0] if channels == 1 else levels).convert(mode)
        image.save(tmp_path / "a.png")
        expected = levels if mode != "P" else np.asarray(image.convert("RGB"))
        np.testing.assert_array_equal(image_sets.read_image(tmp_path / "a.png"), expected)


def test_an_image_that_cannot_be_read_is_named_when_it_is(tmp_path):
    save(tmp_path / "a" / "cut.png", size=(64, 64))
    content = (tmp_path / "a" / "cut.png").read_bytes()
    (tmp_path / "a" / "cut.png").write_bytes(content[: len(content) // 2])
    (tmp_path / "a" / "text.jpg").write_text("no image")
    Image.fromarray(np.zeros((2, 2), np.uint16)).save(tmp_path / "a" / "deep.png")
    Image.new("L", (2, 2)).save(tmp_path / "a" / "bitmap.png", format="BMP")
    train = image_sets.image_folder(str(tmp_path)).train
    kinds = ("bitmap", "cut", "deep", "text")
    messages = ["is not a readable image"] * 4
    messages[2] = "has pixels of kind I;16; convert it to 8 bits a channel"
    for index, (kind, message) in enumerate(zip(kinds, messages, strict=True)):
        with pytest.raises(ValueError, match=rf"{kind}\.(png|jpg) {message}"):
            train.read(index)


def test_a_folder_without_images_is_an_error(tmp_path):
    save(tmp_path / "loose.png")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="holds no examples; put .png, .jpg, .jpeg files into one"):
        image_sets.image_folder(str(tmp_path))
    save(tmp_path / "train" / "a" / "1.png")
    (tmp_path / "test").mkdir()
    with pytest.raises(ValueError, match="test holds no examples"):
        image_sets.image_folder(str(tmp_path))
