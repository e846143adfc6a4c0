"""Which text each token adds: what streaming prints and what token colouring colours."""

from collections.abc import Iterable
from typing import Any


class Detokenizer:
    """Turns tokens into text as they come; each costs the same, however long the text is."""

    def __init__(self, tokenizer: Any):
        self._tokenizer = tokenizer
        self._ids: list[int] = []
        # Decoding only [context, …) costs the same at any length. [context, start) has been given
        # out already: decoders treat a text's first word differently, so a word stands in front.
        self._context = self._start = 0
        self._before = ""

    def add(self, token_ids: Iterable[int], *, complete: bool = False) -> list[str]:
        """The text that each token adds; joined, they are the text without special tokens.

        A character that spans several tokens belongs to the token that completes it; the tokens
        before it, and special tokens, add "".

        Args:
          complete: whether no token follows. If some may, a character not yet complete is held
            back instead of becoming "�", so what was given out never changes.
        """
        added = []
        text = self._before
        for token in token_ids:
            self._ids.append(int(token))
            text = self._decode()
            if text == self._before or text.endswith("�"):
                added.append("")
                continue
            added.append(text[len(self._before) :])
            self._context, self._start = self._start, len(self._ids)
            self._before = text = self._decode()
        if added and complete:
            added[-1] += text[len(self._before) :]
        return added

    def _decode(self) -> str:
        return self._tokenizer.decode(
            self._ids[self._context :],
            skip_special_tokens=True,
            clean_up_tokenization_spaces=False,
        )


def pieces(tokenizer: Any, token_ids: Iterable[int]) -> list[str]:
    """The text that each token of a whole answer adds."""
    return Detokenizer(tokenizer).add(token_ids, complete=True)
