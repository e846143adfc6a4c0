"""What a decode is at any moment: one frozen pytree with static shapes.

The one idea: how far each row's positions have come is one small table, `filled_BE`: segment e
has keys and values of the first `filled[e]` positions. It never rises with e. Where a row stands,
which positions wait in front of which segment, and what a rejected draft takes back all follow
from it.
"""

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding

from early_exit import sharding
from early_exit.backbones import base
from early_exit.backbones.cached_attention import CACHE_CHUNK
from early_exit.consult import Said
from early_exit.data.pairs import row_of
from early_exit.decoding import cache as caches
from early_exit.decoding import drafters
from early_exit.decoding.mode import Mode
from early_exit.exits.multi_exit import MultiExit

# A prompt.
Ids = Sequence[int] | np.ndarray


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Counts:
    """What a decode has done so far, per row; E + 1 segments, and as many heads.

    Attributes:
      positions_BE: int32, positions run through each segment, the prompt's excepted.
      read_BE: int32, cached positions that those passes have read.
      passes_BEN: float32, passes through each segment by width (`Mode.widths`); rows that ran
        together have a share each, so that the sum over rows is the number of passes.
      evaluations_BE: int32, predictions asked of each head, the final readout last (the one after
        the prompt included).
      head_passes_BE: float32, passes through each head, shared out likewise.
      draft_steps_B: float32, steps of the recurrent exit, shared out likewise.
      drafted_BW, accepted_BW: int32, drafts by their place since the last verified token: how
        many were checked by the full model, and how many it agreed with.
    """

    positions_BE: jax.Array
    read_BE: jax.Array
    passes_BEN: jax.Array
    evaluations_BE: jax.Array
    head_passes_BE: jax.Array
    draft_steps_B: jax.Array
    drafted_BW: jax.Array
    accepted_BW: jax.Array

    @classmethod
    def zero(cls, batch: int, segments: int, mode: Mode) -> "Counts":
        ints = functools.partial(jnp.zeros, dtype=jnp.int32)
        return cls(
            positions_BE=ints((batch, segments)),
            read_BE=ints((batch, segments)),
            passes_BEN=jnp.zeros((batch, segments, len(mode.widths))),
            evaluations_BE=ints((batch, segments)),
            head_passes_BE=jnp.zeros((batch, segments)),
            draft_steps_B=jnp.zeros(batch),
            drafted_BW=ints((batch, mode.capacity)),
            accepted_BW=ints((batch, mode.capacity)),
        )


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Encoded:
    """The prompts of rows whose network `encodes_prompts`.

    Attributes:
      tokens_BS: int32, as many slots as the answers have.
      memory: what the decoder's blocks look at of them; its rows are 0 before the encoder has run.
    """

    tokens_BS: jax.Array
    memory: base.Memory


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class DecodeState:
    """Everything a decode needs to go on; B rows of S positions, W of them under way.

    Attributes:
      tokens_BS: int32, the prompt, then what was decoded.
      newest_B: int32, index of the newest token.
      prompt_B: int32, length of the prompt.
      limit_B: int32, a row ends when it has this many tokens.
      finished_B: bool, whether the row has met its limit or a stop token.
      exit_BS: int32, where each token came from: index of an exit (E is the final one), the mark of
        another drafter (`drafters.base.Drafter`), −1 for the prompt.
      log_prob_BS: float32, the token's log-probability at temperature 1, at the exit that decided
        about it: the final one in verified decoding.
      filled_BE: int32 [B, E + 1], positions whose keys and values each segment has.
      hidden_BWD: the hidden states of the positions under way, as deep as they have come; the one
        of position p lies at p mod W.
      taps: by block (1-based, as text), its output at the positions under way, kept like
        `hidden_BWD`: those blocks that a drafter reads.
      kept: by drafter, what it keeps for each row.
      said: what the exits asked so far have said of the newest position, [B].
      account_B: float32, blocks that a policy's budget has left over.
      rate_B: float32, tokens that a row has had lately for what a pass of one position costs.
      worth_BN: float32 [B, N], what asking each source of drafts has gained lately, by its mark.
      counts: what was done so far.
      cache: keys and values (`decoding.cache`).
      encoded: the prompts, where an encoder reads them; else None.
      keys_B: a PRNG key per row; a row draws the same whatever rows stand beside it.
    """

    tokens_BS: jax.Array
    newest_B: jax.Array
    prompt_B: jax.Array
    limit_B: jax.Array
    finished_B: jax.Array
    exit_BS: jax.Array
    log_prob_BS: jax.Array
    filled_BE: jax.Array
    hidden_BWD: jax.Array
    taps: dict[str, jax.Array]
    kept: dict[str, Any]
    said: Said
    account_B: jax.Array
    rate_B: jax.Array
    worth_BN: jax.Array
    counts: Counts
    cache: caches.Cache
    encoded: Encoded | None
    keys_B: jax.Array

    @property
    def stage_B(self) -> jax.Array:
        """int32 [B], the segment that the newest position of each row waits for."""
        return (self.filled_BE > self.newest_B[:, None]).sum(axis=1)

    @property
    def chosen_B(self) -> jax.Array:
        """int32 [B], the place of each row's last token that the full model has chosen.

        What stands behind it was said by exits or drafters, and would wait for its deeper blocks,
        were the row alone: in a batch some of it may have gone along with other rows.
        """
        final, places = self.filled_BE.shape[1] - 1, jnp.arange(self.exit_BS.shape[1])
        return jnp.where(self.exit_BS == final, places[None], 0).max(axis=1)

    @property
    def progress_B(self) -> jax.Array:
        """float32 [B], which part of its new tokens each row has."""
        new = self.newest_B + 1 - self.prompt_B
        return new / (self.limit_B - self.prompt_B)

    def pending_slots(self, positions: jax.Array) -> jax.Array:
        return positions % self.hidden_BWD.shape[1]

    def change(self, **fields) -> "DecodeState":
        return dataclasses.replace(self, **fields)

    def count(self, **added) -> "DecodeState":
        """The state after adding to some of its counts."""
        counts = {name: getattr(self.counts, name) + more for name, more in added.items()}
        return self.change(counts=dataclasses.replace(self.counts, **counts))


