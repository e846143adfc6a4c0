"""A section of the page in which one looks into answers: what each exit says, and who leaves when.

The one idea: the page carries scores, and its script compares them with thresholds just as
`policy.first_exit` does, so what moves with a slider is what calibration would find.
"""

import re
from collections.abc import Sequence
from typing import Any

from markupsafe import Markup

from early_exit.report import tokens
from early_exit.storage import files


def shown(found: dict[str, Any], name: str) -> dict[str, Any]:
    """What the templates `explorer_tokens.html` and `explorer_examples.html` are given.

    Args:
      found: of `evaluation.explore`.
      name: of the policy that is shown first.

    Raises:
      KeyError, TypeError, ValueError: it is not what that gives.
    """
    depths, answers = found["depths"], found["answers"]
    for answer in answers:
        _check(answer, len(depths), found.get("pictures", False))
    kept = [
        answer | {key: _printable(answer[key]) for key in _TEXTS if key in answer}
        for answer in answers
    ]
    words = {token: tokens.printable(text) for token, text in found["words"].items()}
    return {
        "name": name,
        "confidence": found["confidence"],
        "depths": depths,
        "points": found["speed"]["points"],
        "count": len(answers[0]["pieces"]),
        "colours": [_colour(depth, depths) for depth in depths],
        "data": script_json(found | {"answers": kept, "words": words}),
    }


_TEXTS = ("prompt", "pieces")
_PICTURE = re.compile(r"data:image/(png|jpeg);base64,[A-Za-z0-9+/=]+")


def _printable(texts: str | Sequence[str]) -> str | list[str]:
    if isinstance(texts, str):
        return tokens.printable(texts)
    return list(map(tokens.printable, texts))


def _check(answer: dict[str, Any], exits: int, pictures: bool) -> None:
    pieces = len(answer["pieces"])
    for part in ("said", "scores"):
        if [len(row) for row in answer[part]] != [pieces] * exits:
            raise ValueError(f"{part} of an answer are not {exits} rows of {pieces} pieces")
    if pictures and not all(map(_PICTURE.fullmatch, answer["pieces"])):
        raise ValueError("a picture to look into is not one that stands in the page")


def script_json(value: Any) -> Markup:
    """JSON that may stand in a `<script>`: nothing in it can end that, or begin a comment."""
    text = files.json_text(value, separators=(",", ":"))
    for letter in "<>&":
        text = text.replace(letter, f"\\u{ord(letter):04x}")
    return Markup(text)


def _colour(depth: int, depths: Sequence[int]) -> dict[str, str]:
    behind = tokens.background(depth, depths)
    return {
        "behind": tokens.hex_colour(behind),
        "letters": tokens.hex_colour(tokens.foreground(behind)),
    }
