"""Prompts, texts and inputs in; answers out: what a model in hand is run for.

The one idea: the programs are those of the commands, with the same sizes, so that the same prompts
get the same tokens. Text goes in and comes out, or token ids do.
"""

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, overload

import numpy as np

from early_exit.classifying.classify import Classified
from early_exit.data import feed as feeds
from early_exit.data import pairs, tokenising
from early_exit.data.pairs import row_of
from early_exit.decoding import cache, measure
from early_exit.decoding import generate as decoding
from early_exit.decoding import mode as modes
from early_exit.decoding.decoder import Decoder, Generation
from early_exit.decoding.detokenize import Detokenizer
from early_exit.decoding.mode import Mode
from early_exit.decoding.sampling import GREEDY, Sampling
from early_exit.decoding.state import Ids, check_prompts
from early_exit.evaluation import exits
from early_exit.library.model import Model
from early_exit.pretrained import chat
from early_exit.runs import progress

Prompt = str | Ids


@dataclasses.dataclass(frozen=True)
class Answer(Generation):
    """What one prompt got, or has got so far: a `Generation`, and its text.

    Attributes:
      pieces: the text that each token adds; empty without a tokenizer.
      added: the text since the answer that `stream` gave before; of `generate`, all of it.

    Example:
      >>> answer = ee.generate(leaving, "Why?", max_new_tokens=8)
      >>> answer.text == "".join(answer.pieces) == answer.added
      True
    """

    pieces: tuple[str, ...]
    added: str

    @property
    def text(self) -> str:
        """All of it, without special tokens."""
        return "".join(self.pieces)


@overload
def generate(  # type: ignore[overload-overlap]  # a text is a sequence of texts, too
    model: Model,
    prompts: str,
    *,
    max_new_tokens: int = ...,
    mode: Mode | str = ...,
    sampling: Sampling = ...,
    raw: bool = ...,
    seed: int = ...,
    batch: int | None = ...,
) -> Answer: ...


@overload
def generate(
    model: Model,
    prompts: Sequence[Prompt],
    *,
    max_new_tokens: int = ...,
    mode: Mode | str = ...,
    sampling: Sampling = ...,
    raw: bool = ...,
    seed: int = ...,
    batch: int | None = ...,
) -> list[Answer]: ...


def generate(
    model: Model,
    prompts: str | Sequence[Prompt],
    *,
    max_new_tokens: int = 160,
    mode: Mode | str = "lossy",
    sampling: Sampling = GREEDY,
    raw: bool = False,
    seed: int = 0,
    batch: int | None = None,
) -> Answer | list[Answer]:
    """Answers prompts with dynamic depth, by the model's policy; at full depth without one.

    Args:
      prompts: one text, or several prompts, each a text or token ids.
      max_new_tokens: at most so many tokens of an answer.
      mode: what becomes of skipped blocks: `lossy`, `deferred`, or `verified`, whose answer is the
        full model's; or a `Mode`.
      sampling: how tokens are drawn; greedy by default.
      raw: continue texts as they stand, special tokens and all; else each is a user's turn in the
        model's chat template.
      seed: of what is drawn.
      batch: prompts decoded together, all by default. It changes no answer.

    Returns:
      an answer, or one for each prompt: `text`, `tokens` int32 [n], `depths` (blocks run for each
      token), `log_probs`, `seconds`, …

    Raises:
      ValueError: a classifier, a text where there is no tokenizer or chat template, an empty
        prompt, one that exceeds the context with its answer, an unknown mode, or one that the
        model's exits cannot serve.

    Example:
      >>> answer = ee.generate(leaving, "Why is the sky blue?", max_new_tokens=8)
      >>> len(answer.tokens) <= 8 and len(answer.depths) == len(answer.tokens)
      True
    """
    one = isinstance(prompts, str)
    several: Sequence[Prompt] = [prompts] if isinstance(prompts, str) else prompts
    how = asked(model, mode, sampling, seed, max_new_tokens)
    ids = [tokens(model, prompt, raw) for prompt in several]
    how |= sized(model, ids, how)
    with progress.waiting("answering"):
        found = decoding.generate(model.static, model.params, ids, batch=batch, **how)
    answers = [_spoken(model, generation) for generation in found]
    return answers[0] if one else answers


def stream(
    model: Model,
    prompt: Prompt,
    *,
    max_new_tokens: int = 160,
    mode: Mode | str = "lossy",
    sampling: Sampling = GREEDY,
    raw: bool = False,
    seed: int = 0,
    portion: int = 4,
) -> Iterator[Answer]:
    """Like `generate` of one prompt, a few tokens at a time: what there is so far, again and again.

    What was given out never changes: of a character that is not complete, `added` has nothing yet.

    Args:
      prompt, max_new_tokens, mode, sampling, raw, seed: as for `generate`.
      portion: steps between two answers; a step gives a token, or more where drafts stand.

    Raises:
      ValueError: as `generate`.

    Example:
      >>> for answer in ee.stream(leaving, "Why?", max_new_tokens=8):
      ...     text = answer.added  # print(answer.added, end="", flush=True)
      >>> answer.text == ee.generate(leaving, "Why?", max_new_tokens=8).text
      True
    """
    how = asked(model, mode, sampling, seed, max_new_tokens)
    ids = [tokens(model, prompt, raw)]
    return _streamed(model, ids, how | sized(model, ids, how), portion)


