"""Labelled examples → what a classifier reads: images or tokens of one shape, a batch at a time.

The one idea: augmentation is a function of the images and of given random numbers, a few an
example, and works on a whole batch at once; so a batch follows from its seed, and costs little.
"""

from collections.abc import Callable, Sequence

import numpy as np

from early_exit.data.parts import Example
from early_exit.data.transforms import Batch
from early_exit.storage import extras

# Examples, and CHANCES random numbers in [0, 1) for each (None: no augmentation) → their batch.
Prepare = Callable[[Sequence[Example], np.ndarray | None], Batch]
CHANCES = 3  # down, right, mirror

AUGMENTS = ("", "crop", "crop_flip")


def image_inputs(
    mean: Sequence[float],
    std: Sequence[float],
    *,
    size: tuple[int, int] | None = None,
    resize: tuple[int, ...] = (),
    resample: str = "bilinear",
    channels: int | None = None,
    augment: str = "",
    expected: tuple[int, int] | None = None,
) -> Prepare:
    """Makes `images`, float32 [B, H, W, C]: (pixel/255 − mean)/std for each channel.

    Args:
      mean: of each channel of the batch, where white is 1.
      std: likewise.
      size: (H, W); an image of another size is cut, at its middle, to this shape and resized. None:
        all must have one size.
      resize: in place of that, (H, W) or (shorter side,) to resize to, and then cut `size` out of
        the middle.
      resample: one of Pillow's filters.
      channels: 3 makes grey images three equal channels; None takes them as they are.
      augment: what training batches get. `crop`: a random window of the image with a black border
        of an eighth of its sides; `crop_flip`: mirrored, too, half the time; empty: nothing.
      expected: (H, W) that a network was trained on; batches of another size are refused.

    Raises:
      ValueError: numbers that do not fit each other; later, images that do not fit them.
    """
    if augment not in AUGMENTS:
        raise ValueError(f"augment={augment!r} is not one of {', '.join(map(repr, AUGMENTS))}")
    if channels not in (None, 3):
        raise ValueError(f"channels must be 3, or None for what the images have, not {channels}")
    fit = len(mean) == len(std) and len(std) > 0 and channels in (None, len(mean))
    if not (fit and np.isfinite([*mean, *std]).all() and min(std) > 0):
        raise ValueError(
            f"mean {tuple(mean)} and std {tuple(std)} must hold one number, and std a positive "
            f"one, for each of the {channels or 'image'} channels"
        )
    scale = np.float32(1 / 255) / np.asarray(std, np.float32)
    shift = np.asarray(mean, np.float32) / np.asarray(std, np.float32)

    def prepare(rows: Sequence[Example], chances: np.ndarray | None) -> Batch:
        images = _stacked([_sized(_image(row), size, resize, resample, channels) for row in rows])
        if expected and images.shape[1:3] != expected:
            found, wanted = (" × ".join(map(str, of)) for of in (images.shape[1:3], expected))
            raise ValueError(
                f"the images are {found} high and wide, but the network was trained on {wanted}; "
                "resize them"
            )
        if images.shape[-1] != len(mean):
            raise ValueError(
                f"the images have {images.shape[-1]} channels, but mean and std {len(mean)}"
            )
        if chances is not None and augment:
            images = _cropped(images, chances, mirror=augment == "crop_flip")
        return {"images": images * scale - shift}

    return prepare


def text_inputs(
    encode: Callable[[str], Sequence[int]], *, sequence_length: int, pad_id: int
) -> Prepare:
    """Makes `tokens`, int32 [B, T], and `mask`, bool [B, T], false where a row is padding.

    Args:
      encode: text → ids, special tokens included; called from several threads.
      sequence_length: T. Longer texts are cut before their last token, which stays: encoders
        end a text with a special one.
      pad_id: what fills shorter rows.

    Raises:
      ValueError: a length under 2; later, examples that are no texts, or a text without tokens.
    """
    if sequence_length < 2:
        raise ValueError(f"sequence_length must be at least 2, not {sequence_length}")

    def prepare(rows: Sequence[Example], chances: np.ndarray | None) -> Batch:
        tokens = np.full((len(rows), sequence_length), pad_id, np.int32)
        mask = np.zeros(tokens.shape, bool)
        for row, example in enumerate(rows):
            ids = encode(_text(example))
            if not len(ids):
                raise ValueError(f"no tokens come of the text {example['text'][:40]!r}")
            if len(ids) > sequence_length:
                ids = [*ids[: sequence_length - 1], ids[-1]]
            tokens[row, : len(ids)] = ids
            mask[row, : len(ids)] = True
        return {"tokens": tokens, "mask": mask}

    return prepare


def _image(example: Example) -> np.ndarray:
    if "image" not in example:
        raise ValueError("these examples are texts, which make no images; choose another source")
    return example["image"]


def _text(example: Example) -> str:
    if "text" not in example:
        raise ValueError("these examples are images, which make no tokens; choose another source")
    return example["text"]


def _sized(
    image: np.ndarray,
    size: tuple[int, int] | None,
    resize: tuple[int, ...],
    resample: str,
    channels: int | None,
) -> np.ndarray:
    if size and (resize or image.shape[:2] != tuple(size)):
        with extras.needed("images"):
            from PIL import Image, ImageOps

        grey, how = image.shape[-1] == 1, Image.Resampling[resample.upper()]
        fitted = Image.fromarray(image[..., 0] if grey else image)
        if resize:
            height, width = _resized_to(image.shape[:2], resize)
            fitted = fitted.resize((width, height), how)
            top, left = (height - size[0]) // 2, (width - size[1]) // 2
            fitted = fitted.crop((left, top, left + size[1], top + size[0]))
        else:
            fitted = ImageOps.fit(fitted, size[::-1], how)
        image = np.asarray(fitted)[..., None] if grey else np.asarray(fitted)
    return np.repeat(image, 3, axis=-1) if channels == 3 and image.shape[-1] == 1 else image


def _resized_to(shape: tuple[int, ...], resize: tuple[int, ...]) -> tuple[int, int]:
    """(H, W); the longer side is rounded down, as torchvision and transformers have it."""
    if len(resize) == 2:
        return resize
    (short,), (height, width) = resize, shape
    if width <= height:
        return int(short * height / width), short
    return short, int(short * width / height)


def _stacked(images: list[np.ndarray]) -> np.ndarray:
    shapes = sorted({image.shape for image in images})
    if len({shape[:2] for shape in shapes}) > 1:
        raise ValueError(
            f"the images differ in size, such as {shapes[0]} and {shapes[-1]}; give size="
        )
    if len(shapes) > 1:
        raise ValueError("some images are grey and some are not; give channels=3")
    return np.stack(images)


def _cropped(images: np.ndarray, chances: np.ndarray, mirror: bool) -> np.ndarray:
    """uint8 [B, H, W, C]: for each image the window that its CHANCES choose."""
    count, height, width, _ = images.shape
    down, right = height // 8, width // 8
    framed = np.pad(images, ((0, 0), (down, down), (right, right), (0, 0)))
    top, left = (
        (chances[:, k] * (2 * side + 1)).astype(int) for k, side in enumerate((down, right))
    )
    rows = top[:, None] + np.arange(height)
    columns = left[:, None] + np.arange(width)
    if mirror:
        columns = np.where(chances[:, 2:] < 0.5, columns[:, ::-1], columns)
    return framed[np.arange(count)[:, None, None], rows[:, :, None], columns[:, None, :]]
