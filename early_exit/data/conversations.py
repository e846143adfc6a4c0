"""Conversations that a model made, for its exits to be tuned on: what is kept, how it is stored.

The one idea: exits should meet in tuning what they will meet in decoding, which is the model's own
answers. So a conversation is kept only if its text encodes to the very tokens that were decoded.
What else is dropped is what nobody wants more of: loops, answers without an end, questions that are
none. Each one that is dropped is counted under its fault.

`distillation.converse` makes them; `data.sources` reads them, as `made:FOLDER`.
"""

import collections
import dataclasses
import enum
import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from early_exit.data import shards

# Tokens in a row, of which repetition is counted.
_GRAM = 4


class Fault(enum.StrEnum):
    """Why a conversation is dropped, in the order in which it is looked at."""

    ENDLESS_QUESTION = "question without an end"
    EMPTY_QUESTION = "question empty"
    SPECIAL_QUESTION = "question with tokens of the template"
    LOOPING_QUESTION = "question repeats itself"
    ASKED_BEFORE = "question asked before"
    LONG_QUESTION = "question too long for the context"
    ENDLESS_ANSWER = "answer without an end"
    SHORT_ANSWER = "answer too short"
    SPECIAL_ANSWER = "answer with tokens of the template"
    LOOPING_ANSWER = "answer repeats itself"
    OTHER_TOKENS = "text encodes to other tokens"


class Words(NamedTuple):
    """What a question or an answer consists of, without the token that ended it, if one did.

    Attributes:
      end: that token, where it is known.
    """

    text: str
    tokens: Sequence[int]
    ended: bool
    end: int | None = None


@dataclasses.dataclass(frozen=True)
class Rules:
    """What is asked of a conversation.

    Attributes:
      shortest: tokens that an answer has at least.
      repeated: share of a question's or an answer's 4-grams that may have stood in it before; see
        `repetition`.
      unfinished: whether answers that were cut off are kept.
    """

    shortest: int = 8
    repeated: float = 0.3
    unfinished: bool = True

    def __post_init__(self):
        if self.shortest < 1:
            raise ValueError(f"an answer has at least 1 token, not {self.shortest}")
        if not 0 <= self.repeated <= 1:
            raise ValueError(f"the share of repeated 4-grams is 0 to 1, not {self.repeated}")

    def fault_of_question(self, question: Words, special: set[int]) -> Fault | None:
        """What is wrong with a question; `special` are tokens that stand for no text."""
        if not question.ended:
            return Fault.ENDLESS_QUESTION
        if not question.text.strip():
            return Fault.EMPTY_QUESTION
        if not special.isdisjoint(question.tokens):
            return Fault.SPECIAL_QUESTION
        return Fault.LOOPING_QUESTION if repetition(question.tokens) > self.repeated else None

    def fault_of_answer(self, answer: Words, special: set[int]) -> Fault | None:
        """What is wrong with an answer."""
        if not answer.ended and not self.unfinished:
            return Fault.ENDLESS_ANSWER
        if len(answer.tokens) < self.shortest:
            return Fault.SHORT_ANSWER
        if not special.isdisjoint(answer.tokens):
            return Fault.SPECIAL_ANSWER
        return Fault.LOOPING_ANSWER if repetition(answer.tokens) > self.repeated else None


def repetition(tokens: Sequence[int]) -> float:
    """Rank of 4-grams that have stood there before; 0 for fewer than four tokens.

    Seq-rep-4 of Welleck et al. 2020, "Neural text generation with unlikelihood training", §6.1.
    """
    grams = [tuple(tokens[i : i + _GRAM]) for i in range(len(tokens) - _GRAM + 1)]
    return 1 - len(set(grams)) / len(grams) if grams else 0.0


@dataclasses.dataclass(frozen=True)
class Conversation:
    """One question and its answer.

    Attributes:
      text: all of it with the template's tokens, but for the end of a text: pipelines end every
        document by themselves.
      prompt, answer: the words of each.
      tokens: how many tokens `text` encodes to, and the one that ends it.
    """

    text: str
    prompt: str
    answer: str
    tokens: int

    def pack(self) -> bytes:
        return json.dumps(dataclasses.asdict(self), ensure_ascii=False).encode()

    @classmethod
    def unpack(cls, record: bytes) -> "Conversation":
        return cls(**json.loads(record))

    @property
    def question_hash(self) -> bytes:
        return hash_of(self.prompt)


def hash_of(question: str) -> bytes:
    """The same for questions that differ in white space or in case only."""
    return hashlib.sha256(" ".join(question.casefold().split()).encode()).digest()


def text_of(tokenizer: Any, tokens: Sequence[int]) -> str | None:
    """The text that the tokenizer encodes to just these tokens; None if there is none.

    What it puts before every text by itself is left out of it.
    """
    tokens = list(tokens)
    added = tokenizer.encode("")
    start = len(added) if tokens[: len(added)] == added else 0
    text = tokenizer.decode(tokens[start:], clean_up_tokenization_spaces=False)
    return text if tokenizer.encode(text) == tokens else None


def conversations(store: shards.Store) -> Iterator[tuple[int, Conversation]]:
    """(index of its record, conversation) for every question that no earlier record has asked.

    Raises:
      ValueError: the records are no conversations, or damaged.
    """
    if store.about.get("kind") != KIND:
        raise ValueError(f"the folder holds {store.about.get('kind')!r}, not {KIND!r}")
    store.verify()
    asked = set()
    for index in range(len(store)):
        conversation = Conversation.unpack(store[index])
        if conversation.question_hash not in asked:
            asked.add(conversation.question_hash)
            yield index, conversation


# What stands in `about.json` of a folder of conversations.
KIND = "conversations"


def summary(folder: Path) -> tuple[list[tuple[str, int, float]], int]:
    """What became of all questions, and the tokens that were kept.

    Returns:
      rows (what became of them, how many, as a share of all), faults that never occurred left out;
      and the tokens.

    Raises:
      ValueError: not one was kept; what else `conversations` raises.
    """
    dropped = collections.Counter()
    for shard in shards.finished(folder).values():
        dropped.update(shard["dropped"])
    if not any(shard["records"] for shard in shards.finished(folder).values()):
        raise ValueError(none_kept(dropped))
    store = shards.Store(folder)
    kept = [conversation for _, conversation in conversations(store)]
    dropped[Fault.ASKED_BEFORE] += len(store) - len(kept)
    counts = [("kept", len(kept)), *((fault, dropped[fault]) for fault in Fault)]
    total = sum(count for _, count in counts)
    rows = [(str(name), count, count / total) for name, count in counts if count]
    return rows, sum(conversation.tokens for conversation in kept)


def none_kept(dropped: Mapping[str, int]) -> str:
    """What to say when every conversation was dropped."""
    faults = ", ".join(f"{fault} ({count})" for fault, count in dropped.items())
    return f"not one conversation was kept: {faults}; ask for less of them, or draw them otherwise"
