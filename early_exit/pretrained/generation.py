"""How a checkpoint's makers want it to write: above all, which tokens end an answer.

The one idea: a checkpoint says it in up to five places, none of which is always there, and any of
them may hold what the others lack. So all of them count: `generation_config.json`, `config.json`
(a GGUF file's keys are told as such a one), the tokenizer, the chat template, and the name that
GPT-2's vocabulary and its children give to the end of a text.
"""

import dataclasses
import pathlib
from collections.abc import Mapping
from typing import Any

from early_exit.data import tokenising
from early_exit.pretrained import chat
from early_exit.storage import files

FILE = "generation_config.json"
_END_OF_TEXT = "<|endoftext|>"


@dataclasses.dataclass(frozen=True)
class Generation:
    """How a model is to write.

    Attributes:
      stop_ids: tokens that end an answer, rising.
      stored: all that `generation_config.json` says, which goes out again with the model.
    """

    stop_ids: tuple[int, ...] = ()
    stored: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    def as_json(self) -> dict[str, Any]:
        """What `generation_config.json` is to say."""
        ends = list(self.stop_ids)
        own = {"eos_token_id": ends[0] if len(ends) == 1 else ends} if ends else {}
        return {**self.stored, **own}


# Of a model that nobody has told how to write.
SILENT = Generation()


def read(
    path: pathlib.Path, config: Mapping[str, Any], tokenizer: Any, vocab_size: int
) -> Generation:
    """What a checkpoint says, in all places.

    Args:
      path: its folder or file.
      config: its `config.json`.
      tokenizer: None if it has none.
      vocab_size: rows of its embedding table; 0 for a network without one.

    Raises:
      ValueError: a file that is no JSON object, or a token that is none of the vocabulary's; the
        place is named.
    """
    stored = stored_in(path)
    places = {f"{path / FILE}": stored, f"the config of {path}": config}
    ends = {
        token
        for place, entries in places.items()
        for token in token_ids(entries, "eos", place, vocab_size)
    }
    if tokenizer is not None:
        special = tokenising.special_ids(tokenizer)
        ends |= {tokenizer.eos_token_id} - {None}
        ends |= {tokenizer.get_vocab().get(_END_OF_TEXT)} & special
        if tokenizer.chat_template:
            ends |= {chat.end_of_answer(tokenizer)} - {None}
    return Generation(tuple(sorted(ends)), stored)


def stored_in(path: pathlib.Path) -> dict[str, Any]:
    """The content of `generation_config.json`; empty if there is none."""
    file = path / FILE
    return files.read_json(file) if file.exists() else {}


def token_ids(
    entries: Mapping[str, Any], name: str, place: str, vocab_size: int | None = None
) -> list[int]:
    """The tokens that an entry such as `eos_token_id` names: a number, or several.

    Args:
      name: `bos`, `eos` or `pad`.
      place: where the entries stand, for messages.
      vocab_size: what the numbers lie below; 0 or None if that is not known.

    Raises:
      ValueError: it names something else.
    """
    value = entries.get(f"{name}_token_id")
    found = value if isinstance(value, list) else [value]
    found = [token for token in found if token is not None]
    wrong = [token for token in found if type(token) is not int]
    # Some write −1 for none.
    wrong += [token for token in found if vocab_size and token not in wrong and token >= vocab_size]
    if wrong:
        known = f" from 0 to {vocab_size - 1}" if vocab_size else ""
        raise ValueError(
            f"{place} has {name}_token_id = {value!r}, but {wrong[0]!r} is no token{known}; it "
            "belongs to another model"
        )
    return [token for token in found if token >= 0]
