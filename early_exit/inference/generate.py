"""Prompts in, texts with their statistics out: the loop around prefill and decode.

The one idea: streaming and whole answers are the same compiled program, run for a few tokens at
a time or for all of them.
"""

import dataclasses
import functools
import time
from collections.abc import Iterator, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from early_exit.backbones import base
from early_exit.exits.multi_exit import MultiExit
from early_exit.inference.decode import decode, prefill
from early_exit.inference.sampling import GREEDY, Sampling
from early_exit.inference.state import DecodeState, initial_state
from early_exit.policy import ExitPolicy


@dataclasses.dataclass(frozen=True)
class Generation:
    """What one prompt got.

    Attributes:
      tokens: int32 [n], the new tokens, a stop token included.
      exits: int32 [n], index of the exit each left at; E is the final one. The first token comes
        out of the prefill, at full depth.
      depths: int [n], blocks run for each.
      log_probs: float32 [n], at that exit, at temperature 1.
      evaluations: int32 [E + 1], how often each head was evaluated.
      seconds: time spent after the prefill, on all rows of the batch together.
    """

    tokens: np.ndarray
    exits: np.ndarray
    depths: np.ndarray
    log_probs: np.ndarray
    evaluations: np.ndarray
    seconds: float


def stream(
    model: MultiExit,
    params: base.Params,
    prompts: Sequence[Sequence[int]],
    *,
    policy: ExitPolicy | None,
    max_new_tokens: int | Sequence[int],
    stop_ids: Sequence[int] = (),
    sampling: Sampling = GREEDY,
    seed: int = 0,
    portion: int = 4,
    slots: int | None = None,
) -> Iterator[list[Generation]]:
    """Yields what every prompt has so far, after the prefill and after every `portion` tokens.

    Args:
      prompts: token ids, of any lengths.
      policy: when to leave; None runs the full model without consulting any exit.
      stop_ids: tokens that end an answer (and stay in it).
      slots: cache slots to allocate, by default as few as the longest row needs.

    Raises:
      ValueError: an empty prompt, or one that with its answer exceeds the context.
    """
    state = initial_state(
        model,
        prompts,
        max_new_tokens,
        key=jax.random.key(seed),
        dtype=jax.tree.leaves(params["backbone"])[0].dtype,
        slots=slots,
    )
    # Padded with −1, which is no token: another length would be another program.
    padding = -len(stop_ids) % 8 or 8
    stops = jnp.array([*stop_ids, *[-1] * padding], jnp.int32)
    state = jax.block_until_ready(prefill(params, state, stops, model=model, sampling=sampling))
    run = functools.partial(
        decode, params, policy=policy, stop_ids=stops, model=model, sampling=sampling
    )
    state = run(state=state, steps=jnp.int32(0))  # compiles, off the clock
    seconds = 0.0
    yield _generations(model, state, prompts, seconds)
    while not bool(state.finished_B.all()):
        began = time.perf_counter()
        state = jax.block_until_ready(run(state=state, steps=jnp.int32(portion)))
        seconds += time.perf_counter() - began
        yield _generations(model, state, prompts, seconds)


def generate(*args, max_new_tokens: int | Sequence[int], **kwargs) -> list[Generation]:
    """Like `stream`, but returns once, when every row has ended."""
    *_, last = stream(
        *args, max_new_tokens=max_new_tokens, portion=int(np.max(max_new_tokens)), **kwargs
    )
    return last


def _generations(model: MultiExit, state: DecodeState, prompts, seconds) -> list[Generation]:
    rows = jax.device_get(
        (state.tokens_BS, state.exit_BS, state.log_prob_BS, state.length_B, state.evaluations_BE)
    )
    generations = []
    for prompt, tokens, exits, log_probs, length, evaluations in zip(prompts, *rows, strict=True):
        new = slice(len(prompt), length + 1)
        generations.append(
            Generation(
                tokens=tokens[new],
                exits=exits[new],
                depths=model.exit_depths[exits[new]],
                log_probs=log_probs[new],
                evaluations=evaluations,
                seconds=seconds,
            )
        )
    return generations
