"""Matrices in panels, for few positions on a CPU.

The one idea: a pass of a few positions should take little more than reading the weights once. Where
more than one row meets a large matrix, XLA's CPU backend rearranges the matrix before it
multiplies, which takes as long again. Cut into panels of 64 columns, each in one piece, it is
multiplied panel by panel, and what is rearranged never leaves the cache.

Measured with 60 matrices of 576 × 1536, float32, two cores, in times of one row as it was: 2, 4, 5,
8 and 10 rows take 1.8, 1.7, 1.6, 1.9 and 2.0 as they are and 1.1, 1.2, 1.3, 1.7 and 1.9 in panels
(with AVX2 alone: 1.6, 1.3, 1.3, 1.6 and 1.5; 0.9, 0.8, 0.9, 1.2 and 1.4). From 16 rows on panels
lose, so prompts are read without them, and both are kept.
"""

import math
import pathlib
import re
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from early_exit import sharding

COLUMNS = 64
# Positions of all rows that meet panels at all, and in one product: more of them are twice as slow.
MOST, _AT_ONCE = 10, 5
# Beside the paths of layers in blocks: the output matrix.
OUTPUT = "output"

# Where the system says how much memory is left.
MEMORY = pathlib.Path("/proc/meminfo")

Panels = dict[str, jax.Array]
# By the identities of the arrays that they were cut from, as long as these live.
_known: dict[tuple[int, ...], tuple[list[weakref.ref], Panels]] = {}


def cut(matrix_IO: jax.Array) -> jax.Array:
    """[I, O] → [⌈O / 64⌉, I, 64], zeros where the last panel has no columns."""
    inputs, outputs = matrix_IO.shape
    padded = jnp.pad(matrix_IO, ((0, 0), (0, -outputs % COLUMNS)))
    return padded.reshape(inputs, -1, COLUMNS).swapaxes(0, 1)


def product(x: jax.Array, panels: jax.Array, outputs: int, **how) -> jax.Array:
    """[…, I] times the matrix [I, O] that the panels were cut from: […, O].

    Args:
      outputs: O.
      how: further arguments of `jax.lax.dot_general`.
    """
    rows = x.reshape(-1, x.shape[-1])
    groups = jnp.array_split(rows, -(-len(rows) // _AT_ONCE))

    def multiplied(rows):
        each = jnp.broadcast_to(rows, (len(panels), *rows.shape))
        found = jax.lax.dot_general(each, panels, (((2,), (1,)), ((0,), (0,))), **how)
        return found.swapaxes(0, 1).reshape(len(rows), -1)

    found = jnp.concatenate([multiplied(group) for group in groups])
    return found[:, :outputs].reshape(*x.shape[:-1], outputs)


def pays(x: jax.Array) -> bool:
    """Whether so many positions are multiplied faster in panels."""
    return math.prod(x.shape[:-1]) <= MOST


def of(params: dict[str, Any], module: Callable[[], nnx.Module]) -> Panels:
    """The panels of the linear layers in a network's blocks, and of its output matrix.

    Cut once for the same arrays. Empty where they would not be used: on other devices than one
    CPU, and for other types than float32, which it multiplies natively; and where they would take
    more than half of the memory that is left.

    Args:
      module: → the network with these parameters.
    """
    leaves = jax.tree.leaves(params)
    on_devices = all(isinstance(x, jax.Array) for x in leaves)  # else each call copies them anyway
    if not on_devices or sharding.mesh_of(params) is not None:
        return {}
    if {d.platform for d in leaves[0].devices()} != {"cpu"} or leaves[0].dtype != jnp.float32:
        return {}
    key = tuple(map(id, leaves))
    references, panels = _known.get(key, ([], {}))
    if not references or any(known() is not x for known, x in zip(references, leaves, strict=True)):
        has_room = sum(x.nbytes for x in leaves) < _memory_left() / 2
        references = list(map(weakref.ref, leaves))
        panels = _cut_all(module()) if has_room else {}
        _known[key] = references, panels
        weakref.finalize(leaves[0], _known.pop, key, None)
    return panels


def _memory_left() -> float:
    """Bytes; without end where the system does not say."""
    said = MEMORY.exists() and re.search(r"MemAvailable:\s*(\d+) kB", MEMORY.read_text())
    return 1024 * int(said[1]) if said else math.inf


def _cut_all(module: nnx.Module) -> Panels:
    cutting = jax.jit(cut)
    panels = {path: cutting(linear.kernel[...]) for path, linear in _linears(module)}
    return panels | {OUTPUT: cutting(module.output_table().T)}


def attach(module: nnx.Module, panels: Panels) -> None:
    """From now on the network multiplies few positions by its panels. Inside the jitted function.

    Args:
      panels: what `of` has said of this network.
    """
    for path, linear in _linears(module):
        linear.dot_general = _instead(panels[path])
    module.output_panels = panels[OUTPUT]


def _instead(panels: jax.Array):
    """In place of `jax.lax.dot_general` in a linear layer."""

    def dot_general(x, kernel, dimensions, **how):
        # A layer that computes in another type than its weights have has turned them into it.
        if not pays(x) or kernel.dtype != panels.dtype:
            return jax.lax.dot_general(x, kernel, dimensions, **how)
        return product(x, panels, kernel.shape[1], **how)

    return dot_general


def _linears(module: nnx.Module) -> Iterator[tuple[str, nnx.Linear]]:
    """Those of the blocks that decode: an encoder in front of them reads whole prompts.

    A layer that multiplies in a way of its own keeps it.
    """
    for index in range(module.config.depth):
        for path, part in nnx.iter_modules(module.cached_block(index)):
            if type(part) is nnx.Linear and part.dot_general is jax.lax.dot_general:
                yield "/".join(map(str, (index, *path))), part
