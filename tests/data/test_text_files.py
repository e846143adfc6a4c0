"""One table of files, and every reader of text: each must make the same of the same bytes."""

import json
import logging

import numpy as np
import pytest

from early_exit.data import image_sets, sources, text_files, text_sets
from tests.data.test_image_sets import write_idx

# Two lines, as every kind of file can hold them: of texts without quotation marks and tabs.
TEXTS = ["one é €", "nan\u0085\u2028null"]
PLAIN = ["one café", "£5 – null"]  # Windows-1252 has all of these


def as_lines(texts, **_):
    return "".join(f"{text}\n" for text in texts)


def as_json(texts, name="text", **_):
    rows = [json.dumps({name: text, "label": "x"}, ensure_ascii=False) for text in texts]
    return as_lines(rows)


def as_table(texts, delimiter):
    return f"text{delimiter}label\n" + as_lines(f"{text}{delimiter}x" for text in texts)


def table_rows(file):
    _, part, _ = text_sets.rows(str(file))
    return [part.read(i)["text"] for i, _ in enumerate(part.identities)]


def tuning(file):
    """What a language model is tuned on, in the order in which it stands in the file."""
    spans = [span for span, _ in sources.spans(str(file))]
    return [span.read() for span in spans]


def class_folder(file):
    folder = file.parent / "classes" / "x"
    folder.mkdir(parents=True, exist_ok=True)
    file.replace(folder / file.name)
    return table_rows(folder.parent)[0].removesuffix("\n").split("\n")


def class_names(file):
    write_idx(file.parent, labels=np.array([0, 1, 0, 1, 0], np.uint8))
    return list(image_sets.idx_files(str(file.parent)).classes)


# Name of the file, what is in it, and who reads it: → the texts.
READERS = {
    "csv": ("a.csv", lambda texts: as_table(texts, ","), table_rows),
    "tsv": ("a.tsv", lambda texts: as_table(texts, "\t"), table_rows),
    "tab": ("a.TAB", lambda texts: as_table(texts, "\t"), table_rows),
    "jsonl": ("a.jsonl", as_json, table_rows),
    "class folder": ("a.txt", as_lines, class_folder),
    "class names": ("labels.txt", as_lines, class_names),
    "input": ("a.txt", as_lines, lambda file: text_files.listed(file, "prompt")),
    "input jsonl": (
        "a.JSONL",
        lambda texts: as_json(texts, "prompt"),
        lambda file: text_files.listed(file, "prompt"),
    ),
    "tuning": ("a.txt", as_lines, lambda file: "".join(tuning(file)).rstrip("\n").split("\n")),
    "tuning jsonl": ("a.jsonl", as_json, tuning),
    "tuning folder": (
        "a.md",
        as_lines,
        lambda file: "".join(tuning(file.parent)).rstrip("\n").split("\n"),
    ),
}
every_reader = pytest.mark.parametrize("reader", READERS)


def read(folder, reader, content, texts=TEXTS):
    """What a reader makes of a file of these texts that `content` makes bytes of."""
    name, write, read_texts = READERS[reader]
    (folder / name).write_bytes(content(write(texts)))
    return read_texts(folder / name)


CODECS = {
    "UTF-8": lambda text: text.encode(),
    "UTF-8 with a mark": lambda text: text.encode("utf-8-sig"),
    "UTF-16": lambda text: text.encode("utf-16"),
    "UTF-16 BE": lambda text: b"\xfe\xff" + text.encode("utf-16-be"),
    "UTF-32": lambda text: text.encode("utf-32"),
    "UTF-32 BE": lambda text: b"\0\0\xfe\xff" + text.encode("utf-32-be"),
    "CR LF": lambda text: text.replace("\n", "\r\n").encode(),
    "CR": lambda text: text.replace("\n", "\r").encode(),
    "CR LF in UTF-16": lambda text: text.replace("\n", "\r\n").encode("utf-16"),
    "no last line end": lambda text: text.rstrip("\n").encode(),
    "joined of files with marks": lambda text: "".join(
        f"\ufeff{line}" for line in text.splitlines(keepends=True)
    ).encode(),
}


@every_reader
@pytest.mark.parametrize("codec", CODECS)
def test_every_reader_knows_every_encoding_and_line_end(tmp_path, caplog, reader, codec):
    texts = TEXTS
    if codec.startswith("joined"):  # `splitlines` would cut in the second text
        texts = ["one é €", "nan null"]
    assert read(tmp_path, reader, CODECS[codec], texts) == texts
    assert not caplog.records


@every_reader
def test_windows_1252_is_read_and_told_once(tmp_path, caplog, reader):
    for _ in range(2):
        assert read(tmp_path, reader, lambda text: text.encode("cp1252"), PLAIN) == PLAIN
    assert [record.levelno for record in caplog.records] == [logging.WARNING]
    assert "is not UTF-8 and is read as Windows-1252" in caplog.text


