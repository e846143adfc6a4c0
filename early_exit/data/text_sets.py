"""Labelled texts: tables, JSON lines, and folders with a subfolder a class.

Texts are small beside the work of classifying them: they are read whole and checked at once, and
a text's split follows from the text itself, so that a text that stands twice is never in two
splits.
"""

import csv
import io
import json
import pathlib
from collections.abc import Iterator

from early_exit.data.parts import Example, Found, Part, class_folders, class_names, locate

DELIMITERS = {".csv": ",", ".tsv": "\t", ".tab": "\t"}
TEXT, LABEL = ("text",), ("label", "category", "class")
# What the second of a .tab file's three header lines may say (Orange's format).
_ORANGE = {"", "d", "discrete", "c", "continuous", "s", "string", "t", "time", "m", "meta"}

Row = tuple[str, str]  # text, label


def rows(path: str) -> Found:
    """A file, or a folder of .txt files in one subfolder a class, perhaps in `train/` and `test/`.

    A file is .jsonl, a line being {"text": "…", "label": a string or a whole number}, or .csv,
    .tsv or .tab with a header that names a column `text` and one `label`, `category` or `class`.
    A file whose name ends in `train` before the suffix has its own test set beside it, if there
    is one whose name has `test` there. Files are UTF-8 or else Windows-1252.

    Raises:
      FileNotFoundError: nothing is there.
      ValueError: another kind of file, no rows, or a bad row (named by file and line).
    """
    root = locate(path)
    if root.is_dir():
        files = class_folders(root, (".txt",))
        found = {
            part: [(_read(file), name) for name, file in pairs] for part, pairs in files.items()
        }
    else:
        found = {"train": _file_rows(root)}
        beside = root.with_name(f"{root.stem.removesuffix('train')}test{root.suffix}")
        if root.stem.endswith("train") and beside.exists():
            found["test"] = _file_rows(beside)
    classes = class_names(label for part in found.values() for _, label in part)
    numbers = {name: number for number, name in enumerate(classes)}

    def part(pairs: list[Row]) -> Part:
        def read(index: int) -> Example:
            text, label = pairs[index]
            return {"text": text, "label": numbers[label]}

        return Part(read, (text.encode() for text, _ in pairs))

    return Found(classes, part(found["train"]), part(found["test"]) if "test" in found else None)


def _file_rows(path: pathlib.Path) -> list[Row]:
    if path.suffix == ".jsonl":
        found = list(_json_rows(path))
    elif path.suffix in DELIMITERS:
        found = list(_table_rows(path))
    else:
        known = ", ".join((".jsonl", *DELIMITERS))
        raise ValueError(f"{path} is not one of {known}, nor a folder")
    if not found:
        raise ValueError(f"{path} holds no rows")
    return found


def _json_rows(path: pathlib.Path) -> Iterator[Row]:
    # Not `splitlines`, which also cuts at characters that JSON strings may hold.
    for number, line in enumerate(_read(path).split("\n"), 1):
        if not line.strip():
            continue
        name = f"{path.name}:{number}"
        try:
            row = json.loads(line)
        except ValueError as error:
            raise ValueError(f"{name} is not JSON: {error}") from error
        text, label = (row.get("text"), row.get("label")) if isinstance(row, dict) else (None, None)
        if not isinstance(text, str):
            raise ValueError(f'{name} has no "text" string; a row is {{"text": "…", "label": "…"}}')
        if type(label) not in (str, int) or label == "":
            raise ValueError(f'{name} has no "label" that is a string or a whole number')
        yield text, str(label)


def _table_rows(path: pathlib.Path) -> Iterator[Row]:
    lines = _table_lines(path)
    _, header = next(lines, (0, []))
    names = [name.strip().lower() for name in header]
    text = next((names.index(name) for name in TEXT if name in names), None)
    label = next((names.index(name) for name in LABEL if name in names), None)
    if text is None or label is None:
        raise ValueError(
            f"{path}: the header needs a column `text` and one `label`, `category` or `class`; "
            f"it has {', '.join(header) or 'nothing'}"
        )
    for order, (number, cells) in enumerate(lines):
        if path.suffix == ".tab" and order == 0 and _ORANGE.issuperset(cells):
            next(lines, None)  # what each column is for
            continue
        if len(cells) != len(names):
            raise ValueError(
                f"{path.name}:{number} has {len(cells)} columns, but the header {len(names)}"
            )
        if not cells[label].strip():
            raise ValueError(f"{path.name}:{number} has no {header[label].strip()}")
        yield cells[text], cells[label].strip()


def _table_lines(path: pathlib.Path) -> Iterator[tuple[int, list[str]]]:
    """(line number, cells) of each row that is not blank."""
    table = io.StringIO(_read(path), newline="")
    reader = csv.reader(table, delimiter=DELIMITERS[path.suffix], strict=True)
    try:
        for cells in reader:
            if any(cells):
                yield reader.line_num, cells
    except csv.Error as error:
        raise ValueError(f"{path.name}:{reader.line_num} is no row of a table: {error}") from error


def _read(path: pathlib.Path) -> str:
    data = path.read_bytes()
    for encoding in ("utf-8-sig", "cp1252"):
        try:
            return data.decode(encoding)
        except UnicodeDecodeError:
            continue
    raise ValueError(f"{path} is neither UTF-8 nor Windows-1252 text; convert it")
