import csv
import json
import os

import pytest

from early_exit.data.text_sets import rows

ROWS = [
    ("Rates rose.\nAgain.", "business"),
    ('He said "no", twice', "sport"),
    ("café\tau lait", "business"),
    ("", "art"),
    ("d", "string"),  # as a header's second line
    ("one line\u2028to JSON", "art"),
    ("nan", "null"),
]
# As tables without quoting can hold them.
UNQUOTED = [(text.replace("\n", " ").replace("\t", " "), label) for text, label in ROWS]


def pairs(part, classes):
    count = len(list(part.identities))
    return [
        (example["text"], classes[example["label"]]) for example in map(part.read, range(count))
    ]


def write_table(path, header=("label", "Text"), extra=()):
    with path.open("w", newline="", encoding="utf-8") as file:
        if path.suffix == ".csv":
            csv.writer(file).writerows([header, *extra, *(row[::-1] for row in ROWS)])
        else:
            lines = [header, *extra, *(row[::-1] for row in UNQUOTED)]
            file.writelines("\t".join(cells) + "\n" for cells in lines)


def write_json(path, rows=ROWS):
    path.write_text(
        "\n\n".join(json.dumps({"text": t, "label": name}, ensure_ascii=False) for t, name in rows)
    )


@pytest.mark.parametrize("name", ["a.csv", "a.tsv", "a.tab", "a.jsonl"])
def test_every_kind_of_file_gives_the_same_rows(tmp_path, name):
    path = tmp_path / name
    (write_json if name == "a.jsonl" else write_table)(path)
    wanted = UNQUOTED if name in ("a.tsv", "a.tab") else ROWS
    classes, train, test = rows(str(path))
    assert classes == ("art", "business", "null", "sport", "string") and test is None
    assert pairs(train, classes) == wanted
    assert list(rows(str(path)).train.identities) == [text.encode() for text, _ in wanted]


@pytest.mark.parametrize(
    "extra", [[("d", "string"), ("class", "")], [("discrete", "s"), ("", "include=True")]]
)
def test_the_two_more_header_lines_of_orange(tmp_path, extra):
    write_table(tmp_path / "a.tab", ("Category", "Text"), extra=extra)
    classes, train, _ = rows(str(tmp_path / "a.tab"))
    assert pairs(train, classes) == UNQUOTED


@pytest.mark.parametrize("suffix", [".tsv", ".tab"])
def test_quotation_marks_are_text_where_tabs_part_cells(tmp_path, caplog, suffix):
    """What swallowed the rows between: one text begins with a mark, a later one ends with one."""
    wanted = [('"begins', "a"), ("between", "b"), ('ends"', "a"), ('"', "b"), ('a ""b""', "a")]
    path = tmp_path / f"a{suffix}"
    path.write_text("text\tlabel\n" + "".join(f"{text}\t{label}\n" for text, label in wanted))
    classes, train, _ = rows(str(path))
    assert pairs(train, classes) == wanted and not caplog.records
    # A tab at the end of every line is one more column, without a name.
    path.write_text(path.read_text().replace("\n", "\t\n"))
    assert pairs(rows(str(path)).train, classes) == wanted
    path.write_text("text\tlabel\nfirst\ta\nsecond\tb\t\n")
    with pytest.raises(ValueError, match=rf"a{suffix}:3 has 3 columns, but the header 2"):
        rows(str(path))


def test_a_table_with_tabs_that_seems_to_be_quoted_is_told(tmp_path, caplog):
    (tmp_path / "a.tsv").write_text('text\tlabel\n"he said ""no"""\ta\nb\t"b"\n')
    classes, train, _ = rows(str(tmp_path / "a.tsv"))
    assert pairs(train, classes) == [('"he said ""no"""', "a"), ("b", '"b"')]
    assert "a.tsv: quotation marks are text here" in caplog.text


def test_cells_of_any_length(tmp_path):
    long, path = "x" * 300_000, tmp_path / "a.csv"
    path.write_text(f'text,label\n{long},a\n"{long},\n{long}",b\n')
    classes, train, _ = rows(str(path))
    assert pairs(train, classes) == [(long, "a"), (f"{long},\n{long}", "b")]


def test_a_quoted_cell_may_hold_lines_and_they_end_as_all_others(tmp_path):
    text = 'Dear Sir,\r\rI said "no",\n\nMother, bye,\r\n'
    with (tmp_path / "a.csv").open("w", newline="") as file:
        csv.writer(file).writerows([("text", "label"), (text, "a"), ("b", "b"), (" ", " ")])
    classes, train, _ = rows(str(tmp_path / "a.csv"))
    assert pairs(train, classes) == [
        (text.replace("\r\n", "\n").replace("\r", "\n"), "a"),
        ("b", "b"),
    ]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        # Never closed.
        ('text,label\nx,a\n"y,b\nz,a\n', "a.csv:3, which goes on to line 4, is no row.*unexpected"),
        # Closed by a mark that opens another cell.
        ('text,label\n"x,a\ny,b\n"z",a\n', "a.csv:2, which goes on to line 4, is no row"),
        # Closed by a text that ends with a mark, in either order of the columns.
        ('text,label\no,a\n"x,a\ny,b\nz",a\n', "a.csv:3: a quotation mark opens .* 3 lines"),
        ('text,label\no,a\n"x,a\nz",a\n', "a.csv:3: a quotation mark opens .* 2 lines"),
        ('label,text\na,o\na,"x\na,y"\n', "a.csv:3: a quotation mark opens .* 2 lines"),
        ('id,label,text\n1,a,o\n2,a,"x\n3,a,y"\n', "a.csv:3: a quotation mark opens .* 2 lines"),
    ],
)
def test_a_quotation_mark_that_swallows_rows_is_named_where_it_opens(tmp_path, content, message):
    (tmp_path / "a.csv").write_text(content)
    with pytest.raises(ValueError, match=message):
        rows(str(tmp_path / "a.csv"))


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
    assert classes == ("art", "business", "null", "sport", "string")
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
    (tmp_path / os.fsdecode(b"caf\xe9")).mkdir()
    with pytest.raises(ValueError, match=r"the name of a folder in .* holds \\udce9, half of a"):
        rows(str(tmp_path))


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", '{"text": "a", "label": 1}\n{"text": "b"', r"a\.jsonl:2 is not JSON"),
        ("a.jsonl", '\n{"txt": "a", "label": 1}\n', r'a\.jsonl:2 has no "text" string'),
        ("a.jsonl", '["a"]\n', r"a\.jsonl:1 is no JSON object"),
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
        ("a.jsonl", '{"text": "a", "label": "\\ud83d"}', r'"label" of .*a\.jsonl:1 holds \\ud83d'),
        ("a.csv", "text,label\n ,\nx,\t\n", r"a\.csv:3 has no label"),
        ("a.xlsx", "PK", r"a\.xlsx is not one of .jsonl, .csv, .tsv, .tab, nor a folder"),
    ],
)
def test_a_bad_row_is_named_by_file_and_line(tmp_path, name, content, message):
    (tmp_path / name).write_text(content)
    with pytest.raises(ValueError, match=message):
        rows(str(tmp_path / name))
