"""Prompts in, answers out, as they come or when all have ended.

The one idea: streaming, whole answers and queues of prompts are the same compiled program, run for
a few steps, until all rows have ended, or until one has and the next prompt can take its place.
"""

import time
from collections.abc import Callable, Iterator, Sequence

import jax

from early_exit.backbones import base
from early_exit.decoding import cache as caches
from early_exit.decoding.costs import Costs
from early_exit.decoding.decoder import FOREVER, Decoder, Generation
from early_exit.decoding.mode import LOSSY, Mode
from early_exit.decoding.sampling import GREEDY, Sampling
from early_exit.decoding.session import Request, Session
from early_exit.decoding.state import Ids, check_prompts
from early_exit.exits.multi_exit import MultiExit
from early_exit.policy import ExitPolicy


def stream(
    model: MultiExit,
    params: base.Params,
    prompts: Sequence[Ids],
    *,
    policy: ExitPolicy | None,
    max_new_tokens: int | Sequence[int],
    mode: Mode = LOSSY,
    stop_ids: Sequence[int] = (),
    sampling: Sampling = GREEDY,
    seed: int = 0,
    portion: int = 4,
    slots: int | None = None,
    costs: Costs | Callable[[int], Costs] | None = None,
) -> Iterator[list[Generation]]:
    """Yields what every prompt has so far, after the prefill and after every `portion` steps.

    A step gives each row of a small batch a token, and more where drafts are accepted.

    Args:
      prompts: token ids, of any lengths.
      policy: when to leave; None runs the full model without consulting any exit.
      mode: what happens to skipped blocks, and whether early tokens stand.
      stop_ids: tokens that end an answer (and stay in it).
      sampling: how tokens are drawn.
      slots: cache slots to allocate, by default as few as the longest row needs.
      costs: by which verified decoding weighs drafts, of as many rows as it is asked about
        (`decoding.measure`); assumed if not given.

    Raises:
      ValueError: no prompt, an empty one, one of something else than the model's tokens, or one
        that with its answer exceeds the context; stop tokens that the model does not have; a policy
        for another number of exits or for a score that they lack, or a budget that they cannot
        keep.
    """
    decoder = Decoder(model, params, policy, stop_ids, mode, costs, sampling)
    began = time.perf_counter()
    state = decoder.start(prompts, max_new_tokens, jax.random.key(seed), slots)
    seconds, prefill_seconds = 0.0, [time.perf_counter() - began] * len(prompts)
    state = decoder.run(state, steps=0)  # compiles, off the clock
    yield decoder.generations(state, [seconds] * len(prompts), prefill_seconds)
    while not bool(state.finished_B.all()):
        began = time.perf_counter()
        state = decoder.run(state, steps=portion)
        seconds += time.perf_counter() - began
        yield decoder.generations(state, [seconds] * len(prompts), prefill_seconds)


def generate(
    model: MultiExit,
    params: base.Params,
    prompts: Sequence[Ids],
    *,
    policy: ExitPolicy | None,
    max_new_tokens: int | Sequence[int],
    mode: Mode = LOSSY,
    stop_ids: Sequence[int] = (),
    sampling: Sampling = GREEDY,
    seed: int = 0,
    batch: int | None = None,
    slots: int | None = None,
    costs: Costs | Callable[[int], Costs] | None = None,
) -> list[Generation]:
    """Like `stream`, but returns once, when every prompt has its answer.

    Args:
      batch: prompts decoded together, all by default. With fewer, a row whose answer has ended
        gives its place to the next prompt. What a prompt gets does not depend on it.
    """
    if batch is not None and batch < 1:
        raise ValueError(f"a batch has at least 1 row, not {batch}")
    decoder = Decoder(model, params, policy, stop_ids, mode, costs, sampling)
    if batch is not None and batch < len(prompts):
        return _queued(decoder, prompts, max_new_tokens, seed, batch, slots)
    began = time.perf_counter()
    state = decoder.start(prompts, max_new_tokens, jax.random.key(seed), slots)
    return decoder.finish(state, time.perf_counter() - began)


def _queued(decoder: Decoder, prompts, max_new_tokens, seed, batch, slots) -> list[Generation]:
    """Answers of more prompts than there are rows."""
    new = check_prompts(decoder.model, prompts, max_new_tokens)
    keys = jax.random.split(jax.random.key(seed), len(prompts))
    sizes = [len(prompt) + n for prompt, n in zip(prompts, new, strict=True)]
    if slots is None:
        slots = caches.bucket(max(sizes) + decoder.mode.capacity - 1)
    draws = decoder.sampling.temperature > 0
    session = Session(decoder, batch, sizes=(batch,), slots=slots, draws=draws)
    # Long ones first: those that start together are alike, and short ones end together at last.
    places = {
        session.add(Request(prompts[i], new[i], decoder.sampling), keys[i]): i
        for i in sorted(range(len(prompts)), key=lambda i: -sizes[i])
    }
    answers = {}
    while session.busy:
        for event in session.step(FOREVER, chunks=FOREVER):
            if event.ended:
                answers[places[event.id]] = event.answer
    return [answers[i] for i in range(len(prompts))]