@jax.jit
@sharding.laid_out
def rows_of(state: DecodeState, index: jax.Array, running: jax.Array) -> DecodeState:
    """Some rows of a state, in another order; those from `running` on have ended."""
    state = jax.tree.map(lambda x: x[index], state)
    finished_B = state.finished_B | (jnp.arange(len(index)) >= running)
    return in_place(state.change(finished_B=finished_B))


def check_ids(model: MultiExit, ids: Sequence[int], name: str) -> None:
    """Raises ValueError where `ids`, called `name`, are no row of the model's token ids."""
    try:
        found = np.asarray(ids)
    except ValueError:  # lists of different lengths
        found = np.asarray(None)
    if found.ndim != 1 or found.size and not np.issubdtype(found.dtype, np.integer):
        raise ValueError(f"{name} must be one list of token ids, not {ids!r:.60}")
    if found.size and not 0 <= found.min() <= found.max() < model.config.vocab_size:
        raise ValueError(
            f"the token ids of {name} go from {found.min()} to {found.max()}, but the model knows "
            f"0 to {model.config.vocab_size - 1}; use the model's own tokenizer"
        )


def check_prompts(
    model: MultiExit, prompts: Sequence[Ids], max_new_tokens: int | Sequence[int]
) -> list[int]:
    """How many new tokens each prompt asks for; see `initial_state`.

    Raises:
      ValueError: no prompts, or the first one that cannot be decoded.
    """
    if not len(prompts):
        raise ValueError("there are no prompts; give at least one")
    asked = np.asarray(max_new_tokens)
    if asked.shape not in ((), (len(prompts),)) or not np.issubdtype(asked.dtype, np.integer):
        raise ValueError(
            f"max_new_tokens must be an integer, or one for each of {len(prompts)} prompts, not "
            f"{max_new_tokens!r:.60}"
        )
    asked = np.broadcast_to(asked, len(prompts)).tolist()
    for i, (prompt, new) in enumerate(zip(prompts, asked, strict=True)):
        check_ids(model, prompt, f"prompt {i}")
        if not len(prompt):
            raise ValueError(f"prompt {i} is empty; give at least one token")
        if new < 1:
            raise ValueError(f"prompt {i} asks for {new} new tokens; ask for at least 1")
        row, context = len(row_of(model.config, prompt)), model.config.context_length
        if row + new > context:
            raise ValueError(
                f"prompt {i} and its answer need {row + new} positions but the model's context is "
                f"{context}; shorten the prompt or ask for fewer new tokens"
            )
        if len(prompt) > context:
            raise ValueError(
                f"prompt {i} has {len(prompt)} tokens but the model reads {context}; shorten it"
            )
    return asked


