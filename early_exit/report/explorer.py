"""A section of the page in which one looks into answers: what each exit would have said, and when.

The one idea: the page carries scores, not pictures. Its script compares them with thresholds just
as `policy.first_exit` does, so what moves with a slider is what calibration would find.
"""

from collections.abc import Sequence
from typing import Any

from markupsafe import Markup

from early_exit.report import tokens
from early_exit.storage import files


def shown(found: dict[str, Any], name: str) -> dict[str, Any]:
    """What the template `explorer.html` is given.

    Args:
      found: of `evaluation.explore`.
      name: of the policy that is shown first.

    Raises:
      KeyError, TypeError, ValueError: it is not what that gives.
    """
    depths = found["depths"]
    count = len(depths)
    for answer in found["answers"]:
        pieces = len(answer["pieces"])
        for part in ("said", "scores"):
            if [len(row) for row in answer[part]] != [pieces] * count:
                raise ValueError(f"{part} of an answer are not {count} rows of {pieces} tokens")
    answers = [
        answer
        | {
            "prompt": tokens.printable(answer["prompt"]),
            "pieces": [tokens.printable(piece) for piece in answer["pieces"]],
        }
        for answer in found["answers"]
    ]
    words = {token: tokens.printable(text) for token, text in found["words"].items()}
    return {
        "name": name,
        "confidence": found["confidence"],
        "depths": depths,
        "points": found["speed"]["points"],
        "colours": [_colour(depth, depths) for depth in depths],
        "data": script_json(found | {"answers": answers, "words": words}),
    }


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
