"""Prompts with their answers: what is read where an encoder has the prompt and blocks the answer.

The one idea: an answer is text like any other, a token in front from which it starts, the one that
ends it behind, and each position is to say the next. Its prompt lies beside it in the batch. So
whatever learns from a batch, or scores one, need not know that there is a prompt.

A batch holds `tokens`, `documents` (1; 0 is padding) and `positions`, int32 [B, T], of answers;
`prompt`, int32 [B, S], and `prompt_real`, bool [B, S].
"""

import dataclasses
import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Protocol

import numpy as np

from early_exit.data import text_files, tokenising
from early_exit.data.parts import absent, check_named
from early_exit.data.sources import SPLITS, hash_position, split_of
from early_exit.data.stream import (
    ALONE,
    EvaluationBatches,
    Rank,
    TrainingBatches,
    read_ahead,
    shuffled,
)
from early_exit.data.transforms import Batch, one_a_row
from early_exit.storage import copies

_SUFFIX = ".jsonl"
Ids = Sequence[int] | np.ndarray


class Network(Protocol):
    """What is asked of a backbone's config (`backbones.base.BackboneConfig`)."""

    @property
    def encodes_prompts(self) -> bool: ...

    @property
    def start_id(self) -> int:
        """Where it encodes prompts."""


def row_of(network: Network, prompt: Ids) -> Ids:
    """What a row holds in front of its answer: the prompt, or a start if that is encoded."""
    return [network.start_id] if network.encodes_prompts else prompt


def batch(
    network: Network,
    pairs: Sequence[tuple[Ids, Ids]],
    length: int,
    rows: int | None = None,
    prompt_length: int = 1,
) -> Batch:
    """Prompts and answers as token ids → a batch, each pair alone in a row.

    Of a network that reads its prompt itself, that stands in front of the answer.

    Args:
      length: T, which all have room in.
      rows: of the batch, those behind the pairs being padding; as many as pairs by default.
      prompt_length: S at least; longer where a prompt is.
    """
    found = one_a_row([[*row_of(network, p), *answer] for p, answer in pairs], length, rows)
    if not network.encodes_prompts:
        return found
    longest = max([prompt_length, *(len(prompt) for prompt, _ in pairs)])
    prompts = one_a_row([prompt for prompt, _ in pairs], longest, rows)
    return found | {"prompt": prompts["tokens"], "prompt_real": prompts["documents"] > 0}


def alone(network: Network, prompt: Ids, answer: Ids, multiple: int) -> tuple[Batch, int]:
    """(one prompt and its answer as a batch, at which position of its row the answer begins).

    Args:
      multiple: lengths are rounded up to multiples of it, so that few programs are compiled.
    """
    first = len(row_of(network, prompt))
    length, longest = (n + -n % multiple for n in (first + len(answer), len(prompt)))
    return batch(network, [(prompt, answer)], length, 1, longest), first


@dataclasses.dataclass(frozen=True)
class _Place:
    """Where a pair stands."""

    file: text_files.TextFile
    start: int
    stop: int
    where: str

    def read(self) -> tuple[str, str]:
        return _pair(self.file.read(self.start, self.stop), self.where)


@dataclasses.dataclass(frozen=True)
class Pairs(Sequence):
    """Random access to (prompt, answer); read from disk at each access, by any thread."""

    places: tuple[_Place, ...]

    def __len__(self) -> int:
        return len(self.places)

    def __getitem__(self, index: int) -> tuple[str, str]:
        return self.places[index].read()


def pairs(source: str, split: str) -> Pairs:
    """The pairs of one split, in a mixed order that is always the same.

    Args:
      source: a `.jsonl` file, or a folder of such files; a row has a `prompt` and an `answer`.
      split: `train`, `validation`, `calibration` or `test`, with 85, 5, 5 and 5 %. A hash of the
        prompt decides, so that equal ones stay together.

    Raises:
      ValueError: unknown split, a source of something else, a bad row, or an empty split.
      FileNotFoundError: no such file or folder.
    """
    if split not in SPLITS:
        raise ValueError(f"unknown split {split!r}; choose one of {', '.join(SPLITS)}")
    check_named(source)
    found, seen = [], 0
    for place in _places(source):
        seen += 1
        prompt = place.read()[0].encode()
        if split_of(prompt) == split:
            found.append((hash_position(prompt), place))
    if not found:
        raise ValueError(
            f"the {split} split of {source} is empty: it has {seen} pairs, by whose prompts a hash "
            "decides; give more"
        )
    return Pairs(tuple(place for _, place in sorted(found, key=lambda one: one[0])))