def initial_state(
    model: MultiExit,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int | Sequence[int],
    *,
    mode: Mode,
    key: jax.Array,
    dtype=jnp.float32,
    slots: int | None = None,
    mesh: Mesh | None = None,
) -> DecodeState:
    """State for prompts of any lengths, nothing run yet.

    Args:
      max_new_tokens: at least 1; one number, or one per prompt.
      key: a PRNG key, split over the rows, or one key per row [B].
      slots: cache slots to allocate; by default the smallest bucket that holds the longest row.
      mesh: where the parameters lie, and so the state (`placed`); one device if not given.

    Raises:
      ValueError: no prompt, an empty one, a token outside the vocabulary, no new tokens, more
        positions than the context, or slots that do not fit.
    """
    max_new_tokens = check_prompts(model, prompts, max_new_tokens)
    rows = [row_of(model.config, prompt) for prompt in prompts]
    limits = [len(row) + new for row, new in zip(rows, max_new_tokens, strict=True)]
    # A pass writes as many rows as it is wide, the last of them behind the newest token.
    needed = max(max(limits) + mode.capacity - 1, *map(len, prompts))
    slots = caches.bucket(needed) if slots is None else slots
    if slots < needed or slots % CACHE_CHUNK:
        raise ValueError(
            f"slots={slots} must be a multiple of {CACHE_CHUNK} that holds the longest row's "
            f"{needed} positions"
        )
    lengths = np.array([len(row) for row in rows], np.int32)
    encoded = None
    if model.config.encodes_prompts:
        read = np.array([len(prompt) for prompt in prompts])
        encoded = _filled(prompts, slots), np.arange(slots)[None] < read[:, None]
    given = _filled(rows, slots), lengths, np.array(limits, np.int32), encoded, key
    return _begun(*given, model=model, mode=mode, dtype=jnp.dtype(dtype), mesh=mesh)


def _filled(rows: Sequence[Ids], slots: int) -> np.ndarray:
    """int32 [B, slots], the rest being 0."""
    tokens = np.zeros((len(rows), slots), np.int32)
    for into, row in zip(tokens, rows, strict=True):
        into[: len(row)] = row
    return tokens


# In one program: on a mesh no device has a whole cache, even for a moment.
@functools.partial(jax.jit, static_argnames=("model", "mode", "dtype", "mesh"))
def _begun(
    tokens, lengths, limits, encoded, key, *, model: MultiExit, mode: Mode, dtype, mesh: Mesh | None
) -> DecodeState:
    (batch, slots), segments = tokens.shape, len(model.segments)
    points = model.exits.points if model.exits.head == "layer" else ()

    def pending():
        return jnp.zeros((batch, mode.capacity, model.config.width), dtype)

    def zeros(*shape):
        return jnp.zeros((batch, *shape), jnp.int32)

    if encoded is not None:
        texts, real = map(jnp.array, encoded)
        rows = caches.empty(model.config, (), batch, slots, dtype)
        encoded = Encoded(texts, base.Memory(rows, real))
    state = DecodeState(
        tokens_BS=jnp.array(tokens),
        newest_B=jnp.array(lengths) - 1,
        prompt_B=jnp.array(lengths),
        limit_B=jnp.array(limits),
        finished_B=jnp.zeros(batch, bool),
        exit_BS=jnp.full((batch, slots), -1, jnp.int32),
        log_prob_BS=jnp.zeros((batch, slots), jnp.float32),
        filled_BE=zeros(segments),
        hidden_BWD=pending(),
        taps={str(block): pending() for block in drafters.taps(model, mode)},
        kept={
            drafter.name: drafter.start(model, batch, slots, dtype)
            for drafter in drafters.of(model, mode)
        },
        said=Said.nothing((batch,)),
        account_B=jnp.zeros(batch, jnp.float32),
        rate_B=jnp.ones(batch, jnp.float32),
        worth_BN=jnp.tile(drafters.credits(segments - 1), (batch, 1)),
        counts=Counts.zero(batch, segments, mode),
        cache=caches.empty(model.config, points, batch, slots, dtype),
        encoded=encoded,
        keys_B=key if key.shape == (batch,) else jax.random.split(key, batch),
    )
    if mesh is None:
        return state
    return jax.lax.with_sharding_constraint(state, placed(state, mesh))


def placed(state: DecodeState, mesh: Any) -> DecodeState:
    """The shardings of a state: its rows as those of a batch, the heads of caches over `tensor`.

    Args:
      state: arrays, or shapes.
      mesh: a `Mesh`, or the abstract one of it.
    """

    def of(x) -> NamedSharding:
        if x.ndim == 4:  # caches, and nothing else
            return NamedSharding(mesh, sharding.cache_spec(mesh, *x.shape[:2]))
        return NamedSharding(mesh, sharding.row_spec(mesh, x.shape[0]))

    return jax.tree.map(of, state)


def in_place(state: DecodeState) -> DecodeState:
    """Keeps a state where it lies (`placed`), inside a program; on one device nothing is done.

    In a loop, at both ends of a turn: left free in between, the compiler carries heads that
    `tensor` does not divide in another split, and brings whole caches together afterwards.
    """
    mesh = jax.sharding.get_abstract_mesh()
    return state if mesh.empty else jax.lax.with_sharding_constraint(state, placed(state, mesh))
