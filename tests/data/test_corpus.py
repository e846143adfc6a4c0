"""Parts of text: whatever their size, and wherever they are cut, they hold the same documents."""

import gzip
import json
import pathlib
import pickle

import pytest

from early_exit.data import corpus, sources

pyarrow = pytest.importorskip("pyarrow")
parquet = pytest.importorskip("pyarrow.parquet")

TEXTS = [f"Text {i}: {'é and so on, ' * (i % 7)}\nend" for i in range(60)]


def lines(texts, **more):
    return "".join(json.dumps({"text": text, **more}) + "\n" for text in texts).encode()


def zstd(data):
    return pyarrow.Codec("zstd").compress(data, asbytes=True)


@pytest.fixture
def folder(tmp_path):
    """Every kind of file, two levels deep, beside others that are no text."""
    inner = tmp_path / "inner"
    inner.mkdir()
    (tmp_path / "a.txt").write_text("a text\r\nof two lines")
    (inner / "page.md").write_bytes("caf\xe9".encode("cp1252"))
    (tmp_path / "rows.jsonl").write_bytes(b"\xef\xbb\xbf" + lines(TEXTS[:20]) + b"\r\n \n")
    (inner / "rows.jsonl.gz").write_bytes(gzip.compress(lines(TEXTS[20:30])))
    with pyarrow.CompressedOutputStream(str(tmp_path / "rows.jsonl.zst"), "zstd") as file:
        file.write(lines(TEXTS[30:40]))
    table = pyarrow.table({"id": range(20), "text": [*TEXTS[40:50], None, *TEXTS[51:60]]})
    parquet.write_table(table, inner / "rows.parquet", row_group_size=6)
    for ignored in (".hidden.txt", "image.png", "empty.txt"):
        (tmp_path / ignored).write_text("" if "empty" in ignored else "no")
    return tmp_path


def read(found):
    return [document for part in found for document in part.documents()]


@pytest.mark.parametrize("part_bytes", [1, 50, 333, 1000, 1 << 30])
def test_parts_of_any_size_hold_the_same_documents(folder, part_bytes):
    found = corpus.parts(str(folder), part_bytes=part_bytes)
    documents = read(pickle.loads(pickle.dumps(found)))
    texts = [document.text for document in documents]
    # By the names of the files, component by component.
    inner = [*TEXTS[20:30], *TEXTS[40:50], *TEXTS[51:60]]
    assert texts == ["a text\nof two lines", "caf\xe9", *inner, *TEXTS[:20], *TEXTS[30:40]]
    assert len({document.name for document in documents}) == len(documents)
    assert len(found) == 1 if part_bytes == 1 << 30 else len(found) > 2


@pytest.mark.parametrize("suffix", [".txt", ".jsonl"])
def test_documents_and_their_splits_are_those_of_small_runs(tmp_path, suffix):
    for i, text in enumerate(TEXTS):
        content = text if suffix == ".txt" else lines([text, f"{text}!"]).decode()
        (tmp_path / f"{i % 3}-{i}{suffix}").write_text(content)
    found = read(corpus.parts(str(tmp_path), part_bytes=100))
    for split in sources.SPLITS:
        texts = [text for _, text in sources.documents(str(tmp_path), split)]
        assert [d.text for d in found if sources.split_of(d.identity) == split] == texts


def test_what_the_parts_are_does_not_follow_from_where_they_lie(folder, tmp_path_factory):
    moved = tmp_path_factory.mktemp("elsewhere") / "copy"
    before = corpus.identity(corpus.parts(str(folder)))
    folder.rename(moved)
    assert corpus.identity(corpus.parts(str(moved))) == before
    (moved / "new.txt").write_text("more")
    assert corpus.identity(corpus.parts(str(moved))) != before


@pytest.mark.parametrize(
    ("pattern", "names"),
    [
        ("*.jsonl", {"rows.jsonl"}),
        ("inner/*", {"page.md", "rows.jsonl.gz", "rows.parquet"}),
        ("**/*.jsonl*", {"rows.jsonl", "rows.jsonl.zst", "inner/rows.jsonl.gz"}),
        ("rows.jsonl", {"rows.jsonl"}),
        ("inner/rows.parquet", {"rows.parquet"}),
    ],
)
def test_globs_and_single_files(folder, pattern, names, monkeypatch):
    monkeypatch.chdir(folder)
    for source in (pattern, f"{folder}/{pattern}", f"file://{folder}/{pattern}"):
        found = corpus.parts(source)
        assert {section.name for part in found for section in part.sections} == names


