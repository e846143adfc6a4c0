"""A model's chat template as token ids: a user's turn, what comes before its words, what ends it.

The one idea: a template is only known by what it renders, so its parts are found by rendering a
turn whose words occur nowhere else. Its tokens are the template's alone: where a user's words spell
one, they are letters.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jinja2

from early_exit.data import tokenising

# Stands for somebody's words; in no template, and in no vocabulary as the beginning of a token.
_WORDS = "⁂"
# The first of the private characters that stand for special tokens which a user's words spell.
_PRIVATE = 0xF0000
# What a template raises: by itself, or by a slip in an expression.
_FAILURES = (jinja2.TemplateError, TypeError, AttributeError, LookupError, ArithmeticError)


Turn = dict[str, str]


class UserTurn(NamedTuple):
    """What stands around the user's words.

    Attributes:
      before: token ids up to where they begin, system message and all.
      end: the token that ends them.
    """

    before: list[int]
    end: int


def prompt(tokenizer: Any, question: str | Sequence[Turn]) -> list[int]:
    """Token ids of a user's turn, or of a conversation, up to where the answer begins.

    No special token comes from anybody's words.

    Args:
      question: the user's words; or turns, each with its `role` and its `content`.

    Raises:
      ValueError: there is no tokenizer, no chat template, or one that fails.
    """
    turns = [{"role": "user", "content": question}] if isinstance(question, str) else question
    words = "".join(turn["content"] for turn in turns)
    as_text = tokenising.as_text(tokenising.needed(tokenizer))
    unused = (chr(c) for c in range(_PRIVATE, _PRIVATE + 0xFFFD) if chr(c) not in words)
    stand_in = dict(zip(dict.fromkeys(as_text.pattern.findall(words)), unused, strict=False))
    hidden = [
        turn | {"content": as_text.pattern.sub(lambda name: stand_in[name[0]], turn["content"])}
        for turn in turns
    ]
    text = _apply(tokenizer, hidden, add_generation_prompt=True)
    if not stand_in:
        return tokenizer.encode(text, add_special_tokens=False)
    spelt = {ord(private): name for name, private in stand_in.items()}
    encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    found: list[int] = []
    between: list[int] = []  # tokens since the last special one
    start = 0  # where it ended
    for token, (begin, end) in zip(encoded["input_ids"], encoded["offset_mapping"], strict=True):
        if token not in as_text.marks:
            between.append(token)
            continue
        found += [*_restored(as_text, between, text[start:begin], spelt), token]
        between, start = [], end
    return found + _restored(as_text, between, text[start:], spelt)


def _restored(as_text: tokenising.AsText, tokens: list[int], text: str, spelt: dict) -> list[int]:
    """A stretch's tokens, with what stands for special ones put back as letters."""
    words = text.translate(spelt)
    return tokens if words == text else as_text(words, add_special_tokens=False)


def user_turn(tokenizer: Any) -> UserTurn:
    """What stands around the user's words.

    Raises:
      ValueError: no chat template, one that fails, or one that ends the words with no token of its
        own, so that nobody can tell where they end.
    """
    turn = {"role": "user", "content": _WORDS}
    before, _, after = _apply(tokenizer, [turn], add_generation_prompt=True).partition(_WORDS)
    ids = tokenizer.encode(after, add_special_tokens=False)
    if not ids or ids[0] not in tokenising.special_ids(tokenizer):
        raise ValueError(
            "this model's chat template ends a user's words with no token of its own, so the model "
            "cannot be left to write them; give questions in a file"
        )
    return UserTurn(tokenizer.encode(before, add_special_tokens=False), ids[0])


def end_of_answer(tokenizer: Any) -> int | None:
    """The token with which the template ends an answer; None if it has none, or does not work."""
    turns = [{"role": "user", "content": "?"}, {"role": "assistant", "content": _WORDS}]
    try:
        *before, after = _apply(tokenizer, turns, add_generation_prompt=False).split(_WORDS)
    except ValueError:
        return None
    ids = tokenizer.encode(after.lstrip(), add_special_tokens=False)
    return ids[0] if before and ids and ids[0] in tokenising.special_ids(tokenizer) else None


def _apply(tokenizer: Any, turns: Sequence[Turn], add_generation_prompt: bool) -> str:
    if not tokenizer.chat_template:
        raise ValueError("this model has no chat template; give the prompt as plain text (--raw)")
    try:
        return tokenizer.apply_chat_template(
            turns, tokenize=False, add_generation_prompt=add_generation_prompt
        )
    except _FAILURES as error:
        raise ValueError(
            f"the model's chat template fails ({type(error).__name__}: {error}); mend "
            "chat_template in its tokenizer_config.json (or chat_template.jinja), or give the "
            "prompt as plain text (--raw)"
        ) from error
