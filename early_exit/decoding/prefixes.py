"""Prompts that begin alike are read once: keys and values of prompts, kept for those that follow.

The one idea: what a state holds of a prompt's first positions depends on these alone, and what lies
behind them is overwritten before it is read. So the state after a whole prompt serves any other
that begins with the same chunks.
"""

import collections
import dataclasses
import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from early_exit import sharding
from early_exit.decoding import drafters
from early_exit.decoding.mode import Mode
from early_exit.decoding.state import DecodeState, in_place
from early_exit.exits.multi_exit import MultiExit

# By how many positions of prompts had been read: by tap, that of the last of them, [B, D].
Taps = dict[int, dict[str, jax.Array]]


@dataclasses.dataclass(frozen=True)
class _Kept:
    """Of one prompt: its tokens, keys and values as a batch of one row, and taps at its chunks."""

    tokens: np.ndarray
    rows: tuple
    taps: Taps

    @property
    def bytes(self) -> int:
        return sum(x.nbytes for x in jax.tree.leaves((self.rows, self.taps)))


class Prefixes:
    """The prompts that were read last, as many as there is room for."""

    def __init__(self, model: MultiExit, mode: Mode, most_bytes: int, chunk: int):
        """
        Args:
          most_bytes: of all that is kept; 0 keeps nothing.
          chunk: positions that are read together; prompts are alike by whole chunks.
        """
        self._static = {"model": model, "mode": mode}
        self._tapped = bool(drafters.taps(model, mode))
        # An encoder reads a text both ways: how it begins says nothing by itself.
        self._most, self._chunk = 0 if model.config.encodes_prompts else most_bytes, chunk
        self._kept: collections.OrderedDict[bytes, _Kept] = collections.OrderedDict()

    @property
    def keeps(self) -> bool:
        return self._most > 0

    @property
    def bytes(self) -> int:
        """What is kept now."""
        return sum(kept.bytes for kept in self._kept.values())

    def begun(
        self, state: DecodeState, prompts: Sequence[Sequence[int]]
    ) -> tuple[DecodeState, int, Taps]:
        """(a state of unread prompts with what is known of them, how many positions of each that
        is, the taps there)."""
        found = [self._longest(prompt) for prompt in prompts]
        read = min(length for length, _ in found)
        sources = [kept for _, kept in found if kept]
        if read and self._tapped:
            every = set.intersection(*(set(kept.taps) for kept in sources))
            read = max((n for n in every if n <= read), default=0)
        if not read:
            return state, 0, {}
        rows, taps = [kept.rows for kept in sources], {}
        if self._tapped:
            at = [kept.taps[read] for kept in sources]
            taps = {name: jnp.concatenate([tap[name] for tap in at]) for name in at[0]}
        return _begun(state, rows, taps, jnp.int32(read), **self._static), read, {read: taps}

    def keep(self, prompt: Sequence[int], state: DecodeState, row: int, taps: Taps) -> None:
        """Keeps what a row of a state that has read it knows of a prompt.

        Args:
          taps: by how many positions had been read, the taps of the last of them, [B, D].
        """
        tokens = np.asarray(prompt, np.int32)
        tokens = tokens[: len(tokens) // self._chunk * self._chunk]
        if not self.keeps or not len(tokens):
            return
        one = slice(row, row + 1)
        rows = jax.tree.map(lambda x: x[one], (state.cache, state.kept))
        own = jax.tree.map(lambda x: x[one], {n: x for n, x in taps.items() if n <= len(tokens)})
        # One that this one begins with says nothing more, but for its taps.
        for name, other in list(self._kept.items()):
            if np.array_equal(tokens[: len(other.tokens)], other.tokens):
                own = other.taps | own
                del self._kept[name]
        self._kept[tokens.tobytes()] = _Kept(tokens, rows, own)
        while self.bytes > self._most:
            self._kept.popitem(last=False)

    def _longest(self, prompt: Sequence[int]) -> tuple[int, _Kept | None]:
        """How many positions of a prompt are known, at least one being left to read."""
        tokens = np.asarray(prompt, np.int32)
        best, source, used = 0, None, b""
        for name, kept in self._kept.items():
            size = min(len(kept.tokens), len(tokens) - 1)
            differs = np.flatnonzero(kept.tokens[:size] != tokens[:size])
            alike = int(differs[0] if len(differs) else size) // self._chunk * self._chunk
            if alike > best:
                best, source, used = alike, kept, name
        if source is not None:
            self._kept.move_to_end(used)
        return best, source


@functools.partial(jax.jit, static_argnames=("model", "mode"), donate_argnames="state")
@sharding.laid_out
def _begun(
    state: DecodeState, rows: list, taps: dict, read: jax.Array, *, model: MultiExit, mode: Mode
) -> DecodeState:
    """The state of unread prompts as if so many positions of each had been read."""

    def placed(unread, *known):
        """Known rows in an array of another number of slots."""
        sizes = zip(unread.shape[1:], known[0].shape[1:], strict=True)
        inner = (slice(None), *(slice(0, min(pair)) for pair in sizes))
        return unread.at[inner].set(jnp.concatenate([x[inner] for x in known]))

    cache, kept = jax.tree.map(placed, (state.cache, state.kept), *rows)
    begun = {
        drafter.name: drafter.begun(state.kept[drafter.name], kept[drafter.name])
        for drafter in drafters.of(model, mode)
    }
    slot = state.pending_slots(read - 1)
    state = state.change(
        cache=cache,
        kept=begun,
        filled_BE=jnp.broadcast_to(read, state.filled_BE.shape),
        taps={name: x.at[:, slot].set(taps[name]) for name, x in state.taps.items()},
    )
    return in_place(state)
