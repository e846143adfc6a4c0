import contextlib
import json
import os
import pathlib
import sysconfig

import numpy as np
import pytest

from early_exit.data import conversations, parts, shards, sources


def every_split(source):
    return {split: sources.documents(source, split) for split in sources.SPLITS}


def filled_splits(source):
    found = {}
    for split in sources.SPLITS:
        with contextlib.suppress(ValueError):
            found[split] = sources.documents(str(source), split)
    return found


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
        ('["a"]\n', "rows.jsonl:1 is no JSON object; a row is one"),
        ("[" * 100_000, "rows.jsonl:1 is not JSON: maximum recursion"),
        ('\n{"text": "\\ud83d"}\n', r'"text" of .*rows.jsonl:2 holds \\ud83d, half of a surrog'),
        ('{"text": "a"}\n{"text": "b', "rows.jsonl:2 is not JSON"),
    ],
)
def test_a_bad_row_is_named_by_file_and_line(tmp_path, rows, message):
    (tmp_path / "rows.jsonl").write_text(rows)
    for source in (tmp_path, tmp_path / "rows.jsonl"):
        with pytest.raises(ValueError, match=message):
            sources.documents(str(source), "train")


def test_bad_sources_say_what_is_wrong(tmp_path):
    with pytest.raises(FileNotFoundError, match="no text: there is no /nowhere; give `stdlib`"):
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
    (tmp_path / "a.txt").write_bytes("é\n".encode() + b"caf\xe9")
    with pytest.raises(ValueError, match="a.txt:2 is not UTF-8"):
        list(sources.documents(str(tmp_path), "train"))


def test_a_mistyped_path_is_told_as_all_that_it_may_mean(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    hub = "; if allenai/c4 names a data set of a hub, download it and give its folder"
    for read in (lambda path: sources.documents(path, "train"), parts.locate):
        for path, more in (("allenai/c4", hub), ("books.txt", "")):
            with pytest.raises(FileNotFoundError) as told:
                read(path)
            told = str(told.value).removeprefix("no text: ").partition("; give `stdlib`")[0]
            assert told == f"there is no {path} in {tmp_path}, from where relative paths lead{more}"


def lines_of(rng, count, words=range(2, 25)):
    """Lines of so many numbers, as many as one of `words` says."""
    return [
        f"{' '.join(map(str, rng.integers(10**6, size=rng.choice(words))))}\n" for _ in range(count)
    ]


@pytest.mark.parametrize("place", ["top", "middle", "end"])
@pytest.mark.parametrize("words", [range(2, 25), [1], [3, 900]])
def test_lines_put_anywhere_leave_all_but_one_piece_where_it_was(tmp_path, place, words):
    """So what was tuned on stays out of every other split."""
    rng, file = np.random.default_rng(0), tmp_path / "book.txt"
    size = int(40_000 / np.mean(words))
    lines, added = lines_of(rng, size, words), lines_of(rng, size // 20, words)
    at = {"top": 0, "middle": size // 2, "end": size}[place]

    def texts(lines):
        file.write_text("".join(lines))
        return {name: {text for _, text in docs} for name, docs in filled_splits(file).items()}

    before, after = texts(lines), texts(lines[:at] + added + lines[at:])
    assert sum(len(before[name] - after[name]) for name in before) <= 1
    assert sum(map(len, after.values())) > sum(map(len, before.values())) > 35


def test_pieces_of_equal_lines_have_an_end(tmp_path):
    file = tmp_path / "a.txt"
    file.write_text("the same\n" * 20_000)
    found = [text for docs in filled_splits(file).values() for _, text in docs]
    assert sum(map(len, found)) == 180_000
    assert max(map(len, found)) < sources.LONGEST * sources.PIECE_BYTES + 9


def test_the_mean_piece_is_as_long_as_said(tmp_path):
    rng, file = np.random.default_rng(0), tmp_path / "a.txt"
    for words in ([1], range(2, 25)):
        file.write_text("".join(lines_of(rng, int(60_000 / np.mean(words)), words)))
        sizes = [len(text) for docs in filled_splits(file).values() for _, text in docs]
        # Exponential: the mean of n has a standard error of 1/√n of it.
        assert abs(np.mean(sizes) / sources.PIECE_BYTES - 1) < 5 / len(sizes) ** 0.5


def test_a_file_of_any_line_ends_and_encoding_is_split_alike(tmp_path):
    lines, file, found = "é".join(lines_of(np.random.default_rng(0), 2000)), tmp_path / "a.txt", []
    for end in ("\n", "\r\n", "\r"):
        for codec in ("utf-8", "utf-8-sig", "utf-16", "cp1252"):
            file.write_bytes(lines.replace("\n", end).encode(codec))
            found.append([list(docs) for docs in every_split(str(file)).values()])
    assert all(one == found[0] for one in found)


def test_a_file_name_that_is_no_text(tmp_path):
    (tmp_path / os.fsdecode(b"caf\xe9.txt")).write_text("x")
    with pytest.raises(ValueError, match=r"the name of a file in .* holds \\udce9"):
        sources.documents(str(tmp_path), "train")
