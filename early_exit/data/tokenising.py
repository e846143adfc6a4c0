"""What is asked of a model's tokenizer: that there is one, what ends a text, and text as text.

The one idea: text that is read as data is no markup. Where a document or a user says `<|im_end|>`,
it is letters, and not the token with which a template ends a turn. (Only text that a model made
with its template, `made:FOLDER`, has that token in it.)
"""

import copy
import functools
import hashlib
import re
import sys
from collections.abc import Callable, Sequence
from typing import Any

from early_exit.data import sources

_IN_NO_VOCABULARY = "\U000f0000"  # a private character
# Something of everything that tokenizers treat in ways of their own.
_PROBE = (
    "It's  the 12,345.67th—“naïve” cafe\u0301’s \ttab,\r\n\n   don't_stopNow() += [x**2]; "
    "ÅNGSTRÖM ﬁ Ω 東京タワー नमस्ते العربية 🙂👩‍👩‍👧 \u00a0\u2003 www.example.org/?q=1&b=2 "
)
Encode = Callable[[str], list[int]]
EncodeAll = Callable[[Sequence[str]], list[list[int]]]


def needed(tokenizer: Any) -> Any:
    """The tokenizer.

    Raises:
      ValueError: it is None: the model came without one.
    """
    if tokenizer is None:
        raise ValueError(
            "this model has no tokenizer, so it neither reads nor writes text; put its "
            "tokenizer.json beside the weights"
        )
    return tokenizer


def end_of_text(tokenizer: Any) -> int:
    """The token that ends a document.

    Raises:
      ValueError: there is no tokenizer, or it has no such token.
    """
    return _named(tokenizer, "eos", "which token ends a text")


def padding(tokenizer: Any) -> int:
    """The token that fills rows.

    Raises:
      ValueError: there is no tokenizer, or it has no such token.
    """
    return _named(tokenizer, "pad", "which token fills short rows")


def _named(tokenizer: Any, name: str, what: str) -> int:
    token = getattr(needed(tokenizer), f"{name}_token_id")
    if token is None:
        raise ValueError(
            f"this model does not say {what}; give {name}_token_id in its config.json, or "
            f"{name}_token in its tokenizer_config.json"
        )
    return token


def special_ids(tokenizer: Any) -> set[int]:
    """Tokens that stand for no text."""
    added = tokenizer.added_tokens_decoder.items()
    return {token for token, entry in added if entry.special} | set(tokenizer.all_special_ids)


def encoder(tokenizer: Any, source: str) -> Encode:
    """How the text of a source of documents (`sources.documents`) becomes tokens.

    What the tokenizer puts around every text by itself is around it. Safe to share by threads.

    Raises:
      ValueError: there is no tokenizer.
    """
    needed(tokenizer)
    return tokenizer.encode if source.startswith(sources.MADE) else as_text(tokenizer)


def batch_encoder(tokenizer: Any, source: str) -> EncodeAll:
    """As `encoder`, of many texts at a time, which is faster.

    Raises:
      ValueError: there is no tokenizer.
    """
    encode = encoder(tokenizer, source)
    if isinstance(encode, AsText):
        return encode.all
    return lambda texts: [encode(text) for text in texts]


def fingerprint(tokenizer: Any) -> str:
    """SHA-256 (hex) that differs between tokenizers which make other tokens of the same text.

    It is of the vocabulary, the token that ends a text, and what becomes of a text with something
    of everything; and not of its files, which versions of libraries write in other ways.

    Raises:
      ValueError: there is no tokenizer, or no token that ends a text.
    """
    vocabulary = sorted(needed(tokenizer).get_vocab().items())
    told = [vocabulary, end_of_text(tokenizer), as_text(tokenizer)(_PROBE)]
    return hashlib.sha256(repr(told).encode()).hexdigest()


@functools.lru_cache(maxsize=2)
def as_text(tokenizer: Any) -> "AsText":
    """A tokenizer that takes special tokens in a text for letters."""
    return AsText(tokenizer)


def _unknown(tokenizer: Any) -> set[int]:
    """What letters become that no piece has. (What a tokenizer names `unk_token` may be another
    thing: GPT-2's and SmolLM2's is the end of a text, and theirs know all letters.)"""
    named = getattr(tokenizer.backend_tokenizer.model, "unk_token", None)
    found = set() if named is None else {tokenizer.convert_tokens_to_ids(named)}
    return found.union(tokenizer.encode(_IN_NO_VOCABULARY, add_special_tokens=False))


class AsText:
    """Text → ids, none of which is special but for those that the tokenizer puts around it.

    Attributes:
      marks: ids of special tokens, but for the one that letters become which are not known.
      pattern: finds the names of special tokens in a text.

    It has a tokenizer of its own: how special tokens are treated is a state of it, which threads
    that encode otherwise would change under it.
    """

    def __init__(self, tokenizer: Any):
        self._original = tokenizer
        special = special_ids(tokenizer)
        self.marks = special - _unknown(tokenizer)
        names = {tokenizer.convert_ids_to_tokens(token) for token in special}
        longest_first = sorted(names, key=len, reverse=True)
        self.pattern = re.compile("|".join(map(re.escape, longest_first)) or r"(?!)")

    @functools.cached_property
    def _tokenizer(self) -> Any:
        own = copy.deepcopy(self._original)
        own.split_special_tokens = True
        own.model_max_length = sys.maxsize  # whoever asks cuts rows himself
        return own

    def all(self, texts: Sequence[str]) -> list[list[int]]:
        """The same as of each text alone, without what `transformers` does around each."""
        rules = self._tokenizer.backend_tokenizer
        rules.encode_special_tokens = True
        rules.no_truncation()
        rules.no_padding()
        found = [encoding.ids for encoding in rules.encode_batch_fast(texts)]
        return [
            self(text) if self.pattern.search(text) else ids
            for text, ids in zip(texts, found, strict=True)
        ]

    def __call__(self, text: str, add_special_tokens: bool = True) -> list[int]:
        ids = self._tokenizer.encode(text, add_special_tokens=add_special_tokens)
        if not self.pattern.search(text):
            return ids
        bare = self._tokenizer.encode(text, add_special_tokens=False)
        if not self.marks.intersection(bare):
            return ids
        # In a unigram vocabulary special tokens are pieces like any other; they are found whole
        # unless their letters are apart.
        cuts = [match.start() + 1 for match in self.pattern.finditer(text)]
        edges = zip([0, *cuts], [*cuts, len(text)], strict=True)
        pieces = [text[start:stop] for start, stop in edges if stop > start]
        apart = self._tokenizer(
            pieces, is_split_into_words=True, add_special_tokens=add_special_tokens
        )
        return apart["input_ids"]
