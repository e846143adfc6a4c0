import json
import pathlib
import sysconfig

import pytest

from early_exit.data import conversations, shards, sources


def every_split(source):
    return {split: sources.documents(source, split) for split in sources.SPLITS}


def write_files(folder, count=100):
    for i in range(count):
        (folder / f"{i}.txt").write_text(f"text {i}\n")


def test_splits_of_the_standard_library_are_disjoint_and_cover_it():
    names = [
        {span.name for span in documents.spans} for documents in every_split("stdlib").values()
    ]
    together = set.union(*names)
    assert sum(map(len, names)) == len(together)
    assert {"argparse.py", "json/decoder.py", "asyncio/tasks.py"} <= together
    assert not any("site-packages" in name or name.startswith("test/") for name in together)
    # Within five standard deviations of a binomial with these shares.
    for found, share in zip(names, (0.85, 0.05, 0.05, 0.05), strict=True):
        spread = 5 * (len(together) * share * (1 - share)) ** 0.5
        assert abs(len(found) - share * len(together)) < spread


def test_the_standard_library_reads_as_it_is_on_disk():
    root = pathlib.Path(sysconfig.get_path("stdlib"))
    name, text = sources.documents("stdlib", "validation")[0]
    assert text == (root / name).read_bytes().decode()


def test_a_files_split_depends_on_its_name_alone(tmp_path):
    # `printf %s a.txt | sha256sum` starts 18b7, a tenth of the range, and so on.
    names = {"train": "a.txt", "validation": "8.txt", "calibration": "82.txt", "test": "0.txt"}
    for name in names.values():
        (tmp_path / name).write_text("x")
    for split, name in names.items():
        assert [found for found, _ in sources.documents(str(tmp_path), split)] == [name]


def test_adding_files_moves_no_other(tmp_path):
    write_files(tmp_path, 100)
    before = {split: set(docs) for split, docs in every_split(str(tmp_path)).items()}
    write_files(tmp_path, 150)
    after = {split: set(docs) for split, docs in every_split(str(tmp_path)).items()}
    assert all(before[split] <= after[split] for split in before)


def test_a_folder_takes_text_files_by_relative_name(tmp_path):
    write_files(tmp_path)
    inner = tmp_path / "inner"
    inner.mkdir()
    (inner / "page.md").write_text("# é")
    (inner / "rows.jsonl").write_text('{"text": "one"}\n\n{"text": "two"}\n')
    for ignored in ("image.png", ".hidden.txt", "empty.txt"):
        (tmp_path / ignored).write_text("" if "empty" in ignored else "no")
    found = dict(pair for docs in every_split(str(tmp_path)).values() for pair in docs)
    expected = {f"{i}.txt": f"text {i}\n" for i in range(100)}
    expected |= {"inner/page.md": "# é", "inner/rows.jsonl:1": "one", "inner/rows.jsonl:3": "two"}
    assert found == expected


def test_equal_rows_never_fall_into_two_splits(tmp_path):
    file = tmp_path / "rows.jsonl"
    texts = [f"row {i % 40}" for i in range(200)]
    file.write_text("".join(json.dumps({"text": text, "id": 1}) + "\n" for text in texts))
    splits = [[text for _, text in docs] for docs in every_split(str(file)).values()]
    assert sorted(sum(splits, [])) == sorted(texts)
    assert sum(len(set(split)) for split in splits) == 40


def made_conversations(folder, texts):
    shards.begin(folder, {"kind": conversations.KIND})
    for number, start in enumerate(range(0, len(texts), 30)):
        kept = [conversations.Conversation(text, text, "", 1) for text in texts[start : start + 30]]
        shards.write(folder, number, [c.pack() for c in kept], {"tokens": 30, "dropped": {}})
    return f"made:{folder}"


def test_conversations_are_split_like_rows_of_their_text(tmp_path):
    texts = [f"Why {i}?\nSo." for i in range(200)]
    source = made_conversations(tmp_path / "made", texts)
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    for split, found in every_split(source).items():
        assert [text for _, text in found] == [t for _, t in sources.documents(str(file), split)]
        names = [name for name, _ in found]
        assert names == [f"made:{texts.index(text)}" for _, text in found]
        assert sources.data_hash(found) == sources.data_hash(sources.documents(source, split))


def test_damaged_or_missing_conversations_are_an_error(tmp_path):
    source = made_conversations(tmp_path, ["a question"] * 40)
    path = tmp_path / "00000.array_record"
    path.write_bytes(path.read_bytes()[:-1] + b"x")
    with pytest.raises(ValueError, match="is damaged.*; remove its .json"):
        sources.documents(source, "train")
    with pytest.raises(FileNotFoundError, match="no records in .*none"):
        sources.documents(f"{source}/none", "train")


def test_a_single_text_file_is_cut_at_line_ends_without_loss(tmp_path):
    file = tmp_path / "book.txt"
    text = "".join(f"line {i} " + "é" * (i % 90) + "\n" for i in range(20_000))
    file.write_text(text)
    pieces = [pair for docs in every_split(str(file)).values() for pair in docs]
    pieces.sort(key=lambda pair: int(pair[0].split(":")[1]))
    assert "".join(piece for _, piece in pieces) == text
    assert all(piece.endswith("\n") for _, piece in pieces)


def test_the_hash_sees_names_contents_and_their_border():
    assert sources.data_hash([("a", "b")]) == sources.data_hash([("a", "b")])
    others = [[("a", "c")], [("b", "b")], [("ab", "")], [("a", "b"), ("", "")], []]
    hashes = [sources.data_hash(other) for other in [[("a", "b")], *others]]
    assert len(set(hashes)) == len(hashes)


@pytest.mark.parametrize(
    "rows, message",
    [
        ('{"text": "a"}\n{"txt": "b"}\n', 'rows.jsonl:2 has no "text" string'),
        ('{"text": "a"}\n\n{"text": 3}\n', 'rows.jsonl:3 has no "text" string'),
        ('["a"]\n', 'rows.jsonl:1 has no "text" string'),
        ('{"text": "a"}\n{"text": "b', "rows.jsonl:2 is not JSON"),
    ],
)
def test_a_bad_row_is_named_by_file_and_line(tmp_path, rows, message):
    (tmp_path / "rows.jsonl").write_text(rows)
    for source in (tmp_path, tmp_path / "rows.jsonl"):
        with pytest.raises(ValueError, match=message):
            sources.documents(str(source), "train")


def test_bad_sources_say_what_is_wrong(tmp_path):
    with pytest.raises(FileNotFoundError, match="no text at '/nowhere'; give `stdlib`"):
        sources.documents("/nowhere", "train")
    with pytest.raises(ValueError, match="holds no text; looked for non-empty .txt"):
        sources.documents(str(tmp_path), "train")
    with pytest.raises(ValueError, match="unknown split 'dev'; choose one of train, validation"):
        sources.documents("stdlib", "dev")
    (tmp_path / "image.png").write_text("x")
    with pytest.raises(ValueError, match="image.png is not one of .txt"):
        sources.documents(str(tmp_path / "image.png"), "train")
    (tmp_path / "a.txt").write_text("only one")
    with pytest.raises(ValueError, match="test split of .* is empty: its 1 documents"):
        sources.documents(str(tmp_path), "test")
    (tmp_path / "a.txt").write_bytes(b"caf\xe9")
    with pytest.raises(ValueError, match="a.txt is not UTF-8 text"):
        list(sources.documents(str(tmp_path), "train"))
