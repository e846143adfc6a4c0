"""A model's chat template as token ids: a user's turn, what comes before its words, what ends it.

The one idea: a template is only known by what it renders, so its parts are found by rendering a
turn whose words occur nowhere else.
"""

from typing import Any, NamedTuple

# Stands for a user's words; in no template, and in no vocabulary as a beginning of something else.
_WORDS = "⁂"


class UserTurn(NamedTuple):
    """What stands around the user's words.

    Attributes:
      before: token ids up to where they begin, system message and all.
      end: the token that ends them.
    """

    before: list[int]
    end: int


def prompt(tokenizer: Any, question: str) -> list[int]:
    """Token ids of a user's turn, up to where the answer begins.

    Raises:
      ValueError: the tokenizer has no chat template.
    """
    text = _rendered(tokenizer, question)
    return tokenizer.encode(text, add_special_tokens=False)


def user_turn(tokenizer: Any) -> UserTurn:
    """What stands around the user's words.

    Raises:
      ValueError: no chat template, or one that ends the words with no token of its own, so that
        nobody can tell where they end.
    """
    before, _, after = _rendered(tokenizer, _WORDS).partition(_WORDS)
    ids = tokenizer.encode(after, add_special_tokens=False)
    if not ids or ids[0] not in special_ids(tokenizer):
        raise ValueError(
            "this model's chat template ends a user's words with no token of its own, so the model "
            "cannot be left to write them; give questions in a file"
        )
    return UserTurn(tokenizer.encode(before, add_special_tokens=False), ids[0])


def stop_ids(tokenizer: Any) -> list[int]:
    """Tokens that end an answer: the end of a turn, and the end of a text."""
    ends = {tokenizer.eos_token_id, tokenizer.get_vocab().get("<|endoftext|>")}
    return sorted(ends - {None})


def special_ids(tokenizer: Any) -> set[int]:
    """Tokens that stand for no text."""
    added = tokenizer.added_tokens_decoder.items()
    return {token for token, entry in added if entry.special} | set(tokenizer.all_special_ids)


def _rendered(tokenizer: Any, question: str) -> str:
    if not tokenizer.chat_template:
        raise ValueError("this model has no chat template; give the prompt as plain text")
    turn = [{"role": "user", "content": question}]
    return tokenizer.apply_chat_template(turn, tokenize=False, add_generation_prompt=True)
