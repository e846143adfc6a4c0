"""Decoding with dynamic depth, under one `lax.while_loop`.

The one idea: depth must be proportional in time. Each segment between two exits stands in a
`lax.cond` that reads the cache and returns only new key/value rows; the cache is written once,
after the branches, in place. A row that has left keeps its hidden state, and the blocks it skips
get keys and values projected from that state ("propagate", Schuster et al. 2022, CALM, §3.3).

Rows of a batch leave where they like: a segment runs while any row still needs it, the others
hold still. Finished rows take no further part.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp

from early_exit import confidence as confidences
from early_exit.backbones import base
from early_exit.exits.multi_exit import Bound, MultiExit
from early_exit.inference import cache as caches
from early_exit.inference import sampling as samplings
from early_exit.inference.sampling import Sampling
from early_exit.inference.state import DecodeState, Emission, append, count, row_keys
from early_exit.policy import ExitPolicy

# Prompt positions run at a time: enough to be bound by compute, little waste on short prompts.
PREFILL_CHUNK = 64


def _emit(logits_BC, exit_index, keys_B, sampling, token_ids) -> Emission:
    """Chooses each row's token; a reduced head's last class is never chosen."""
    log_probs = jax.nn.log_softmax(logits_BC, axis=-1)
    real = logits_BC if token_ids is None else logits_BC[:, :-1]
    choice = samplings.choose(keys_B, real, sampling)
    return Emission(
        token=choice if token_ids is None else token_ids[choice],
        exit=jnp.full_like(choice, exit_index),
        log_prob=jnp.take_along_axis(log_probs, choice[:, None], axis=1)[:, 0],
    )


@functools.partial(jax.jit, static_argnames=("model", "sampling"), donate_argnames="state")
def prefill(
    params: base.Params,
    state: DecodeState,
    stop_ids: jax.Array,
    *,
    model: MultiExit,
    sampling: Sampling,
) -> DecodeState:
    """Runs the prompts at full depth and emits each row's first token.

    Prompts go through in chunks, as many as the longest needs, so one program serves every
    prompt length that fits the cache.

    Args:
      stop_ids: int32 [n], tokens that end a row.
    """
    bound = model.bind(params)
    batch, slots = state.tokens_BS.shape
    width = model.config.width

    def chunk(index, carry):
        cache, last_BD = carry
        start = index * PREFILL_CHUNK
        tokens = jax.lax.dynamic_slice_in_dim(state.tokens_BS, start, PREFILL_CHUNK, axis=1)
        positions = jnp.broadcast_to((start + jnp.arange(PREFILL_CHUNK))[None], tokens.shape)
        hidden, context = bound.backbone.stem({"tokens": tokens, "positions": positions})
        filled = jnp.full(batch, start)
        # A chunk runs because some row reaches it; the rows that do not are overwritten later.
        active = jnp.broadcast_to(start < state.length_B.max(), (batch,))
        rows: caches.Cache = {}
        for e, segment in enumerate(model.segments):
            hidden, new_rows = _run_segment(bound, segment, hidden, context, cache, filled, active)
            rows |= new_rows
            if e < len(bound.heads) and bound.heads[e].has_block:
                rows[f"exit/{segment[1]}"] = bound.heads[e].block.keys_values(hidden, context)
        offset = state.length_B - 1 - start
        here = (offset >= 0) & (offset < PREFILL_CHUNK)
        at_end = hidden[jnp.arange(batch), jnp.clip(offset, 0, PREFILL_CHUNK - 1)]
        return caches.write(cache, rows, filled), jnp.where(here[:, None], at_end, last_BD)

    chunks = (state.length_B.max() + PREFILL_CHUNK - 1) // PREFILL_CHUNK
    last_BD = jnp.zeros((batch, width), jax.tree.leaves(params)[0].dtype)
    cache, last_BD = jax.lax.fori_loop(0, chunks, chunk, (state.cache, last_BD))
    state = dataclasses.replace(state, cache=cache)
    logits = bound.backbone.readout(last_BD)
    emission = _emit(logits, len(model.segments) - 1, row_keys(state), sampling, None)
    state = count(state, len(model.segments) - 1, ~state.finished_B)
    return append(state, emission, ~state.finished_B, stop_ids)


@functools.partial(jax.jit, static_argnames=("model", "sampling"), donate_argnames="state")
def decode(
    params: base.Params,
    state: DecodeState,
    policy: ExitPolicy | None,
    stop_ids: jax.Array,
    steps: jax.Array,
    *,
    model: MultiExit,
    sampling: Sampling,
) -> DecodeState:
    """Up to `steps` more tokens for every unfinished row.

    Args:
      policy: when rows leave; None compiles the plain full model, without any exit in it.
      stop_ids: int32 [n], tokens that end a row.
      steps: int32 scalar; not static, so streaming in small portions compiles nothing new.

    Raises:
      ValueError: the policy is for another number of exits.
    """
    bound = model.bind(params)
    tables = ()
    if policy is not None:
        policy.check(exits=len(model.exits.points))
        tables = bound.exit_tables()

    def unfinished(carry):
        state, step = carry
        return (step < steps) & ~state.finished_B.all()

    def one_token(carry):
        state, step = carry
        return _step(model, bound, tables, policy, stop_ids, sampling, state), step + 1

    state, _ = jax.lax.while_loop(unfinished, one_token, (state, jnp.int32(0)))
    return state


def _step(
    model: MultiExit,
    bound: Bound,
    tables: tuple[jax.Array, ...],
    policy: ExitPolicy | None,
    stop_ids: jax.Array,
    sampling: Sampling,
    state: DecodeState,
) -> DecodeState:
    """One token for every unfinished row."""
    batch = state.tokens_BS.shape[0]
    running = ~state.finished_B
    token = jnp.take_along_axis(state.tokens_BS, state.length_B[:, None], axis=1)
    hidden, context = bound.backbone.stem({"tokens": token, "positions": state.length_B[:, None]})
    # The position being run is about to be cached; what it emits stands one further.
    filled = state.length_B
    state = dataclasses.replace(state, length_B=filled + running)
    keys_B = row_keys(state)
    cache, rows = state.cache, {}
    active, emission = running, Emission.none(batch)
    final = len(model.segments) - 1

    for e, (first, last) in enumerate(model.segments):
        before = hidden
        hidden, new_rows = _run_segment(
            bound, (first, last), hidden, context, cache, filled, active
        )
        rows |= new_rows
        if e == final or policy is None:
            continue

        evaluated, leaving, left, head_rows = _consult(
            bound,
            e,
            tables[e],
            policy,
            sampling,
            hidden=hidden,
            before=before,
            context=context,
            past=cache.get(f"exit/{last}"),
            filled_B=filled,
            active_B=active,
            keys_B=keys_B,
        )
        emission = left.where(leaving, emission)
        active = active & ~leaving
        state = count(state, e, evaluated)
        if head_rows is not None:
            rows[f"exit/{last}"] = head_rows

    def read_out(hidden):
        return _emit(bound.backbone.readout(hidden[:, 0]), final, keys_B, sampling, None)

    full = jax.lax.cond(active.any(), read_out, lambda _: Emission.none(batch), hidden)
    emission = full.where(active, emission)
    state = count(state, final, active)
    state = dataclasses.replace(state, cache=caches.write(cache, rows, filled))
    return append(state, emission, running, stop_ids)


def _run_segment(
    bound: Bound,
    segment: tuple[int, int],
    hidden_BTD: jax.Array,
    context,
    cache: caches.Cache,
    filled_B: jax.Array,
    active_B: jax.Array,
) -> tuple[jax.Array, caches.Cache]:
    """Runs the segment's blocks for the active rows; the others hold still.

    All that reads the cache stands in a branch, even where it is always taken: outside one, XLA
    copies a cache that is written later.

    Returns:
      (hidden states, new keys and values of the segment's blocks, for every row).
    """
    blocks = {f"block/{i}": bound.backbone.blocks[str(i)] for i in range(*segment)}

    def run(hidden):
        rows = {}
        for name, block in blocks.items():
            deeper, rows[name] = block(hidden, context, cache[name], filled_B)
            hidden = jnp.where(active_B[:, None, None], deeper, hidden)
        return hidden, rows

    def propagate(hidden):
        return hidden, {name: b.keys_values(hidden, context) for name, b in blocks.items()}

    return jax.lax.cond(active_B.any(), run, propagate, hidden_BTD)


def _consult(
    bound: Bound,
    exit_index: int,
    table: jax.Array,
    policy: ExitPolicy,
    sampling: Sampling,
    *,
    hidden: jax.Array,
    before: jax.Array,
    context,
    past,
    filled_B: jax.Array,
    active_B: jax.Array,
    keys_B: jax.Array,
):
    """Asks one exit which rows leave, and with what token.

    Args:
      hidden, before: [B, 1, D], at this exit and at the one before it.
      past: the head's own cached keys and values, if it has a block.

    Returns:
      (rows whose head was evaluated, rows that leave, their emission, the head's new keys and
      values or None).
    """
    head = bound.heads[exit_index]
    by_hidden = policy.confidence in confidences.FROM_HIDDEN
    wanted = active_B & policy.can_leave(exit_index)
    if by_hidden:
        score = confidences.similarity(before, hidden)[:, 0]
        wanted &= policy.leaves(exit_index, score)

    def evaluate(hidden):
        features, rows = head.features(hidden, context, past, filled_B)
        logits = base.logits(features[:, 0], table)
        leaving = wanted
        if not by_hidden:
            summary = confidences.summarize(logits, has_rest=bound.token_ids is not None)
            score = confidences.from_logits(policy.confidence, summary)
            leaving = wanted & policy.leaves(exit_index, score)
        return leaving, _emit(logits, exit_index, keys_B, sampling, bound.token_ids), rows

    def skip(hidden):
        rows = head.block.keys_values(hidden, context) if head.has_block else None
        return jnp.zeros_like(wanted), Emission.none(len(wanted)), rows

    leaving, emission, rows = jax.lax.cond(wanted.any(), evaluate, skip, hidden)
    return wanted, leaving, emission, rows