def _streamed(model: Model, ids: list[Ids], how: dict[str, Any], portion: int) -> Iterator[Answer]:
    detokenizer = model.tokenizer and Detokenizer(model.tokenizer)
    pieces: list[str] = []
    for (found,) in decoding.stream(model.static, model.params, ids, portion=portion, **how):
        ended = len(found.tokens) == how["max_new_tokens"] or found.tokens[-1] in how["stop_ids"]
        added: list[str] = []
        if detokenizer is not None:
            added = detokenizer.add(found.tokens[len(pieces) :], complete=ended)
        pieces += added
        yield Answer(**vars(found), pieces=tuple(pieces), added="".join(added))


def tokens(model: Model, prompt: Prompt, raw: bool = False) -> Ids:
    """A prompt's token ids; see `generate`."""
    if not isinstance(prompt, str):
        return prompt
    if not raw and not model.static.config.encodes_prompts:  # which reads them as they are
        return chat.prompt(model.tokenizer, prompt)
    ids: list[int] = tokenising.needed(model.tokenizer).encode(prompt)
    return ids


def asked(
    model: Model,
    mode: Mode | str,
    sampling: Sampling,
    seed: int,
    max_new_tokens: int,
) -> dict[str, Any]:
    """How a model is to decode, as `decoding.generate` takes it."""
    if model.static.config.classifies:
        raise ValueError("this is a classifier; use early_exit.classify")
    mode = modes.named(mode) if isinstance(mode, str) else mode
    mode = modes.served(mode, model.static)
    return {
        "policy": model.policy if mode.asks_policy else None,
        "mode": mode,
        "max_new_tokens": max_new_tokens,
        "stop_ids": model.stop_ids,
        "sampling": sampling,
        "seed": seed,
    }


def sized(model: Model, prompts: Sequence[Ids], how: Mapping[str, Any]) -> dict[str, Any]:
    """The cache that prompts need; and what measures what steps cost here, once, where drafts are
    weighed by it."""
    mode = how["mode"]
    new = check_prompts(model.static, prompts, how["max_new_tokens"])
    slots = cache.bucket(max(map(len, prompts)) + max(new) + mode.capacity - 1)
    if not mode.verified:
        return {"slots": slots}
    return {"slots": slots, "costs": measure.measured(decoder(model, how), slots).costs}


def decoder(model: Model, how: Mapping[str, Any]) -> Decoder:
    """What every call with these settings shares."""
    names = "policy", "stop_ids", "mode", "sampling"
    return Decoder(model.static, model.params, **{name: how[name] for name in names})


def _spoken(model: Model, generation: Generation) -> Answer:
    pieces: list[str] = []
    if model.tokenizer is not None:
        pieces = Detokenizer(model.tokenizer).add(generation.tokens, complete=True)
    return Answer(**vars(generation), pieces=tuple(pieces), added="".join(pieces))


@dataclasses.dataclass(frozen=True)
class Scored:
    """What every exit makes of one text.

    Attributes:
      tokens: int32 [n].
      log_probs: float32 [E + 1, n − 1], of each token after the first, given those before it; the
        full model's are the last row. Of a reduced head, of the token's class.
      predictions: int32 [E + 1, n − 1], what each exit would have said.

    Example:
      >>> (scored,) = ee.score(tuned, "The sky is blue.")
      >>> scored.totals.shape  # of two exits and the full model
      (3,)
    """

    tokens: np.ndarray
    log_probs: np.ndarray
    predictions: np.ndarray

    @property
    def totals(self) -> np.ndarray:
        """float32 [E + 1], the log-likelihood of the text by every exit, in nats."""
        totals: np.ndarray = self.log_probs.sum(axis=1)
        return totals


