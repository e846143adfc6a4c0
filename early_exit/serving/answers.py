"""From what a client asks to what it gets: the answers to one request, as their tokens come."""

import asyncio
import dataclasses
import time
from collections.abc import AsyncIterator, Sequence
from typing import Any

import jax
import numpy as np

from early_exit import policy as policies
from early_exit.data import tokenising
from early_exit.decoding.session import CANCELLED, LENGTH, STOP, Event, Request
from early_exit.evaluation import scoring
from early_exit.library.model import Model
from early_exit.pretrained import chat
from early_exit.serving.api import MOST_CHOICES, ApiError, Chat, Completion
from early_exit.serving.metrics import Metrics
from early_exit.serving.words import Words
from early_exit.serving.worker import Busy, Handle, Stopped, Worker


@dataclasses.dataclass(frozen=True)
class Limits:
    """What one request may take.

    Attributes:
      new_tokens: of an answer to a conversation that names no limit.
      seconds: until its answers end where they are.
    """

    new_tokens: int = 512
    seconds: float = 600.0


@dataclasses.dataclass(frozen=True)
class Added:
    """What one answer has got since the last time.

    Attributes:
      index: which answer: prompts times choices.
      text: what can be given out.
      pieces, log_probs, depths: of each new token.
      ended: why it has ended: `stop`, `length`, or None.
    """

    index: int
    text: str
    pieces: Sequence[str]
    log_probs: np.ndarray
    depths: np.ndarray
    ended: str | None


