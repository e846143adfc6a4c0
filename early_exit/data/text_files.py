"""Text files → text: the one reader behind every source of texts, class names and `--input`.

The one idea: what a file says does not depend on who reads it, and nothing is guessed in silence.
A byte-order mark names the encoding; a file without one is UTF-8. What is neither is refused by
file and line, unless it can only be Windows-1252, and then that is told.

Lines end with LF, CR LF or CR, all read as LF, and with nothing else: JSON strings and texts may
hold U+0085 and U+2028. A line of white space alone is blank. A byte-order mark that starts a line,
as in files that were joined, is no text.
"""

import codecs
import dataclasses
import io
import json
import pathlib
import re
from collections.abc import Iterator
from typing import Any, BinaryIO, NamedTuple

from absl import logging

# UTF-32's mark begins with that of UTF-16, and is looked for first.
_MARKS = (
    (codecs.BOM_UTF32_LE, "utf-32-le"),
    (codecs.BOM_UTF32_BE, "utf-32-be"),
    (codecs.BOM_UTF16_LE, "utf-16-le"),
    (codecs.BOM_UTF16_BE, "utf-16-be"),
    (codecs.BOM_UTF8, "utf-8"),
)
_WINDOWS = "cp1252"
# Other control characters than white space, the end of a DOS file and escape: none are in texts.
_CONTROL = re.compile(r"[\x01-\x08\x0e-\x19\x1c-\x1f\x7f]")
_MARKED_LINE = re.compile("^\ufeff+", re.MULTILINE)
_CHUNK = 1 << 20

_NUL = "NUL"

# Folders with a file that was told to be read as Windows-1252.
_told: set[str] = set()


class Line(NamedTuple):
    """A line of a file: its number from 1, its bytes `start` to `stop`, and its text with the LF.

    The last line of a file may have no LF.
    """

    number: int
    start: int
    stop: int
    text: str


@dataclasses.dataclass(frozen=True)
class TextFile:
    """Parts of a text file, for files that need not fit into memory; see `opened`.

    Attributes:
      codec: Python's name of its encoding.
    """

    path: pathlib.Path
    codec: str

    def read(self, start: int, stop: int) -> str:
        """The text of some of its lines, by their bytes.

        Raises:
          ValueError: these are no whole lines any more.
        """
        with self.path.open("rb") as file:
            file.seek(start)
            data = file.read(stop - start)
        try:
            if len(data) < stop - start:
                raise EOFError("it has become shorter")
            return _plain(data.decode(self.codec))
        except (EOFError, UnicodeDecodeError) as error:
            raise ValueError(f"{self.path} has changed while it was in use: {error}") from error

    def lines(self) -> Iterator[Line]:
        """All of them, blank ones too."""
        start = 0
        # newline="" cuts after every kind of line end and leaves it as it is.
        with self.path.open(encoding=self.codec, newline="") as file:
            for number, line in enumerate(file, 1):
                stop = start + len(line.encode(self.codec))
                yield Line(number, start, stop, _plain(line))
                start = stop


def opened(path: pathlib.Path) -> TextFile:
    """A file to read in parts; it is gone through once to know its encoding.

    Raises:
      FileNotFoundError: no such file.
      ValueError: no text; named by file and line.
    """
    with _existing(path).open("rb") as file:
        return TextFile(path, _codec(file, path))


def read(path: pathlib.Path) -> str:
    """All the text of a file, or of a pipe.

    Raises:
      FileNotFoundError: no such file.
      ValueError: no text; named by file and line.
    """
    return decode(_existing(path).read_bytes(), path)


def decode(data: bytes, name: str | pathlib.Path) -> str:
    """Bytes → text; `name` says in errors where they are from.

    Raises:
      ValueError: no text; named by `name` and line.
    """
    return _plain(data.decode(_codec(io.BytesIO(data), name)))


def numbered(text: str) -> Iterator[tuple[int, str]]:
    """(number from 1, line without its LF) of every line that is not blank."""
    # Not `splitlines`, which also cuts at characters that are no line ends here.
    for number, line in enumerate(text.split("\n"), 1):
        if line.strip():
            yield number, line


def listed(path: pathlib.Path, name: str) -> list[str]:
    """What stands on each line of a file: text, or (`.jsonl`) an object that has it under `name`.

    Blank lines are left out; of others, white space is kept.

    Raises:
      FileNotFoundError: no such file.
      ValueError: nothing in it, no text, or a line that is no such object.
    """
    found = list(numbered(read(path)))
    if not found:
        raise ValueError(f"{path} holds no {name}; write one on each line")
    if path.suffix.lower() != ".jsonl":
        return [line for _, line in found]
    places = ((line, f"{path}:{number}") for number, line in found)
    return [json_string(json_row(line, where), name, where) for line, where in places]