def score(
    model: Model,
    texts: str | Sequence[Prompt] | Sequence[tuple[Prompt, Prompt]],
    *,
    batch: int = 8,
) -> list[Scored]:
    """How likely texts are by every exit and by the full model, each position run at full depth.

    Args:
      texts: one or several, each a text, as it stands, or token ids; of two tokens at least. Of a
        network whose encoder reads prompts, pairs of a prompt and an answer.
      batch: texts run together.

    Raises:
      ValueError: a classifier, no tokenizer, or a text that is too short or exceeds the context.

    Example:
      >>> (scored,) = ee.score(tuned, "The sky is blue.")
      >>> scored.log_probs.shape == (3, len(scored.tokens) - 1)
      True
    """
    if model.static.config.classifies:
        raise ValueError("this is a classifier; use early_exit.classify")
    network = model.static.config
    given: Sequence[Any] = [texts] if isinstance(texts, str) else texts
    asked: list[tuple[Ids, Ids]]
    if network.encodes_prompts:
        asked = [_pair(model, pair, i) for i, pair in enumerate(given)]
    else:
        asked = [((), tokens(model, text, raw=True)) for text in given]
    ids = [np.asarray([*row_of(network, prompt), *text], np.int32) for prompt, text in asked]
    context = network.context_length
    for i, row in enumerate(ids):
        if not 2 <= len(row) <= context:
            raise ValueError(
                f"text {i} has {len(row)} tokens; there must be at least 2, and at most "
                f"{context}, the model's context"
            )
    begun = [
        prompt if network.encodes_prompts else row[:-1]
        for (prompt, _), row in zip(asked, ids, strict=True)
    ]
    check_prompts(model.static, begun, 1)
    found: list[Scored] = []
    length, longest = (
        min(cache.bucket(max(map(len, of))), context) for of in (ids, [p for p, _ in asked])
    )
    for start in progress.counted(range(0, len(ids), batch), "scoring"):
        part = slice(start, start + batch)
        rows = pairs.batch(network, asked[part], length, batch, longest)
        out = exits.score_batch(model.params, rows, model=model.static)
        found += _scored(out, ids[part], length)
    return found


def _pair(model: Model, pair: tuple[Prompt, Prompt], i: int) -> tuple[Ids, Ids]:
    """Token ids of a prompt and its answer."""
    if isinstance(pair, str) or len(pair) != 2:
        raise ValueError(
            f"this network scores answers to prompts, and text {i} is no pair of them; give "
            "(prompt, answer)"
        )
    prompt, answer = pair
    if isinstance(answer, str):
        ends = tokenising.end_of_text(model.tokenizer)
        answer = [*model.tokenizer.encode(answer, add_special_tokens=False), ends]
    return tokens(model, prompt, raw=True), answer


def _scored(out: dict[str, Any], ids: list[np.ndarray], length: int) -> list[Scored]:
    losses, predictions = (
        np.asarray(out[name]).reshape(len(out[name]), -1, length)
        for name in ("losses", "predictions")
    )
    return [
        Scored(row, -losses[:, i, : len(row) - 1], predictions[:, i, : len(row) - 1])
        for i, row in enumerate(ids)
    ]


def classify(
    model: Model,
    inputs: Sequence[str] | Sequence[np.ndarray] | np.ndarray | Mapping[str, np.ndarray],
    *,
    budget: float | None = None,
    batch: int = 256,
) -> Classified:
    """Classifies inputs, each leaving where the model's policy lets it; without one, none leaves.

    Args:
      inputs: texts; or images, each uint8 [H, W, C]; or what the network's stem takes, arrays with
        the rows in front, as `{"images": float32 [N, H, W, C]}`.
      budget: blocks that an answer may take at most in the mean, whatever the scores.
      batch: inputs run together, at most 256.

    Returns:
      `labels` int32 [N], by `model.classes`; `depths` (blocks run), `probabilities` float32 [N, C],
      and more.

    Raises:
      ValueError: a language model, inputs of another kind or size, or a budget that does not reach
        the first exit.

    Example:
      >>> found = ee.classify(classifier, ["good", "bad", "good"])
      >>> [classifier.classes[label] for label in found.labels]  # doctest: +SKIP
      ['praise', 'blame', 'praise']
    """
    if not model.static.config.classifies:
        raise ValueError("this is a language model; use early_exit.generate or early_exit.score")
    rows = _rows_of(model, inputs)
    count = len(next(iter(inputs.values())) if isinstance(inputs, Mapping) else inputs)
    if not count:
        raise ValueError("there are no inputs; give at least one")
    starts = progress.counted(range(0, count, batch), "classifying")
    parts = (slice(start, start + batch) for start in starts)
    return Classified.joined([model.classifier(rows(part), budget=budget) for part in parts])


def _rows_of(
    model: Model,
    inputs: Sequence[str] | Sequence[np.ndarray] | np.ndarray | Mapping[str, np.ndarray],
) -> Callable[[slice], dict[str, np.ndarray]]:
    """Which inputs → what the stem takes for them."""
    if isinstance(inputs, Mapping):
        return lambda part: {name: x[part] for name, x in inputs.items()}
    feed = feeds.make(model.settings, model.static.config, model.tokenizer, model.data)
    assert isinstance(feed, feeds.ExampleFeed)  # as classifiers have
    prepare = feed.prepare()
    return lambda part: prepare([_example(one) for one in inputs[part]], None)


def _example(given: str | np.ndarray) -> dict[str, Any]:
    return {"text": given} if isinstance(given, str) else {"image": np.asarray(given)}