class Answers:
    """The answers to one request."""

    def __init__(
        self, model: Model, worker: Worker, metrics: Metrics, asked: Chat | Completion, most: Limits
    ):
        """
        Raises:
          ApiError: it asks for what the model has not, or for more than there is room for.
        """
        self._model, self._worker, self._metrics = model, worker, metrics
        self._asked, self._limits = asked, most
        self._mode = worker.modes[0] if asked.mode is None else asked.mode
        self.prompts = [self._tokens(prompt) for prompt in self._given()]
        if len(self.prompts) * asked.n > MOST_CHOICES:
            raise ApiError(400, f"prompts times n must be at most {MOST_CHOICES}", param="n")
        self.new_tokens = 0

    @property
    def prompt_tokens(self) -> int:
        return sum(map(len, self.prompts))

    @property
    def usage(self) -> dict[str, int]:
        whole = self.prompt_tokens + self.new_tokens
        return {
            "prompt_tokens": self.prompt_tokens,
            "completion_tokens": self.new_tokens,
            "total_tokens": whole,
        }

    async def stream(self) -> AsyncIterator[Added]:
        """All answers, as they come; the request is given up when nobody listens any more.

        Raises:
          ApiError: too many wait, a request that cannot be served, or the server has stopped.
        """
        loop, came, began = asyncio.get_running_loop(), asyncio.Queue(), time.monotonic()
        handles: list[Handle] = []

        def listener(index: int):
            return lambda event: loop.call_soon_threadsafe(came.put_nowait, (index, event))

        try:
            for index, (request, key) in enumerate(self._requests()):
                handles.append(self._submit(request, key, listener(index)))
            self._metrics.prompt_tokens.inc(self.prompt_tokens)
            writing = [Words(self._model.tokenizer, self._asked.stops) for _ in handles]
            going = set(range(len(handles)))
            while going:
                left = began + self._limits.seconds - time.monotonic()
                try:
                    index, event = await asyncio.wait_for(came.get(), max(left, 0))
                except TimeoutError:
                    for index in going:
                        yield self._added(index, None, writing[index], LENGTH)
                    return
                if isinstance(event, Exception):
                    raise ApiError(503, "the server has stopped decoding", "server_error")
                if index not in going:
                    continue  # cut at a stop string
                if event.first == 0 and event.answer is not None:
                    self._metrics.first.observe(time.monotonic() - began)
                added = self._added(index, event, writing[index], event.ended)
                if added.ended:
                    going.remove(index)
                    self._worker.cancel(handles[index])
                    self._book(event, time.monotonic() - began)
                yield added
        finally:
            for handle in handles:
                self._worker.cancel(handle)

    async def scored(self) -> list[tuple[list[float | None], list[dict[int, float] | None]]]:
        """Of each prompt's tokens: log-probabilities, and by token those of the best and its own.

        They are the full model's, whatever mode answers. The first token has none.

        Raises:
          ApiError: the server has stopped.
        """
        model, prompts = self._model, self.prompts
        pairs = [(prompt[:1], prompt[1:]) for prompt in prompts if len(prompt) > 1]

        def score():
            return scoring.score(model.static, model.params, pairs) if pairs else []

        try:
            found = iter(await asyncio.wrap_future(self._worker.call(score)))
        except Stopped as error:
            raise ApiError(503, str(error), "server_error") from None
        told = []
        for prompt in prompts:
            log_probs: list[float | None] = [None]
            best: list[dict[int, float] | None] = [None]
            if len(prompt) > 1:
                one = next(found)
                log_probs += one.log_probs.tolist()
                rows = zip(prompt[1:], one.log_probs, one.best, one.best_log_probs, strict=True)
                best += [{int(b): float(y)} | {t: float(x)} for t, x, b, y in rows]
            told.append((log_probs, best))
        return told

    def text(self, tokens: Sequence[int]) -> str:
        return self._model.tokenizer.decode(tokens, clean_up_tokenization_spaces=False)

    def _given(self) -> list[Any]:
        asked = self._asked
        return [asked.turns] if isinstance(asked, Chat) else asked.prompts

    def _tokens(self, prompt: Any) -> list[int]:
        model, asked = self._model, self._asked
        try:
            if isinstance(asked, Chat):
                tokens = chat.prompt(model.tokenizer, prompt)
            elif isinstance(prompt, str):
                tokens = tokenising.needed(model.tokenizer).encode(prompt)
            else:
                tokens = list(prompt)
        except ValueError as error:
            raise ApiError(400, str(error), param="messages") from None
        if not tokens:
            raise ApiError(400, "the prompt has no token; give some text", param="prompt")
        return tokens

    def _requests(self):
        """Each answer's request, with the key of what it draws."""
        asked = self._asked
        thresholds = asked.thresholds
        if asked.full and self._model.policy is not None:
            thresholds = [policies.NEVER] * len(self._model.points)
        seed = np.random.SeedSequence().generate_state(1)[0] if asked.seed is None else asked.seed
        for prompt in self.prompts:
            keys = jax.random.split(jax.random.key(int(seed)), asked.n)
            request = Request(
                prompt, self._most(prompt), asked.sampling, thresholds=thresholds, seed=int(seed)
            )
            yield from ((request, key) for key in keys)

    def _most(self, prompt: Sequence[int]) -> int:
        if isinstance(self._asked, Completion):
            return max(self._asked.max_tokens, 1)
        if self._asked.most is not None:
            return self._asked.most
        room = self._model.static.config.context_length - len(prompt)
        return max(min(self._limits.new_tokens, room), 1)

    def _submit(self, request: Request, key: jax.Array, listener) -> Handle:
        try:
            return self._worker.submit(self._mode, request, listener, key)
        except ValueError as error:
            raise ApiError(400, str(error)) from None
        except Busy as error:
            raise ApiError(429, str(error), "rate_limit_error", code="queue_full") from None
        except Stopped as error:
            raise ApiError(503, str(error), "server_error") from None

    def _added(self, index: int, event: Event | None, words: Words, ended: str | None) -> Added:
        """What an event adds; an answer that is cut at a stop string has ended."""
        if ended == CANCELLED:
            ended = LENGTH
        if event is None or event.answer is None:
            text = words.add((), complete=True)
            return Added(index, text, (), np.zeros(0), np.zeros(0, int), ended)
        answer, new = event.answer, slice(event.first, None)
        told = len(words.pieces)
        text = words.add(answer.tokens[new], complete=ended is not None)
        self.new_tokens += len(answer.tokens[new])
        pieces = words.pieces[told:]
        ended = STOP if words.stopped else ended
        return Added(index, text, pieces, answer.log_probs[new], answer.depths[new], ended)

    def _book(self, event: Event, seconds: float) -> None:
        if event.answer is not None:
            self._metrics.book(self._mode, event.answer)
            self._metrics.whole.observe(seconds)
            if (after := len(event.answer.tokens) - 1) > 0:
                self._metrics.between.observe(event.answer.seconds / after)
