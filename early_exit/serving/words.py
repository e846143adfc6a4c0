"""What an answer's tokens say, as they come, up to where a stop string begins.

The one idea: what was given out never changes. Letters that could begin a stop string are held
back until it is clear that they do not.
"""

from collections.abc import Iterable, Sequence
from typing import Any

from early_exit.decoding.detokenize import Detokenizer


class Words:
    """The text of one answer.

    Attributes:
      stopped: whether a stop string has come; nothing is given out after that.
      pieces: the text of each token so far; beyond what is given out by what is held back.
    """

    def __init__(self, tokenizer: Any, stops: Sequence[str] = ()):
        """
        Args:
          stops: strings that end the text and are left out of it; none of them is empty.
        """
        self.stopped = False
        self.pieces: list[str] = []
        self._detokenizer = Detokenizer(tokenizer)
        self._stops, self._held = tuple(stops), ""

    def add(self, tokens: Iterable[int], *, complete: bool = False) -> str:
        """The text that can be given out after these tokens.

        Args:
          complete: whether no token follows.
        """
        added = self._detokenizer.add(tokens, complete=complete)
        self.pieces += added
        if self.stopped:
            return ""
        text = self._held + "".join(added)
        ends = [text.index(stop) for stop in self._stops if stop in text]
        if ends:
            self.stopped, self._held = True, ""
            return text[: min(ends)]
        held = 0 if complete else max(map(self._begun(text), self._stops), default=0)
        self._held = text[len(text) - held :]
        return text[: len(text) - held]

    @staticmethod
    def _begun(text: str):
        """How many letters at a text's end may be the beginning of a stop string."""

        def begun(stop: str) -> int:
            sizes = range(min(len(stop) - 1, len(text)), 0, -1)
            return next((size for size in sizes if text.endswith(stop[:size])), 0)

        return begun
