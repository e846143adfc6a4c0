"""Tables of texts: the cells of each row of a .csv, .tsv or .tab file.

The one idea: the suffix alone says how a table is written. In .csv a cell may stand in quotation
marks and then hold line ends and commas. In .tsv and .tab there is no quoting: every line is a
row, and a quotation mark is text.
"""

import csv
import io
import pathlib
import re
from collections.abc import Iterator
from typing import NamedTuple

from absl import logging

from early_exit.data import text_files

SUFFIXES = (".csv", ".tsv", ".tab")
# A cell between quotation marks, with a doubled one in it.
_LOOKS_QUOTED = re.compile(r'(?:^|\t)"(?:[^"\t\n]*"")+[^"\t\n]*"(?:\t|$)', re.MULTILINE)


class Row(NamedTuple):
    """The line it begins on, counted from 1; its cells; and the lines that it goes over."""

    line: int
    cells: list[str]
    lines: list[str]


def rows(path: pathlib.Path) -> Iterator[Row]:
    """Each row that is not blank.

    Raises:
      FileNotFoundError: no such file.
      ValueError: no text, or no table; named by file and line.
    """
    text = text_files.read(path)
    if path.suffix.lower() != ".csv":
        if _LOOKS_QUOTED.search(text):
            logging.warning(
                "%s: quotation marks are text here, and doubled ones stay so, but some cells look "
                "quoted; if they are, save the table as .csv with commas",
                path,
            )
        for number, line in text_files.numbered(text):
            yield Row(number, line.split("\t"), [line])
        return
    lines = text.split("\n")
    # Of the whole process, and never lowered: a cell is at most as long as its file.
    csv.field_size_limit(max(csv.field_size_limit(), len(text)))
    reader = csv.reader(io.StringIO(text, newline=""), strict=True)
    begins = 1
    try:
        for cells in reader:
            if any(cell.strip() for cell in cells):
                yield Row(begins, cells, lines[begins - 1 : reader.line_num])
            begins = reader.line_num + 1
    except csv.Error as error:
        over = f", which goes on to line {reader.line_num}," if reader.line_num > begins else ""
        raise ValueError(
            f"{path}:{begins}{over} is no row of a table: {error}; in .csv, a text with quotation "
            "marks stands in such marks, and its own are doubled"
        ) from error
