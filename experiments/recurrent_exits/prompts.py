"""The texts of the study of recurrent exits, in four kinds, as token ids; none was tuned on.

chat       questions in the model's chat template
maths      word problems in it, of templates that were held out
functions  functions of the standard library to be written, of modules that were held out
library    stretches of library source, to be continued
"""

from early_exit.data import sources
from early_exit.runs.assemble import Tuned
from experiments.decoding_speed.prompts import CHAT
from experiments.recurrent_exits.questions import questions

# The first three are answered in the model's own words.
OWN = ("chat", "maths", "functions")
KINDS = (*OWN, "library")
_LENGTH = 128  # tokens of a stretch


def load(tuned: Tuned, count: int) -> dict[str, list[list[int]]]:
    """At most 16 prompts of each kind."""
    asked = {
        "chat": CHAT[:count],
        "maths": questions("maths", count, held_out=True),
        "functions": questions("code", count, held_out=True),
    }
    found = {kind: [tuned.chat(text) for text in texts] for kind, texts in asked.items()}
    return found | {"library": _stretches(tuned, count)}


def _stretches(tuned: Tuned, count: int) -> list[list[int]]:
    found = []
    for _, text in sources.documents("stdlib", "test"):
        tokens = tuned.encode(text)
        if len(tokens) >= 3 * _LENGTH:
            found.append(tokens[_LENGTH : 2 * _LENGTH])
        if len(found) == count:
            break
    return found
