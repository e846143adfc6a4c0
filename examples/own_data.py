"""Data sources of one's own, for every call and every command: texts, and labelled examples.

python examples/own_data.py tests/fixtures/tiny_chat
"""

import sqlite3
import sys

import early_exit as ee


def rows_of_sqlite(rest: str) -> list[str]:
    """`sqlite:FILE` → the texts of its table `documents`, in a fixed order."""
    with sqlite3.connect(rest) as connection:
        return [text for (text,) in connection.execute("SELECT text FROM documents ORDER BY rowid")]


def parity(rest: str) -> tuple[tuple[str, ...], list[dict]]:
    """`parity:N` → (the classes, N labelled texts); a label is the number of its class."""
    return ("even", "odd"), [{"text": f"{n}", "label": n % 2} for n in range(int(rest))]


ee.register.texts("sqlite", rows_of_sqlite)
ee.register.examples("parity", parity)


def main(source, file=":memory:"):
    with sqlite3.connect(file) as connection:
        connection.execute("CREATE TABLE IF NOT EXISTS documents (text)")
        rows = [(f"Document {n}. " + ee.__doc__,) for n in range(80)]
        connection.executemany("INSERT INTO documents VALUES (?)", rows)
    model = ee.attach(ee.load(source), ee.ExitConfig((2, 4), head="norm"))
    data = f"sqlite:{file}"  # split four ways, by what each text holds
    model = ee.tune(model, data, steps=20, batch_size=2, sequence_length=64)
    model = ee.calibrate(model, data, epsilon=0.8, batch_size=2, sequence_length=64)
    print(f"leave early: {model.policy.provenance['coverage']:.1%}")


if __name__ == "__main__":
    main(*sys.argv[1:])
