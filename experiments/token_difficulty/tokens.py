"""What a token is, and what is known of its place before it is computed.

The one idea: the two are kept apart. `described` tells of the token itself, and may look at it;
`before` tells what a gate could know without any block being run, and looks at earlier text alone.
"""

from collections.abc import Callable, Sequence

import numpy as np

KINDS = ("word", "inside a word", "number", "punctuation", "white space", "end or other")
WORD, INSIDE, NUMBER, PUNCTUATION, SPACE, OTHER = range(len(KINDS))
# Of how many tokens the latest ones are looked for in earlier text, at most.
LONGEST = 8

# What one knows before a token is computed, in the order of `before`'s columns.
BEFORE = (
    *(f"after: {kind}" for kind in KINDS),
    "tokens of the word so far",
    "log tokens of the line so far",
    "log tokens of the text so far",
    "log rank of the last token",
    "latest tokens that were there before",
    "last token was there before",
)

Decode = Callable[[Sequence[int]], str]


class Pieces:
    """Kinds of tokens and of the places behind them, by the text of each.

    Args:
      decode: token ids → text.
      special: ids that end a text or steer a chat.
    """

    def __init__(self, decode: Decode, special: Sequence[int]):
        self._decode, self._special = decode, set(special)
        self._known: dict[int, str] = {}

    def text(self, token: int) -> str:
        """The token's text; empty for a special one."""
        if token not in self._known:
            self._known[token] = "" if token in self._special else self._decode([token])
        return self._known[token]

    def kind(self, token: int, in_word: bool) -> int:
        """An index into `KINDS`, of a token where a word may go on."""
        text = self.text(token)
        bare = text.strip()
        if not text or "\N{REPLACEMENT CHARACTER}" in text:
            return OTHER
        if not bare:
            return SPACE
        if bare[0].isdigit():
            return NUMBER
        if bare[0].isalpha():
            return INSIDE if in_word and text[0].isalpha() else WORD
        return PUNCTUATION


class Place:
    """The end of a text that grows: what is known before its next token.

    Args:
      pieces: of the text's tokens.
      tokens: how many there may be, in all.
    """

    def __init__(self, pieces: Pieces, tokens: int):
        self._pieces = pieces
        self._tokens = np.zeros(tokens, np.int64)
        # How many tokens up to each earlier one are the latest ones.
        self._alike = np.zeros(tokens, np.int64)
        self._count = 0
        self._kind = OTHER
        self.of_word = self.of_line = 0

    @property
    def in_word(self) -> bool:
        return self.of_word > 0

    def add(self, token: int) -> None:
        earlier = self._tokens[: self._count]
        before = np.concatenate([[0], self._alike[: max(self._count - 1, 0)]])[: self._count]
        self._alike[: self._count] = np.where(earlier == token, before + 1, 0)
        self._kind = self._pieces.kind(token, self.in_word)
        text = self._pieces.text(token)
        if not text[-1:].isalpha():
            self.of_word = 0
        else:
            self.of_word = self.of_word + 1 if self._kind == INSIDE else 1
        self.of_line = 0 if "\n" in text else self.of_line + 1
        self._tokens[self._count] = token
        self._count += 1

    def seen(self, token: int, since: int = 0) -> bool:
        """Whether this token is in the text, from the token `since` on."""
        return bool((self._tokens[since : self._count] == token).any())

    def known(self) -> np.ndarray:
        """float64 [len(BEFORE)]."""
        last = self._tokens[self._count - 1]
        alike = self._alike[: self._count - 1]
        row = np.zeros(len(BEFORE))
        row[self._kind] = 1
        row[len(KINDS) :] = (
            self.of_word,
            np.log1p(self.of_line),
            np.log1p(self._count),
            np.log1p(last),
            min(alike.max(initial=0), LONGEST),
            (alike > 0).any(),
        )
        return row


def described(
    tokens: Sequence[int], first: int, said: Sequence[int], pieces: Pieces, begin: int
) -> dict[str, np.ndarray]:
    """What is said at each position of a text from the token `first` on.

    Args:
      tokens: the text.
      first: of the positions, the token that is said in place of tokens[first]; at least 1.
      said: the full model's tokens in place of tokens[first], tokens[first + 1], …, each after the
        text before it.
      begin: where the answer, or the text, begins: before it, nothing counts as said.

    Returns:
      int [n] each: `kind`; `in_word`, `in_line`, `in_text`, how many tokens of its word, its line
      and the answer stand before it; `rank`, its id: tokenizers learn frequent tokens first;
      `repeated`, whether it was said before. And `before` float64 [n, len(BEFORE)].
    """
    place, rows, before = Place(pieces, len(tokens)), [], []
    for token in tokens[:first]:
        place.add(token)
    for i, token in enumerate(said):
        at = first + i
        kind = pieces.kind(token, place.in_word)
        in_word = place.of_word if kind == INSIDE else 0
        rows.append((kind, in_word, place.of_line, at - begin, token, place.seen(token, begin)))
        before.append(place.known())
        place.add(tokens[at])
    names = ("kind", "in_word", "in_line", "in_text", "rank", "repeated")
    found = dict(zip(names, np.array(rows, np.int64).T, strict=True))
    return found | {"before": np.array(before)}
