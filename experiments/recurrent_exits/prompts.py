"""The texts of the study of recurrent exits, as token ids; none was tuned on.

chat       questions in the model's chat template
maths      word problems in it, of templates that were held out
functions  functions of the standard library to be written, of modules that were held out
library    stretches of library source, to be continued

And of each folder of answers that the run was tuned on, questions that were held out: they are like
those that it was tuned on, and the others are not.
"""

import itertools
from pathlib import Path

from early_exit.data import conversations, shards, sources
from early_exit.runs.assemble import Tuned
from experiments.decoding_speed.prompts import CHAT
from experiments.recurrent_exits.questions import questions

# The first three are answered in the model's own words.
OWN = ("chat", "maths", "functions")
# Before the name of a folder of answers.
LIKE = "like "
_LENGTH = 128  # tokens of a stretch


def load(tuned: Tuned, count: int) -> dict[str, list[list[int]]]:
    """At most so many prompts of each kind, and at most 16 of `chat`."""
    asked = {
        "chat": CHAT[:count],
        "maths": questions("maths", count, held_out=True),
        "functions": questions("code", count, held_out=True),
        **_like_tuned_on(tuned.config.data.source, count),
    }
    found = {kind: [tuned.chat(text) for text in texts] for kind, texts in asked.items()}
    return found | {"library": _stretches(tuned, count)}


def _like_tuned_on(source: str, count: int) -> dict[str, list[str]]:
    if not source.startswith(sources.MADE):
        return {}
    found = {}
    for folder in map(Path, source.removeprefix(sources.MADE).split(",")):
        held_out = (
            conversation.prompt
            for _, conversation in conversations.conversations(shards.Store(folder))
            if sources.split_of(conversation.text.encode()) == "test"
        )
        found[f"{LIKE}{folder.name}"] = list(itertools.islice(held_out, count))
    return found


def _stretches(tuned: Tuned, count: int) -> list[list[int]]:
    found = []
    for _, text in sources.documents("stdlib", "test"):
        tokens = tuned.encode(text)
        if len(tokens) >= 3 * _LENGTH:
            found.append(tokens[_LENGTH : 2 * _LENGTH])
        if len(found) == count:
            break
    return found
