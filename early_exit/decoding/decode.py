"""Decoding with dynamic depth, under one `lax.while_loop`: the two compiled programs.

The one idea: a decode is its state. The prompts' pass and every portion of the answer are calls
that take a state and return it further on, so streaming, stopping and going on are the same thing.
"""

import functools

import jax
import jax.numpy as jnp

from early_exit import precision
from early_exit.backbones import base
from early_exit.decoding import cache as caches
from early_exit.decoding.costs import Costs
from early_exit.decoding.engine import Engine
from early_exit.decoding.mode import Mode
from early_exit.decoding.state import DecodeState
from early_exit.exits.multi_exit import MultiExit
from early_exit.policy import ExitPolicy

# Prompt positions of a row run at a time, at least and at most; and of all rows: enough to be bound
# by compute, little waste on prompts that are shorter than the chunks that they fill.
_CHUNKS = 16, 64
_TOGETHER = 256


def chunk_size(batch: int) -> int:
    """Prompt positions of each of so many rows that run at a time: a power of two."""
    least, most = _CHUNKS
    size = most
    while size > least and size * batch > _TOGETHER:
        size //= 2
    return size


@functools.partial(jax.jit, static_argnames=("model", "mode"), donate_argnames="state")
@precision.exact
def prefill(
    params: base.Params, state: DecodeState, stop_ids: jax.Array, *, model: MultiExit, mode: Mode
) -> DecodeState:
    """Runs the prompts at full depth and emits each row's first token.

    Prompts go through in chunks, as many as the longest needs, so one program serves every
    prompt length that fits the cache.

    Args:
      stop_ids: int32 [n], tokens that end a row.
    """
    batch = state.tokens_BS.shape[0]
    size = chunk_size(batch)
    assumed = Costs.assumed(mode, batch)  # nothing is weighed before the first token
    engine = Engine.of(params, None, stop_ids, assumed, model=model, mode=mode)

    def chunk(index, carry):
        cache, kept, before, at_end = carry
        start = index * size
        tokens = jax.lax.dynamic_slice_in_dim(state.tokens_BS, start, size, axis=1)
        positions = jnp.broadcast_to((start + jnp.arange(size))[None], tokens.shape)
        hidden, context = engine.bound.backbone.stem({"tokens": tokens, "positions": positions})
        filled_B, reached = jnp.full(batch, start), {}
        for segment in range(len(model.segments)):
            # Always true. All that reads the cache stands in a branch: outside one, XLA copies a
            # cache that is written later.
            hidden, rows, taps = jax.lax.cond(
                start < state.prompt_B.max(),
                lambda hidden, segment=segment, cache=cache: engine.run_blocks(
                    segment, hidden, context, cache, filled_B
                ),
                lambda hidden, segment=segment: engine.project(segment, hidden, context),
                hidden,
            )
            cache = caches.write(cache, rows, filled_B)
            reached |= taps
        # The taps of the positions just before those of this chunk.
        shifted = {
            name: jnp.concatenate([before[name][:, None], x[:, :-1]], axis=1)
            for name, x in reached.items()
        }
        before = {name: x[:, -1] for name, x in reached.items()}
        for drafter in engine.drafters:
            name = drafter.name
            kept = kept | {name: drafter.read(engine, kept[name], shifted, tokens, positions)}
        offset = state.newest_B - start
        here = (offset >= 0) & (offset < size)
        reached["hidden"] = hidden
        last = jnp.clip(offset, 0, size - 1)
        at_end = {
            name: jnp.where(here[:, None], x[jnp.arange(batch), last], at_end[name])
            for name, x in reached.items()
        }
        return cache, kept, before, at_end

    chunks = (state.prompt_B.max() + size - 1) // size
    pending = state.taps | {"hidden": state.hidden_BWD}
    at_end = jax.tree.map(lambda x: jnp.zeros_like(x[:, 0]), pending)
    before = {name: x for name, x in at_end.items() if name != "hidden"}
    carry = state.cache, state.kept, before, at_end
    cache, kept, _, at_end = jax.lax.fori_loop(0, chunks, chunk, carry)
    rows, slots = jnp.arange(batch), state.pending_slots(state.newest_B)
    pending = {name: x.at[rows, slots].set(at_end[name]) for name, x in pending.items()}
    state = state.change(
        cache=cache,
        kept=kept,
        filled_BE=jnp.broadcast_to(state.prompt_B[:, None], state.filled_BE.shape),
        hidden_BWD=pending.pop("hidden"),
        taps=pending,
    )
    return engine.conclude(state, ~state.finished_B, state.newest_B, widths=(1,))


@functools.partial(jax.jit, static_argnames=("model", "mode"), donate_argnames="state")
@precision.exact
def decode(
    params: base.Params,
    state: DecodeState,
    policy: ExitPolicy | None,
    stop_ids: jax.Array,
    costs: Costs,
    steps: jax.Array,
    finishing: jax.Array,
    *,
    model: MultiExit,
    mode: Mode,
) -> DecodeState:
    """Up to `steps` steps, or until `finishing` rows have ended.

    Args:
      policy: when rows leave; None compiles a model without any exit in it.
      stop_ids: int32 [n], tokens that end a row.
      costs: by which verified decoding weighs what to draft and to check.
      steps, finishing: int32 scalars; not static, so streaming in portions compiles nothing new.
    """
    engine = Engine.of(params, policy, stop_ids, costs, model=model, mode=mode)

    def going_on(carry):
        state, step = carry
        return (step < steps) & (state.finished_B.sum() < finishing)

    def step(carry):
        state, step = carry
        return engine.step(state), step + 1

    state, _ = jax.lax.while_loop(going_on, step, (state, jnp.int32(0)))
    return state
