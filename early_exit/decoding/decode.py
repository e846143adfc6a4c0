"""Decoding with dynamic depth, under one `lax.while_loop`: the two compiled programs.

The one idea: a decode is its state. Portions of the prompts and of the answers are calls that take
a state and return it further on, so streaming, stopping and going on are the same thing.
"""

import functools

import jax
import jax.numpy as jnp

from early_exit import precision, sharding
from early_exit.backbones import base
from early_exit.backbones.cached_attention import CACHE_CHUNK
from early_exit.decoding import cache as caches
from early_exit.decoding.costs import Costs
from early_exit.decoding.engine import Engine
from early_exit.decoding.mode import Mode
from early_exit.decoding.rules import Rules
from early_exit.decoding.state import DecodeState, in_place
from early_exit.exits.multi_exit import MultiExit

# Prompt positions of a row run at a time, at least and at most; and of all rows: enough to be bound
# by compute, little waste on prompts that are shorter than the chunks that they fill. Every cache
# is a multiple of the most.
_LEAST, _MOST, _TOGETHER = 16, 64, 256
# On accelerators it takes more: a TPU v5e does 240 operations in the time in which it reads a byte,
# an H100 300, and of a weight in half precision, two bytes, each position makes two.
_MOST_ON_CHIPS = CACHE_CHUNK


def chunk_size(batch: int, platform: str | None = None) -> int:
    """Prompt positions of each of so many rows that run at a time: a power of two.

    Args:
      platform: what it is to run on, `jax.default_backend()` if not given.
    """
    size = _MOST if (platform or jax.default_backend()) == "cpu" else _MOST_ON_CHIPS
    while size > _LEAST and size * batch > _TOGETHER:
        size //= 2
    return size


@functools.partial(jax.jit, static_argnames=("model", "mode"), donate_argnames="state")
@precision.exact
@sharding.laid_out
def prefill(
    params: base.Params,
    state: DecodeState,
    rules: Rules,
    chunks: jax.Array,
    *,
    model: MultiExit,
    mode: Mode,
) -> DecodeState:
    """Runs the prompts at full depth, up to `chunks` chunks further; those that are through emit
    their first token.

    Prompts go through in chunks, as many as the longest needs, so one program serves every
    prompt length that fits the cache.

    Args:
      rules: without a policy; no exit is asked about a prompt.
      chunks: int32 scalar, not static.
    """
    batch = state.tokens_BS.shape[0]
    size = chunk_size(batch)
    assumed = Costs.assumed(mode, batch)  # nothing is weighed before the first token
    engine = Engine.of(params, rules, assumed, model=model, mode=mode)
    rows, state = jnp.arange(batch), engine.encode_prompts(state)

    def chunk(index, state: DecodeState) -> DecodeState:
        state, start = in_place(state), index * size
        tokens = jax.lax.dynamic_slice_in_dim(state.tokens_BS, start, size, axis=1)
        positions = jnp.broadcast_to((start + jnp.arange(size))[None], tokens.shape)
        hidden, context = engine.embed(state, tokens, positions)
        cache, filled_B, reached = state.cache, jnp.full(batch, start), {}
        for segment in range(len(model.segments)):
            # Always true. All that reads the cache stands in a branch: outside one, XLA copies a
            # cache that is written later.
            hidden, new, taps = jax.lax.cond(
                start < state.prompt_B.max(),
                lambda hidden, segment=segment, cache=cache: engine.run_blocks(
                    segment, hidden, context, cache, filled_B
                ),
                lambda hidden, segment=segment: engine.project(segment, hidden, context),
                hidden,
            )
            cache = caches.write(cache, new, filled_B)
            reached |= taps
        # The taps of the positions just before those of this chunk.
        before = state.pending_slots(filled_B - 1)
        shifted = {
            name: jnp.concatenate([state.taps[name][rows, before][:, None], x[:, :-1]], axis=1)
            for name, x in reached.items()
        }
        kept = state.kept
        for drafter in engine.drafters:
            name = drafter.name
            kept = kept | {name: drafter.read(engine, kept[name], shifted, tokens, positions)}
        # What goes on from here: a prompt's last position, or the last of this chunk.
        at_B = jnp.minimum(state.prompt_B, start + size) - 1
        nowhere = state.hidden_BWD.shape[1]
        slots = jnp.where(at_B >= start, state.pending_slots(at_B), nowhere)
        last = jnp.clip(at_B - start, 0, size - 1)

        def stored(kept_BWD, x):
            return kept_BWD.at[rows, slots].set(x[rows, last], mode="drop")

        read_B = jnp.minimum(start + size, state.prompt_B)[:, None]
        read = state.change(
            cache=cache,
            kept=kept,
            filled_BE=jnp.broadcast_to(read_B, state.filled_BE.shape),
            hidden_BWD=stored(state.hidden_BWD, hidden),
            taps={name: stored(state.taps[name], x) for name, x in reached.items()},
        )
        return in_place(read)

    first = (state.filled_BE.max() + size - 1) // size
    longest = (state.prompt_B.max() + size - 1) // size
    state = jax.lax.fori_loop(first, jnp.minimum(first + chunks, longest), chunk, state)
    through_B = (state.filled_BE[:, -1] == state.prompt_B) & (state.newest_B < state.prompt_B)
    concluding_B = through_B & ~state.finished_B
    return in_place(engine.conclude(state, concluding_B, state.newest_B, widths=(1,)))


@functools.partial(jax.jit, static_argnames=("model", "mode"), donate_argnames="state")
@precision.exact
@sharding.laid_out
def decode(
    params: base.Params,
    state: DecodeState,
    rules: Rules,
    costs: Costs,
    steps: jax.Array,
    finishing: jax.Array,
    *,
    model: MultiExit,
    mode: Mode,
) -> DecodeState:
    """Up to `steps` steps, or until `finishing` rows have ended.

    Args:
      costs: by which verified decoding weighs what to draft and to check.
      steps, finishing: int32 scalars; not static, so streaming in portions compiles nothing new.
    """
    engine = Engine.of(params, rules, costs, model=model, mode=mode)

    def going_on(carry):
        state, step = carry
        return (step < steps) & (state.finished_B.sum() < finishing)

    def step(carry):
        state, step = carry
        return in_place(engine.step(in_place(state))), step + 1

    state, _ = jax.lax.while_loop(going_on, step, (state, jnp.int32(0)))
    return in_place(state)  # or the next call may find it elsewhere, and compile anew
