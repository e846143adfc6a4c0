"""Labelled images: MNIST's format, a folder with a subfolder a class, and scikit-learn's digits.

Arrays that fit in memory are read whole and checked at once; the files of a folder are read when
they are asked for.
"""

import gzip
import math
import os
import pathlib
import zlib

import numpy as np

from early_exit.data import text_files
from early_exit.data.parts import Example, Found, Part, class_folders, class_names, locate
from early_exit.storage import extras

SUFFIXES = (".png", ".jpg", ".jpeg")
# Of Pillow's, those that become 8-bit grey or 8-bit RGB without loss of range.
_GREY, _COLOUR = ("1", "L", "LA"), ("P", "PA", "RGB", "RGBA", "RGBX", "CMYK", "YCbCr")


def idx_files(path: str) -> Found:
    """A folder with `train-images-idx3-ubyte`, `train-labels-idx1-ubyte`, and `t10k-` for test.

    Each may be gzipped and then ends in `.gz`. Classes are named by the lines of `labels.txt`, if
    the folder holds that, else by their numbers: the format has no names. The test set may be
    absent. Format: http://yann.lecun.com/exdb/mnist.

    Raises:
      FileNotFoundError: a file is missing.
      ValueError: a damaged file, images and labels that do not belong together, or names for fewer
        classes than there are.
    """
    root = locate(path)
    train = _idx_set(root, "train")
    test = _idx_set(root, "t10k") if list(root.glob("t10k-*")) else None
    classes = 1 + max(labels.max() for _, labels in filter(None, (train, test)))
    names = _idx_names(root / "labels.txt", classes)
    return Found(names, _of_arrays(*train), _of_arrays(*test) if test else None)


def _idx_names(path: pathlib.Path, classes: int) -> tuple[str, ...]:
    if not path.exists():
        return tuple(map(str, range(classes)))
    names = tuple(line.strip() for _, line in text_files.numbered(text_files.read(path)))
    if len(names) < classes or len(set(names)) != len(names):
        raise ValueError(
            f"{path} must name {classes} classes, each on a line and by its own name; it has "
            f"{len(names)} lines with {len(set(names))} names"
        )
    return names


def image_folder(path: str) -> Found:
    """PNG and JPEG files in one subfolder a class, perhaps under `train/` and `test/`.

    A file's split follows from its path in the folder; it is read when it is asked for.

    Raises:
      FileNotFoundError: no such folder.
      ValueError: no images; a damaged one, when it is read.
    """
    root = locate(path)
    files = class_folders(root, SUFFIXES)
    classes = class_names(name for part in files.values() for name, _ in part)
    numbers = {name: number for number, name in enumerate(classes)}

    def part(found: list[tuple[str, pathlib.Path]]) -> Part:
        def read(index: int) -> Example:
            name, file = found[index]
            return {"image": read_image(file), "label": numbers[name]}

        return Part(read, (os.fsencode(file.relative_to(root).as_posix()) for _, file in found))

    return Found(classes, part(files["train"]), part(files["test"]) if "test" in files else None)


def digits(rest: str) -> Found:
    """The 1,797 images [8, 8, 1] of ten digits that scikit-learn carries; grey in 17 steps.

    Raises:
      ModuleNotFoundError: scikit-learn is not installed.
      ValueError: something stands after `digits`.
    """
    if rest:
        raise ValueError(f"nothing may stand after `digits`, but {rest!r} does")
    try:
        from sklearn.datasets import load_digits
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            "`digits` comes with scikit-learn; pip install scikit-learn"
        ) from error
    found = load_digits()
    images = (found.images * (255 / 16)).astype(np.uint8)[..., None]
    return Found(tuple(map(str, range(10))), _of_arrays(images, found.target), None)


def read_image(file: pathlib.Path) -> np.ndarray:
    """uint8 [H, W, 1] if the file is grey, else [H, W, 3]; transparency is dropped.

    Raises:
      ValueError: no readable PNG or JPEG, or more than 8 bits a channel.
    """
    with extras.needed("images"):
        from PIL import Image

    try:
        with Image.open(file, formats=("PNG", "JPEG")) as image:
            if image.mode in _GREY:
                return np.asarray(image.convert("L"))[..., None]
            if image.mode in _COLOUR:
                return np.asarray(image.convert("RGB"))
            mode = image.mode
    # Pillow raises SyntaxError for a broken PNG.
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise ValueError(f"{file} is not a readable image: {error}") from error
    raise ValueError(f"{file} has pixels of kind {mode}; convert it to 8 bits a channel")


def _of_arrays(images: np.ndarray, labels: np.ndarray) -> Part:
    def read(index: int) -> Example:
        return {"image": images[index], "label": int(labels[index])}

    return Part(read, (image.tobytes() for image in images))


def _idx_set(root: pathlib.Path, prefix: str) -> tuple[np.ndarray, np.ndarray]:
    """Images uint8 [N, H, W, 1] and labels uint8 [N]."""
    images = _idx_array(root / f"{prefix}-images-idx3-ubyte", dimensions=3)
    labels = _idx_array(root / f"{prefix}-labels-idx1-ubyte", dimensions=1)
    if len(images) != len(labels):
        raise ValueError(
            f"{root} holds {len(images)} {prefix} images, but {len(labels)} {prefix} labels"
        )
    if not images.size:
        raise ValueError(f"{root} holds no {prefix} images")
    return images[..., None], labels


def _idx_array(path: pathlib.Path, dimensions: int) -> np.ndarray:
    if not path.exists():
        path = path.with_name(f"{path.name}.gz")
    if not path.exists():
        raise FileNotFoundError(f"there is no {path}, nor one without .gz")
    data = path.read_bytes()
    if path.suffix == ".gz":
        try:
            data = gzip.decompress(data)
        except (EOFError, OSError, zlib.error) as error:
            raise ValueError(
                f"{path} is truncated or damaged ({error}); download it again"
            ) from error
    # Two zero bytes, 8 for unsigned bytes, the number of dimensions; then their sizes.
    magic, start = bytes([0, 0, 8, dimensions]), 4 + 4 * dimensions
    if data[:4] != magic:
        raise ValueError(f"{path} begins with {data[:4].hex()}, not with {magic.hex()}")
    shape = np.frombuffer(data[4:start].ljust(4 * dimensions, b"\0"), ">u4").tolist()
    if len(data) != start + math.prod(shape):
        raise ValueError(
            f"{path} has {len(data):,} bytes, but its header, {' × '.join(map(str, shape))}, "
            f"makes {start + math.prod(shape):,}; download it again"
        )
    return np.frombuffer(data, np.uint8, offset=start).reshape(shape)
