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
from collections.abc import Sequence

import jax
import jax.numpy as jnp

from early_exit import confidence as confidences
from early_exit.backbones import base
from early_exit.exits.multi_exit import Bound, MultiExit
from early_exit.inference import cache as caches
from early_exit.inference import sampling as samplings
from early_exit.inference.sampling import Sampling
from early_exit.policy import ExitPolicy

# Prompt positions run at a time: enough to be bound by compute, little waste on short prompts.
PREFILL_CHUNK = 64


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
      ValueError: an empty prompt, no new tokens, or more positions than the context.
    """
    batch = len(prompts)
    if isinstance(max_new_tokens, int):
        max_new_tokens = [max_new_tokens] * batch
    for i, (prompt, new) in enumerate(zip(prompts, max_new_tokens, strict=True)):
        if not len(prompt):
            raise ValueError(f"prompt {i} is empty; give at least one token")
        if new < 1:
            raise ValueError(f"prompt {i} asks for {new} new tokens; ask for at least 1")
    limits = [len(prompt) + new for prompt, new in zip(prompts, max_new_tokens, strict=True)]
    needed = caches.bucket(max(limits), model.config.context_length)
    slots = needed if slots is None else slots
    if slots < max(limits):
        raise ValueError(f"slots={slots} do not hold the longest row's {max(limits)} positions")
    points = model.exits.points if model.exits.head == "layer" else ()
    tokens = jnp.zeros((batch, slots), jnp.int32)
    for i, prompt in enumerate(prompts):
        tokens = tokens.at[i, : len(prompt)].set(jnp.asarray(prompt, jnp.int32))
    return DecodeState(
        tokens_BS=tokens,
        length_B=jnp.array([len(prompt) for prompt in prompts], jnp.int32),
        limit_B=jnp.array(limits, jnp.int32),
        finished_B=jnp.zeros(batch, bool),
        exit_BS=jnp.full((batch, slots), -1, jnp.int32),
        log_prob_BS=jnp.zeros((batch, slots), jnp.float32),
        evaluations_BE=jnp.zeros((batch, len(model.segments)), jnp.int32),
        cache=caches.empty(model.config, caches.names(model.config, points), batch, slots, dtype),
        keys_B=key if key.shape == (batch,) else jax.random.split(key, batch),
    )


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


def _append(state: DecodeState, emission: Emission, active_B, stop_ids) -> DecodeState:
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


def _row_keys(state: DecodeState) -> jax.Array:
    """One key per row and position."""
    return jax.vmap(jax.random.fold_in)(state.keys_B, state.length_B)


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
        rows: caches.Cache = {}
        for e, (first, last) in enumerate(model.segments):
            for i in range(first, last):
                name = f"block/{i}"
                hidden, rows[name] = bound.backbone.blocks[str(i)](
                    hidden, context, cache[name], filled
                )
            if e < len(bound.heads) and bound.heads[e].has_block:
                rows[f"exit/{last}"] = bound.heads[e].block.keys_values(hidden, context)
        offset = state.length_B - 1 - start
        here = (offset >= 0) & (offset < PREFILL_CHUNK)
        at_end = hidden[jnp.arange(batch), jnp.clip(offset, 0, PREFILL_CHUNK - 1)]
        return caches.write(cache, rows, filled), jnp.where(here[:, None], at_end, last_BD)

    chunks = (state.length_B.max() + PREFILL_CHUNK - 1) // PREFILL_CHUNK
    last_BD = jnp.zeros((batch, width), jax.tree.leaves(params)[0].dtype)
    cache, last_BD = jax.lax.fori_loop(0, chunks, chunk, (state.cache, last_BD))
    state = dataclasses.replace(state, cache=cache)
    logits = bound.backbone.readout(last_BD)
    emission = _emit(logits, len(model.segments) - 1, _row_keys(state), sampling, None)
    state = _count(state, len(model.segments) - 1, ~state.finished_B)
    return _append(state, emission, ~state.finished_B, stop_ids)


def _count(state: DecodeState, exit_index: int, rows_B: jax.Array) -> DecodeState:
    counts = state.evaluations_BE.at[:, exit_index].add(rows_B.astype(jnp.int32))
    return dataclasses.replace(state, evaluations_BE=counts)


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
    """
    bound = model.bind(params)
    tables = () if policy is None else bound.exit_tables()

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
    keys_B = _row_keys(state)
    cache, rows = state.cache, {}
    active, emission = running, Emission.none(batch)
    final = len(model.segments) - 1

    for e, (first, last) in enumerate(model.segments):
        before = hidden
        names = [f"block/{i}" for i in range(first, last)]
        blocks = [bound.backbone.blocks[str(i)] for i in range(first, last)]

        def run(hidden, blocks=blocks, names=names, active=active):
            new_rows = []
            for block, name in zip(blocks, names, strict=True):
                deeper, row = block(hidden, context, cache[name], filled)
                hidden = jnp.where(active[:, None, None], deeper, hidden)
                new_rows.append(row)
            return hidden, new_rows

        def propagate(hidden, blocks=blocks):
            return hidden, [block.keys_values(hidden, context) for block in blocks]

        if e == 0:  # some row is running, or the loop would have ended
            hidden, new_rows = run(hidden)
        else:
            hidden, new_rows = jax.lax.cond(active.any(), run, propagate, hidden)
        rows.update(zip(names, new_rows, strict=True))
        if e == final or policy is None:
            continue

        consult = functools.partial(
            _consult, bound, tables[e], e, policy, sampling, context, cache.get(f"exit/{last}")
        )
        evaluated, leaving, left, head_rows = consult(before, hidden, filled, active, keys_B)
        emission = left.where(leaving, emission)
        active = active & ~leaving
        state = _count(state, e, evaluated)
        if head_rows is not None:
            rows[f"exit/{last}"] = head_rows

    def read_out(hidden):
        return _emit(bound.backbone.readout(hidden[:, 0]), final, keys_B, sampling, None)

    full = jax.lax.cond(active.any(), read_out, lambda _: Emission.none(batch), hidden)
    emission = full.where(active, emission)
    state = _count(state, final, active)
    if policy is None:  # the heads' own blocks were not run, nor will be
        rows = {name: rows.get(name) for name in cache if name in rows}
    written = caches.write({name: cache[name] for name in rows}, rows, filled)
    state = dataclasses.replace(state, cache={**cache, **written})
    return _append(state, emission, running, stop_ids)


def _consult(
    bound: Bound,
    table: jax.Array,
    exit_index: int,
    policy: ExitPolicy,
    sampling: Sampling,
    context,
    past,
    before: jax.Array,
    hidden: jax.Array,
    filled_B: jax.Array,
    active_B: jax.Array,
    keys_B: jax.Array,
):
    """Asks one exit which rows leave, and with what token.

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
