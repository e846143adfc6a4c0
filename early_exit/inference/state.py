"""What a decode is at any moment, and what it has emitted: two small frozen pytrees.

The one idea: static shapes from the first token to the last, so that the whole state is a
`lax.while_loop` carry and can be donated, streamed and resumed.
"""

import dataclasses
import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from early_exit.backbones.layers import CACHE_CHUNK
from early_exit.exits.multi_exit import MultiExit
from early_exit.inference import cache as caches


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class DecodeState:
    """Everything a decode needs to go on; static shapes, B rows of S positions.

    Attributes:
      tokens_BS: int32, the prompt, then what was decoded.
      length_B: int32, positions in the cache; `tokens[length]` is the newest token.
      limit_B: int32, a row ends when it has this many tokens.
      finished_B: bool, whether the row has met its limit or a stop token.
      exit_BS: int32, index of the exit each token was emitted at (E is the final one), −1 for
        the prompt.
      log_prob_BS: float32, the token's log-probability at that exit, at temperature 1.
      evaluations_BE: int32 [B, E + 1], how often each head was evaluated.
      cache: keys and values (`inference.cache`).
      keys_B: a PRNG key per row; a row draws the same whatever rows stand beside it.
    """

    tokens_BS: jax.Array
    length_B: jax.Array
    limit_B: jax.Array
    finished_B: jax.Array
    exit_BS: jax.Array
    log_prob_BS: jax.Array
    evaluations_BE: jax.Array
    cache: caches.Cache
    keys_B: jax.Array


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Emission:
    """A token chosen for each row: token, exit and log-probability, each [B]."""

    token: jax.Array
    exit: jax.Array
    log_prob: jax.Array

    @classmethod
    def none(cls, batch: int) -> "Emission":
        zeros = jnp.zeros(batch, jnp.int32)
        return cls(zeros, zeros - 1, zeros.astype(jnp.float32))

    def where(self, rows_B: jax.Array, other: "Emission") -> "Emission":
        """This emission in the given rows, the other's elsewhere."""
        return jax.tree.map(functools.partial(jnp.where, rows_B), self, other)


def initial_state(
    model: MultiExit,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int | Sequence[int],
    *,
    key: jax.Array,
    dtype=jnp.float32,
    slots: int | None = None,
) -> DecodeState:
    """State for prompts of any lengths, nothing run yet.

    Args:
      max_new_tokens: at least 1; one number, or one per prompt.
      key: a PRNG key, split over the rows, or one key per row [B].
      slots: cache slots to allocate; by default the smallest bucket that holds the longest row.

    Raises:
      ValueError: an empty prompt, a token outside the vocabulary, no new tokens, more positions
        than the context, or slots that do not fit.
    """
    batch = len(prompts)
    if isinstance(max_new_tokens, int):
        max_new_tokens = [max_new_tokens] * batch
    for i, (prompt, new) in enumerate(zip(prompts, max_new_tokens, strict=True)):
        if not len(prompt):
            raise ValueError(f"prompt {i} is empty; give at least one token")
        if new < 1:
            raise ValueError(f"prompt {i} asks for {new} new tokens; ask for at least 1")
        if not 0 <= min(prompt) <= max(prompt) < model.config.vocab_size:
            raise ValueError(
                f"prompt {i} has token ids from {min(prompt)} to {max(prompt)}, but the model "
                f"knows 0 to {model.config.vocab_size - 1}; use the model's own tokenizer"
            )
    limits = [len(prompt) + new for prompt, new in zip(prompts, max_new_tokens, strict=True)]
    needed = caches.bucket(max(limits), model.config.context_length)
    slots = needed if slots is None else slots
    if slots < max(limits) or slots % CACHE_CHUNK:
        raise ValueError(
            f"slots={slots} must be a multiple of {CACHE_CHUNK} that holds the longest row's "
            f"{max(limits)} positions"
        )
    points = model.exits.points if model.exits.head == "layer" else ()
    tokens = np.zeros((batch, slots), np.int32)
    for row, prompt in zip(tokens, prompts, strict=True):
        row[: len(prompt)] = prompt
    return DecodeState(
        tokens_BS=jnp.array(tokens),
        length_B=jnp.array([len(prompt) for prompt in prompts], jnp.int32),
        limit_B=jnp.array(limits, jnp.int32),
        finished_B=jnp.zeros(batch, bool),
        exit_BS=jnp.full((batch, slots), -1, jnp.int32),
        log_prob_BS=jnp.zeros((batch, slots), jnp.float32),
        evaluations_BE=jnp.zeros((batch, len(model.segments)), jnp.int32),
        cache=caches.empty(model.config, caches.names(model.config, points), batch, slots, dtype),
        keys_B=key if key.shape == (batch,) else jax.random.split(key, batch),
    )


def append(state: DecodeState, emission: Emission, active_B, stop_ids) -> DecodeState:
    """Writes the chosen tokens behind each active row and settles which rows go on."""
    rows = jnp.arange(state.tokens_BS.shape[0])
    at = jnp.where(active_B, state.length_B, state.tokens_BS.shape[1])  # out of range: dropped

    def put(into, values):
        return into.at[rows, at].set(values, mode="drop")

    stopped = (emission.token[:, None] == stop_ids[None]).any(axis=1)
    return dataclasses.replace(
        state,
        tokens_BS=put(state.tokens_BS, emission.token),
        exit_BS=put(state.exit_BS, emission.exit),
        log_prob_BS=put(state.log_prob_BS, emission.log_prob),
        finished_B=state.finished_B
        | (active_B & (stopped | (state.length_B + 1 >= state.limit_B))),
    )


def row_keys(state: DecodeState) -> jax.Array:
    """One key per row and position."""
    return jax.vmap(jax.random.fold_in)(state.keys_B, state.length_B)


def count(state: DecodeState, exit_index: int, rows_B: jax.Array) -> DecodeState:
    """The state after one more evaluation of an exit's head in the given rows."""
    counts = state.evaluations_BE.at[:, exit_index].add(rows_B.astype(jnp.int32))
    return dataclasses.replace(state, evaluations_BE=counts)
