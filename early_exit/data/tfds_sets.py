"""Labelled images and texts of TensorFlow Datasets, read at random without TensorFlow."""

import pathlib
from collections.abc import Sequence
from typing import Any

import numpy as np

from early_exit.data.parts import HELD_OUT, Example, Found, Part


def tfds_set(name: str) -> Found:
    """A set of the catalogue, such as `fashion_mnist` or `imdb_reviews:1.0.0`.

    It is downloaded and prepared once, under `$TFDS_DATA_DIR` or `~/tensorflow_datasets`. Its
    image, or its texts joined by line ends, are the input; its class label is `label` if it has
    several. Classes keep the catalogue's order. An example's split follows from its place.

    Raises:
      ModuleNotFoundError: tensorflow-datasets, or what preparing this set needs, is not installed.
      ValueError: no such set, or none of labelled 8-bit images or texts.
    """
    builder = _builder(name)
    features = builder.info.features
    tfds = library()
    inputs, label = _input_names(tfds, name, features), _label_name(tfds, name, features)
    _prepare(builder, name)

    def part(split: str) -> Part:
        found = data_source(builder, name, split)

        def read(index: int) -> Example:
            row = found[index]
            number = int(row[label])
            if number < 0:
                raise ValueError(f"example {index} of {name}, split {split}, has no label")
            return _input(row, inputs) | {"label": number}

        return Part(read, (str(index).encode() for index in range(len(found))))

    held_out = next((split for split in HELD_OUT if split in builder.info.splits), None)
    return Found(tuple(features[label].names), part("train"), part(held_out) if held_out else None)


def library() -> Any:
    """TensorFlow Datasets.

    Raises:
      ModuleNotFoundError: it is not installed.
    """
    try:
        import tensorflow_datasets
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            "`tfds:` needs TensorFlow Datasets; pip install tensorflow-datasets importlib-resources"
        ) from error
    return tensorflow_datasets


def prepared(name: str) -> Any:
    """The builder of a set of the catalogue, or of a folder that one has prepared; it is prepared.

    Raises:
      as `tfds_set`.
    """
    builder = _builder(name)
    _prepare(builder, name)
    return builder


def data_source(builder: Any, name: str, split: str) -> Sequence[dict[str, Any]]:
    """Random access to the examples of a split.

    Raises:
      ValueError: files that are not read so.
    """
    try:
        return builder.as_data_source(split)
    except NotImplementedError as error:
        raise ValueError(
            f"{name} lies there as {builder.info.file_format.value} files; prepare it again with "
            "file_format='array_record', which can be read at random"
        ) from error


def _builder(name: str) -> Any:
    folder = pathlib.Path(name).expanduser()
    if (folder / "dataset_info.json").exists():
        return library().builder_from_directory(folder)
    return library().builder(name, file_format="array_record")


def _prepare(builder: Any, name: str) -> None:
    try:
        builder.download_and_prepare()
    except ImportError as error:
        cause = error
        while cause.__cause__:  # what TFDS wraps it in shows whole examples
            cause = cause.__cause__
        raise ModuleNotFoundError(
            f"preparing {name} for its first use failed: {cause}. Install it, or prepare the set "
            "with file_format='array_record' where it is installed, and copy its folder to "
            f"{builder.data_dir}"
        ) from error


def _input(row: dict, names: list[str]) -> Example:
    if isinstance(row[names[0]], np.ndarray):
        return {"image": row[names[0]]}
    texts = (row[name] for name in names)
    return {"text": "\n".join(t.decode() if isinstance(t, bytes) else t for t in texts)}


def _input_names(tfds, name: str, features) -> list[str]:
    """The one image, or all texts."""
    images = [key for key, kind in features.items() if isinstance(kind, tfds.features.Image)]
    texts = [key for key, kind in features.items() if isinstance(kind, tfds.features.Text)]
    if len(images) > 1 or not images + texts:
        raise ValueError(f"{name} has neither one image nor texts among its {', '.join(features)}")
    if images and features[images[0]].np_dtype != np.uint8:
        raise ValueError(f"{name} has images of {features[images[0]].np_dtype}, not of 8 bits")
    return images or texts


def _label_name(tfds, name: str, features) -> str:
    labels = [key for key, kind in features.items() if isinstance(kind, tfds.features.ClassLabel)]
    if len(labels) != 1 and "label" not in labels:
        raise ValueError(f"{name} has no single class label among its {', '.join(features)}")
    return "label" if "label" in labels else labels[0]