def json_row(line: str, where: str) -> dict[str, Any]:
    """The object on a line of a `.jsonl` file.

    Raises:
      ValueError: there is something else; `where` says in errors where that is.
    """
    try:
        row = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{where} is not JSON: {error}") from error
    if not isinstance(row, dict):
        raise ValueError(f'{where} is no JSON object; a row is one, such as {{"text": "…"}}')
    return row


def json_string(row: dict[str, Any], name: str, where: str) -> str:
    """What a row has under `name`.

    Raises:
      ValueError: no string, or one that no file could hold (see `unicode`).
    """
    if not isinstance(row.get(name), str):
        raise ValueError(f'{where} has no "{name}" string; a row is an object with "{name}": "…"')
    return unicode(row[name], f'"{name}" of {where}')


def unicode(text: str, where: str) -> str:
    """The text itself.

    Raises:
      ValueError: half of a surrogate pair is in it, which is no character: JSON can spell one out,
        and names of files that are not UTF-8 have them.
    """
    try:
        text.encode()
    except UnicodeEncodeError as error:
        half = ascii(text[error.start])[1:-1]
        raise ValueError(
            f"{where} holds {half}, half of a surrogate pair, which is no character; "
            "write the whole character in UTF-8"
        ) from error
    return text


def _existing(path: pathlib.Path) -> pathlib.Path:
    if not path.exists():
        raise FileNotFoundError(f"there is no {path}")
    if path.is_dir():
        raise IsADirectoryError(f"{path} is a folder, where a text file is wanted")
    return path


def _plain(text: str) -> str:
    """Text with all line ends as LF, and without byte-order marks; the file's is one, too."""
    return _MARKED_LINE.sub("", text.replace("\r\n", "\n").replace("\r", "\n"))


def _codec(file: BinaryIO, name: str | pathlib.Path) -> str:
    head = file.read(4)
    marked = next((codec for mark, codec in _MARKS if head.startswith(mark)), None)
    codec = marked or "utf-8"
    fault = _fault(file, codec)
    if fault is None:
        return codec
    line, what = fault
    if what is _NUL:
        raise ValueError(
            f"{name}:{line} holds a NUL, as UTF-16 without a byte-order mark does; save the file "
            "as UTF-8"
        )
    if marked:
        raise ValueError(
            f"{name}:{line} is not {codec.upper()}, which the file's byte-order mark "
            f"promises ({what}); save the file as UTF-8"
        )
    if _holds_utf8(file):
        raise ValueError(
            f"{name}:{line} is not UTF-8 ({what}), though there are UTF-8 characters in the file; "
            "write that line anew, or save the file as UTF-8"
        )
    if _fault(file, _WINDOWS, _CONTROL):
        raise ValueError(f"{name}:{line} is neither UTF-8 nor Windows-1252 text; save it as UTF-8")
    _tell(name)
    return _WINDOWS


def _fault(file: BinaryIO, codec: str, never: re.Pattern | None = None) -> tuple[int, str] | None:
    """(line, what) of the first bytes that are no text of the codec, or what is `never` in one."""
    decoder = codecs.getincrementaldecoder(codec)()
    number, before = 1, ""
    for chunk in _chunks(file):
        wrong = None
        try:
            text = decoder.decode(chunk, final=not chunk)
        except UnicodeDecodeError as error:
            text = error.object[: error.start].decode(codec)
            wrong = len(text), f"{error.reason}: {error.object[error.start : error.end].hex(' ')}"
        if never and (found := never.search(text)):
            wrong = found.start(), found[0]
        if "\0" in text:
            wrong = text.index("\0"), _NUL
        read = before + (text[: wrong[0]] if wrong else text)
        number += _line_ends(read) - _line_ends(before)
        if wrong:
            return number, wrong[1]
        before = read[-1:]
    return None


def _line_ends(text: str) -> int:
    return text.count("\n") + text.count("\r") - text.count("\r\n")


def _holds_utf8(file: BinaryIO) -> bool:
    """Whether more than ASCII is valid UTF-8, between bytes that are not."""
    decoder = codecs.getincrementaldecoder("utf-8")(errors="ignore")
    return not all(decoder.decode(chunk, final=not chunk).isascii() for chunk in _chunks(file))


def _chunks(file: BinaryIO) -> Iterator[bytes]:
    """All that is in the file, and an empty one at the end."""
    file.seek(0)
    chunk = None
    while chunk != b"":
        chunk = file.read(_CHUNK)
        yield chunk


def _tell(name: str | pathlib.Path) -> None:
    """Once for a folder: old collections have such files by the thousand."""
    folder = str(pathlib.Path(name).parent)
    if folder not in _told:
        _told.add(folder)
        logging.warning(
            "%s is not UTF-8 and is read as Windows-1252, as are all such files in its folder; if "
            "letters with accents look wrong, save it as UTF-8",
            name,
        )
