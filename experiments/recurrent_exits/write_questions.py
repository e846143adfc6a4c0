"""Writes questions for `launch.distill` to have answered.

    python -m experiments.recurrent_exits.write_questions --kind=maths --output=data/maths.jsonl
    python -m launch.distill --config=configs/smollm2_recurrent.py --input=data/maths.jsonl \\
        --temperature=0 --made=data/maths
"""

from pathlib import Path

from absl import app, flags

from early_exit.storage import files
from experiments.recurrent_exits.questions import KINDS, questions

KIND = flags.DEFINE_enum("kind", None, KINDS, "Which questions.", required=True)
OUTPUT = flags.DEFINE_string("output", None, "JSONL file for them.", required=True)
COUNT = flags.DEFINE_integer("count", 2000, "How many, at most.", lower_bound=1)
HELD = flags.DEFINE_bool("held_out", False, "Those to measure with.")


def main(argv):
    del argv
    found = questions(KIND.value, COUNT.value, held_out=HELD.value)
    path = Path(OUTPUT.value)
    path.parent.mkdir(parents=True, exist_ok=True)
    with files.replacing(path) as partial, partial.open("w", encoding="utf-8") as file:
        for question in found:
            file.write(files.json_text({"prompt": question}, ensure_ascii=False) + "\n")
    print(f"{len(found)} questions in {path}")


if __name__ == "__main__":
    app.run(main)