def _places(source: str) -> Iterator[_Place]:
    path = copies.fetched(source, [f"*{_SUFFIX}"])
    if not path.exists():
        raise FileNotFoundError(
            f"no prompts and answers: {absent(source)}; give a {_SUFFIX} file, or a folder of them"
        )
    files = sorted(path.rglob(f"*{_SUFFIX}")) if path.is_dir() else [path]
    if not files or files[0].suffix.lower() != _SUFFIX:
        raise ValueError(
            f"this network answers prompts, and {source} has none; give a {_SUFFIX} file, or a "
            'folder of them, whose rows have a "prompt" and an "answer"'
        )
    for name in files:
        file = text_files.opened(name)
        for line in file.lines():
            if line.text.strip():
                yield _Place(file, line.start, line.stop, f"{name}:{line.number}")


def _pair(line: str, where: str) -> tuple[str, str]:
    row = text_files.json_row(line, where)
    return tuple(text_files.json_string(row, name, where) for name in ("prompt", "answer"))


@dataclasses.dataclass(frozen=True)
class Encode:
    """Prompts and answers → token ids.

    Attributes:
      tokenizer: the network's.
      length: of an answer, with the start and the end; longer ones are cut.
      prompt_length: of a prompt. Longer ones are cut before their last token, which stays: encoders
        end a text with a special one.
    """

    tokenizer: Any
    length: int
    prompt_length: int

    def prompt(self, text: str) -> list[int]:
        ids = tokenising.as_text(self.tokenizer)(text)
        if not ids:
            raise ValueError("a prompt is empty; give at least one word")
        return ids if len(ids) <= self.prompt_length else [*ids[: self.prompt_length - 1], ids[-1]]

    def answer(self, text: str) -> list[int]:
        ids = tokenising.as_text(self.tokenizer)(text, add_special_tokens=False)
        return [*ids, tokenising.end_of_text(self.tokenizer)][: self.length - 1]

    def __call__(self, pair: tuple[str, str]) -> tuple[list[int], list[int]]:
        return self.prompt(pair[0]), self.answer(pair[1])


def training_batches(
    pairs: Sequence[tuple[str, str]],
    encode: Encode,
    network: Network,
    *,
    batch_size: int,
    seed: int,
    num_threads: int = 2,
    rank: Rank = ALONE,
) -> TrainingBatches:
    """Batches without end, in a new order at each pass over the pairs.

    Raises:
      ValueError: sizes that make no batches.
    """
    rank.check(batch_size)
    dataset = shuffled(len(pairs), batch_size, seed, rank)
    read = functools.partial(_read, pairs, encode, network)
    return TrainingBatches(
        dataset.map(lambda chosen: read(chosen["rows"])).to_iter_dataset(read_ahead(num_threads))
    )


def evaluation_batches(
    pairs: Sequence[tuple[str, str]],
    encode: Encode,
    network: Network,
    *,
    batch_size: int,
    num_batches: int | None = None,
    num_threads: int = 2,
    rank: Rank = ALONE,
) -> EvaluationBatches:
    """Every pair once and in order, or as many as the first `num_batches` batches hold.

    The last batch is padded. A batch has `groups`, too, the number of each row's pair, [B, T].

    Raises:
      ValueError: sizes that make no batches.
    """
    import grain  # not at the top: most commands need it late or never

    rank.check(batch_size)
    if num_batches is not None and num_batches < 1:
        raise ValueError(f"num_batches must be positive, or None for all, not {num_batches}")

    def chosen(number: int) -> Batch:
        rows = np.arange(number * batch_size, min((number + 1) * batch_size, len(pairs)))
        found = _read(pairs, encode, network, rows, batch_size)
        groups = number * batch_size + np.arange(batch_size, dtype=np.int32)
        return found | {"groups": np.repeat(groups[:, None], encode.length, axis=1)}

    batches = -(-len(pairs) // batch_size)
    dataset = grain.MapDataset.range(min(batches, num_batches or batches))
    return EvaluationBatches(dataset.map(chosen).map(rank.rows), read_ahead(num_threads))


def _read(
    pairs: Sequence[tuple[str, str]],
    encode: Callable,
    network: Network,
    rows: np.ndarray,
    count: int | None = None,
) -> Batch:
    encoded = [encode(pairs[int(row)]) for row in rows]
    return batch(network, encoded, encode.length, count, encode.prompt_length)