def test_what_small_runs_read_can_be_packed_as_well(tmp_path):
    book = tmp_path / "book.txt"
    book.write_text("".join(f"line {i}, and so on\n" for i in range(9000)))
    (whole,) = corpus.parts(str(book))
    documents = list(whole.documents())
    assert len(documents) > 5 and "".join(d.text for d in documents) == book.read_text()
    assert next(corpus.parts("stdlib")[0].documents()).name.endswith(".py")


def test_memory_is_that_of_a_line(tmp_path):
    """A compressed file, too, is never whole in memory."""
    import tracemalloc

    path = tmp_path / "rows.jsonl.gz"
    with gzip.open(path, "wb", compresslevel=1) as file:
        for i in range(64):
            file.write(lines([f"{i}" * (1 << 19)]))
    (part,) = corpus.parts(str(path))
    tracemalloc.start()
    assert sum(1 for _ in part.documents()) == 64
    assert tracemalloc.get_traced_memory()[1] < 16 << 20
    tracemalloc.stop()


def damaged(path, data):
    path.write_bytes(data)
    return str(path)


@pytest.mark.parametrize(
    ("name", "data", "message"),
    [
        ("a.jsonl", b'{"text": "x"}\n{"text"\n', r"the line at byte 14 of .*a\.jsonl is not JSON"),
        ("a.jsonl", b'{"text": "\xff"}\n', r"the line at byte 0 of .*a\.jsonl is not UTF-8"),
        ("a.jsonl", lines(["x"], body=1).replace(b"text", b"x"), 'has no "text" string'),
        ("a.jsonl.gz", gzip.compress(lines(TEXTS))[:-9], r"a\.jsonl\.gz is damaged, or cut short"),
        ("a.jsonl.gz", b"no gzip", "is damaged, or cut short"),
        ("a.jsonl.zst", b"no zstd at all", "is damaged, or cut short"),
        ("a.parquet", b"no parquet at all", r"a\.parquet is damaged, or no Parquet file"),
        ("a.txt", b"\x00\x01", r"a\.txt:1 holds a NUL"),
    ],
)
def test_what_is_no_text_is_named_by_file_and_place(tmp_path, name, data, message):
    damaged(tmp_path / name, data)
    with pytest.raises(ValueError, match=message):
        read(corpus.parts(str(tmp_path)))


def test_a_zstd_file_that_is_cut_short_is_told(tmp_path):
    path = tmp_path / "a.jsonl.zst"
    with pyarrow.CompressedOutputStream(str(path), "zstd") as file:
        file.write(lines(TEXTS * 50))
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(ValueError, match=r"a\.jsonl\.zst is damaged, or cut short"):
        read(corpus.parts(str(tmp_path)))


def test_parquet_without_texts_is_refused_before_a_row_is_read(tmp_path, folder):
    path = tmp_path / "inner/rows.parquet"
    with pytest.raises(ValueError, match="has no column 'body', only id, text; name the one with"):
        corpus.parts(str(path), field="body")
    with pytest.raises(ValueError, match="column 'id' of .* holds int64, and not texts"):
        corpus.parts(str(path), field="id")
    nested = pyarrow.table({"a": [{"b": 1}], "text": pyarrow.array(["x"]).dictionary_encode()})
    parquet.write_table(nested, tmp_path / "nested.parquet")
    assert [d.text for d in read(corpus.parts(str(tmp_path / "nested.parquet")))] == ["x"]


@pytest.mark.parametrize(
    ("source", "error", "message"),
    [
        ("", ValueError, "holds no text; looked for non-empty .txt"),
        ("/*.jsonl", ValueError, "holds no text"),
        ("/none", FileNotFoundError, "no text: there is no"),
        ("/image.png", ValueError, "is not one of"),
    ],
)
def test_nothing_to_read(tmp_path, source, error, message):
    (tmp_path / "image.png").write_text("no")
    with pytest.raises(error, match=message):
        corpus.parts(f"{tmp_path}{source}")
    with pytest.raises(FileNotFoundError, match="no text: there is no file:///none"):
        corpus.parts("file:///none")
    with pytest.raises(ValueError, match="a part has at least 1 byte, not 0"):
        corpus.parts(str(pathlib.Path(tmp_path)), part_bytes=0)