@every_reader
@pytest.mark.parametrize(
    ("content", "line", "message"),
    [
        (lambda t: t.encode("utf-8").replace(b"nan", b"n\xe9n"), 2, r"is not UTF-8 \(invalid con"),
        (lambda t: t.encode("utf-8-sig").replace(b"nan", b"n\xe9n"), 2, "is not UTF-8, which the"),
        (lambda t: t.encode("utf-8")[:-1] + b"\xc3", 2, r"is not UTF-8 \(unexpected end"),
        (lambda t: t.encode("utf-16-le"), 1, "holds a NUL, as UTF-16 without a byte-order mark"),
        (lambda t: t.encode("utf-16-be"), 1, "holds a NUL"),
        (lambda t: t.encode("utf-32-le"), 1, "holds a NUL"),
        (lambda t: t.encode("utf-16") + b"\n", 3, "is not UTF-16-LE, which the .*truncated data"),
        (lambda t: t.replace("nan", "n\0n").encode(), 2, "holds a NUL"),
        (lambda t: t.replace("nan", "n\0n").encode("utf-16"), 2, "holds a NUL"),
        (lambda t: t.encode("ascii", "ignore") + b"\x81\xff", 3, "neither UTF-8 nor Windows-1252"),
        (lambda t: t.encode("ascii", "ignore") + b"\xff\x01", 3, "neither UTF-8 nor Windows-1252"),
    ],
)
def test_every_reader_refuses_what_is_no_text(tmp_path, caplog, reader, content, line, message):
    line += line > 1 and reader in ("csv", "tsv", "tab")  # their header
    with pytest.raises(ValueError, match=rf"{READERS[reader][0]}:{line} .*{message}"):
        read(tmp_path, reader, content)
    assert not caplog.records


@every_reader
def test_blank_lines_are_no_lines_but_lines_within_a_text_are(tmp_path, reader):
    def spread(text):
        return text.replace("\n", "\n \u3000\t\n\n").encode()

    whole = reader in ("class folder", "tuning", "tuning folder")  # all of the file is the text
    found = [text for text in read(tmp_path, reader, spread) if not whole or text.strip()]
    assert found == TEXTS


@pytest.mark.parametrize("reader", ["jsonl", "input jsonl", "tuning jsonl"])
@pytest.mark.parametrize(
    ("line", "message"),
    [
        (r'{"NAME": "a\ud83d", "label": 1}', r"holds \\ud83d, half of a surrogate pair"),
        (r'{"NAME": "\ude00\ud83d", "label": 1}', r"holds \\ude00, half of a surrogate pair"),
        ('{"NAME": "a"', r"a.*:3 is not JSON"),
        ("[" * 100_000, r"a.*:3 is not JSON"),
        ('["a"]', r"a.*:3 is no JSON object"),
        ('{"NAME": null}', r'a.*:3 has no "(text|prompt)" string'),
    ],
)
def test_json_that_is_no_text(tmp_path, reader, line, message):
    name = "prompt" if reader.startswith("input") else "text"
    bad = line.replace("NAME", name).encode()
    with pytest.raises(ValueError, match=message) as told:
        read(tmp_path, reader, lambda text: text.encode() + b"\r\n" + bad, ["x"])
    assert f"{READERS[reader][0]}:3" in str(told.value)


def test_a_whole_pair_of_surrogates_is_a_character(tmp_path):
    (tmp_path / "a.jsonl").write_text(r'{"text": "\ud83d\ude00 \u0000"}')
    assert text_files.listed(tmp_path / "a.jsonl", "text") == ["😀 \0"]


def test_the_line_of_a_fault_far_into_a_file(tmp_path, monkeypatch):
    """Also where a character, or a line end, lies across two chunks."""
    for chunk in (1, 2, 3, 7):
        monkeypatch.setattr(text_files, "_CHUNK", chunk)
        for codec, wrong in (
            ("utf-8", b"\xff"),
            ("utf-16", b"\x00\xd8\n\x00"),
            ("utf-32", b"\xff" * 4),
        ):
            data = "é\r\n€€\n\n\r\rfive ".encode(codec) + wrong
            with pytest.raises(ValueError, match="bytes:6 is not UTF-"):
                text_files.decode(data, "bytes")
        assert text_files.decode("é\r\n€\r".encode(), "bytes") == "é\n€\n"


def test_a_file_that_changes_while_it_is_in_use_is_named(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("one\nzwölf\n")
    file = text_files.opened(path)
    *_, last = file.lines()
    assert file.read(last.start, last.stop) == "zwölf\n"
    for content in ("one\n", f"a{'ä' * 9}"):
        path.write_text(content)
        with pytest.raises(ValueError, match="a.txt has changed while it was in use"):
            file.read(last.start, last.stop)


def test_what_is_missing_empty_or_a_folder_is_named(tmp_path):
    for path, error, message in (
        (tmp_path / "none", FileNotFoundError, "there is no .*none"),
        (tmp_path, IsADirectoryError, "is a folder, where a text file is wanted"),
    ):
        for reader in (text_files.read, text_files.opened):
            with pytest.raises(error, match=message):
                reader(path)
    for content in (b"", b"\xef\xbb\xbf", b" \r\n\r", "\ufeff\n".encode("utf-16")):
        (tmp_path / "a.txt").write_bytes(content)
        with pytest.raises(ValueError, match="a.txt holds no prompt; write one on each line"):
            text_files.listed(tmp_path / "a.txt", "prompt")
