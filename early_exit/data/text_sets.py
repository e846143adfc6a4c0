"""Labelled texts: tables, JSON lines, and folders with a subfolder a class.

Texts are small beside the work of classifying them: they are read whole and checked at once, and
a text's split follows from the text itself, so that a text that stands twice is never in two
splits.
"""

import pathlib
from collections.abc import Iterator

from early_exit.data import tables, text_files
from early_exit.data.parts import Example, Found, Part, class_folders, class_names, locate

TEXT, LABEL = ("text",), ("label", "category", "class")
# What the second of a .tab file's three header lines may say (Orange's format).
_ORANGE = {"", "d", "discrete", "c", "continuous", "s", "string", "t", "time", "m", "meta"}

Row = tuple[str, str]  # text, label


def rows(path: str) -> Found:
    """A file, or a folder of .txt files in one subfolder a class, perhaps in `train/` and `test/`.

    A file is .jsonl, a line being {"text": "…", "label": a string or a whole number}, or .csv,
    .tsv or .tab with a header that names a column `text` and one `label`, `category` or `class`.
    A file whose name ends in `train` before the suffix has its own test set beside it, if there
    is one whose name has `test` there. See `text_files` for encodings, `tables` for quoting.

    Raises:
      FileNotFoundError: nothing is there.
      ValueError: another kind of file, no rows, or a bad row (named by file and line).
    """
    root = locate(path)
    if root.is_dir():
        found = {
            part: [(text_files.read(file), name) for name, file in files]
            for part, files in class_folders(root, (".txt",)).items()
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
    if path.suffix.lower() == ".jsonl":
        found = list(_json_rows(path))
    elif path.suffix.lower() in tables.SUFFIXES:
        found = _table_rows(path)
    else:
        known = ", ".join((".jsonl", *tables.SUFFIXES))
        raise ValueError(f"{path} is not one of {known}, nor a folder")
    if not found:
        raise ValueError(f"{path} holds no rows")
    return found


def _json_rows(path: pathlib.Path) -> Iterator[Row]:
    for number, line in text_files.numbered(text_files.read(path)):
        where = f"{path}:{number}"
        row = text_files.json_row(line, where)
        text, label = text_files.json_string(row, "text", where), row.get("label")
        if type(label) not in (str, int) or label == "":
            raise ValueError(f'{where} has no "label" that is a string or a whole number')
        yield text, text_files.unicode(str(label), f'"label" of {where}')


def _table_rows(path: pathlib.Path) -> list[Row]:
    lines = list(tables.rows(path))
    header = lines.pop(0).cells if lines else []
    names = [name.strip().lower() for name in header]
    text = next((names.index(name) for name in TEXT if name in names), None)
    label = next((names.index(name) for name in LABEL if name in names), None)
    if text is None or label is None:
        raise ValueError(
            f"{path}: the header needs a column `text` and one `label`, `category` or `class`; "
            f"it has {', '.join(header) or 'nothing'}"
        )
    if path.suffix.lower() == ".tab" and lines and _ORANGE.issuperset(lines[0].cells):
        lines = lines[2:]  # what is in each column, and what it is for
    for number, cells, _ in lines:
        if len(cells) != len(names):
            raise ValueError(
                f"{path}:{number} has {len(cells)} columns, but the header {len(names)}"
            )
        if not cells[label].strip():
            raise ValueError(f"{path}:{number} has no {header[label].strip()}")
    _check_none_swallowed(path, lines, label)
    return [(cells[text], cells[label].strip()) for _, cells, _ in lines]


def _check_none_swallowed(path: pathlib.Path, lines: list[tables.Row], label: int) -> None:
    """Refuses a cell in which other rows seem to lie, for want of a quotation mark that closes it.

    Of the lines of a row, one has its label; a second one is another row's.
    """
    known = {row.cells[label].strip() for row in lines if len(row.lines) == 1}

    def is_row(line: str) -> bool:
        cells = line.split(",")
        return len(cells) == len(lines[0].cells) and cells[label].strip() in known

    for row in lines:
        if len(row.lines) > 1 and sum(map(is_row, row.lines)) > 1:
            raise ValueError(
                f"{path}:{row.line}: a quotation mark opens a cell that goes on for "
                f"{len(row.lines)} lines, and there are whole rows in it; double a quotation mark "
                "that is text and put its cell in such marks, or write the rows as .jsonl"
            )
