import csv
import json

import pytest

from early_exit.data.text_sets import rows

ROWS = [
    ("Rates rose.\nAgain.", "business"),
    ('He said "no", twice', "sport"),
    ("café\tau lait", "business"),
    ("", "art"),
    ("d", "string"),  # as a header's second line
    ("one line\u2028to JSON", "art"),
]


def pairs(part, classes):
    count = len(list(part.identities))
    return [
        (example["text"], classes[example["label"]]) for example in map(part.read, range(count))
    ]


def write_table(path, header=("label", "Text"), rows=ROWS, extra=()):
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, delimiter="," if path.suffix == ".csv" else "\t")
        writer.writerows([header, *extra, *(row[::-1] for row in rows)])


def write_json(path, rows=ROWS):
    path.write_text(
        "\n\n".join(json.dumps({"text": t, "label": name}, ensure_ascii=False) for t, name in rows)
    )


@pytest.mark.parametrize("name", ["a.csv", "a.tsv", "a.tab", "a.jsonl"])
def test_every_kind_of_file_gives_the_same_rows(tmp_path, name):
    path = tmp_path / name
    (write_json if name == "a.jsonl" else write_table)(path)
    classes, train, test = rows(str(path))
    assert classes == ("art", "business", "sport", "string") and test is None
    assert pairs(train, classes) == ROWS
    assert list(rows(str(path)).train.identities) == [text.encode() for text, _ in ROWS]


@pytest.mark.parametrize(
    "extra", [[("d", "string"), ("class", "")], [("discrete", "s"), ("", "include=True")]]
)
def test_the_two_more_header_lines_of_orange(tmp_path, extra):
    write_table(tmp_path / "a.tab", ("Category", "Text"), extra=extra)
    classes, train, _ = rows(str(tmp_path / "a.tab"))
    assert pairs(train, classes) == ROWS


def test_columns_go_by_name_and_others_are_left_alone(tmp_path):
    (tmp_path / "a.csv").write_text("id,CLASS , text\n1, b ,x\n\n2,a,y\n")
    classes, train, _ = rows(str(tmp_path / "a.csv"))
    assert pairs(train, classes) == [("x", "b"), ("y", "a")]


def test_numbers_sort_by_value(tmp_path):
    write_json(tmp_path / "a.jsonl", [("x", label) for label in (10, 9, 2, 10)])
    classes, train, _ = rows(str(tmp_path / "a.jsonl"))
    assert classes == ("2", "9", "10")
    assert [train.read(i)["label"] for i in range(4)] == [2, 1, 0, 2]


def test_a_test_file_beside_a_train_file(tmp_path):
    write_json(tmp_path / "news-train.jsonl", ROWS[:3])
    assert rows(str(tmp_path / "news-train.jsonl")).test is None
    write_json(tmp_path / "news-test.jsonl", ROWS[3:])
    classes, train, test = rows(str(tmp_path / "news-train.jsonl"))
    assert classes == ("art", "business", "sport", "string")
    assert (pairs(train, classes), pairs(test, classes)) == (ROWS[:3], ROWS[3:])
    classes, train, _ = rows(str(tmp_path / "news-test.jsonl"))
    assert pairs(train, classes) == ROWS[3:]


def test_a_folder_a_class_and_old_encodings(tmp_path):
    contents = {"b/1.txt": "£5".encode("cp1252"), "a/2.txt": "\ufeffé".encode(), "a/1.txt": b"x"}
    for name, content in contents.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(content)
    classes, train, test = rows(str(tmp_path))
    assert pairs(train, classes) == [("x", "a"), ("é", "a"), ("£5", "b")] and test is None
    (tmp_path / "a" / "3.txt").write_bytes(b"\x81\xff")
    with pytest.raises(ValueError, match=r"3\.txt is neither UTF-8 nor Windows-1252 text"):
        rows(str(tmp_path))


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", '{"text": "a", "label": 1}\n{"text": "b"', r"a\.jsonl:2 is not JSON"),
        ("a.jsonl", '\n{"txt": "a", "label": 1}\n', r'a\.jsonl:2 has no "text" string'),
        ("a.jsonl", '["a"]\n', r'a\.jsonl:1 has no "text" string'),
        ("a.jsonl", '{"text": "a"}\n', r'a\.jsonl:1 has no "label" that is a string or a whole'),
        ("a.jsonl", '{"text": "a", "label": true}\n', r'a\.jsonl:1 has no "label"'),
        ("a.jsonl", '{"text": "a", "label": ""}\n', r'a\.jsonl:1 has no "label"'),
        ("a.jsonl", "\n", "a.jsonl holds no rows"),
        ("a.csv", "text,label\n", "a.csv holds no rows"),
        ("a.csv", "", "a.csv: the header needs a column `text` and one `label`.*; it has nothing"),
        ("a.csv", "text,topic\nx,a\n", "a.csv: the header needs .*; it has text, topic"),
        ("a.csv", "text,label\nx,a\ny\n", r"a\.csv:3 has 1 columns, but the header 2"),
        ("a.csv", "text,Category\nx,\n", r"a\.csv:2 has no Category"),
        ("a.csv", 'text,label\n"x"y,a\n', r"a\.csv:2 is no row of a table: ',' expected after"),
        ("a.csv", f"text,label\n{'x' * 200_000},a\n", r"a\.csv:2 is no row .*field larger than"),
        ("a.xlsx", "PK", r"a\.xlsx is not one of .jsonl, .csv, .tsv, .tab, nor a folder"),
    ],
)
def test_a_bad_row_is_named_by_file_and_line(tmp_path, name, content, message):
    (tmp_path / name).write_text(content)
    with pytest.raises(ValueError, match=message):
        rows(str(tmp_path / name))
