"""Text → shards of tokens, part by part (see `data.packed` for what they hold).

    parts of the text → documents → tokens → packed rows of one split, documents of the others

The one idea: what is made of a part follows from the part, so it does not matter who makes it,
when, or how often. Processes of one machine and workers of a pipeline do the same, and whatever is
killed begins its part again.
"""

import contextlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from early_exit.data import packed, shards, sources
from early_exit.data.corpus import Document, Part
from early_exit.data.tokenising import EncodeAll
from early_exit.storage import files

# Texts that are tokenised together: so many, or of so many characters.
_TEXTS, _CHARACTERS = 1024, 1 << 20


def pack(
    part: Part, number: int, folder: Path, about: dict[str, Any], encode: EncodeAll
) -> dict[str, Any]:
    """Writes the shards of a part; returns their description, which is there when they are.

    Args:
      number: of the part.
      about: as `packed.about`.

    Raises:
      ValueError: something in the part is no text.
      OSError: a shard cannot be written.
    """
    dtype, end = packed.dtype(about), about["end_of_text"]
    packer = packed.Packer(about["sequence_length"], dtype)
    counted = {split: {"documents": 0, "tokens": 0} for split in sources.SPLITS}
    with contextlib.ExitStack() as stack:
        new = {
            split: stack.enter_context(shards.writing(shards.data(folder / split, number)))
            for split in sources.SPLITS
        }
        for group in _groups(part.documents()):
            found = encode([document.text for document in group])
            for document, ids in zip(group, found, strict=True):
                split = sources.split_of(document.identity)
                counted[split]["documents"] += 1
                counted[split]["tokens"] += len(ids) + 1
                if split == packed.TRAIN:
                    for row in packer.add(np.array([*ids, end], dtype)):
                        new[split].add(row)
                else:
                    new[split].add(packed.pack_document(np.array(ids, dtype)))
        for row in packer.rest():
            new[packed.TRAIN].add(row)
    described = {split: new[split].described | counted[split] for split in sources.SPLITS}
    path = shards.description(folder, number)
    files.remove_partial(path)
    files.write_json(path, described)
    return described


def begin(folder: Path, about: dict[str, Any]) -> list[int]:
    """Makes the folder, or goes on with one; returns the numbers of the parts that are to be made.

    Nobody else may do so meanwhile.

    Raises:
      ValueError: the folder holds other records; names what differs.
    """
    for name in (shards.ABOUT, packed.MANIFEST):
        files.remove_partial(folder / name)
    shards.begin(folder, about)
    for split in sources.SPLITS:
        files.make_folder(folder / split)
    made = {path.stem for path in folder.glob("[0-9]*.json")}
    return [number for number in range(about["parts"]["count"]) if f"{number:05}" not in made]


def finish(folder: Path, about: dict[str, Any], source: str) -> dict[str, Any]:
    """Writes the manifest when all parts are made, and returns it.

    Args:
      source: what the text is called.

    Raises:
      FileNotFoundError: a part that is not made yet.
    """
    made = shards.finished(folder)
    lacking = [number for number in range(about["parts"]["count"]) if number not in made]
    if lacking:
        raise FileNotFoundError(f"{folder} lacks parts {lacking[:5]}; let launch.tokenize finish")
    splits = {}
    for split in sources.SPLITS:
        found = [made[number][split] for number in range(about["parts"]["count"])]
        total = {
            name: sum(shard[name] for shard in found)
            for name in ("documents", "tokens", "records", "bytes")
        }
        splits[split] = total | {"shards": found}
    manifest = files.plain(about) | {"source": source, "splits": splits}
    files.write_json(folder / packed.MANIFEST, manifest)
    return manifest


def _groups(documents: Iterable[Document]) -> Iterator[list[Document]]:
    group, held = [], 0
    for document in documents:
        group.append(document)
        held += len(document.text)
        if len(group) == _TEXTS or held >= _CHARACTERS:
            yield group
            group, held = [], 0
    if group:
        yield group
