"""Products of few positions on a CPU, which should take little more than reading the weights once.

The one idea: where more than one row meets a large matrix, XLA's CPU backend rearranges the matrix
before it multiplies, which takes as long again or longer. A batch of products with small parts of
it does the same work, and what is rearranged never leaves the cache. Which parts are right depends
on the processor (`Kind`):

- with AVX-512, *panels*: copies of 64 columns each, in one piece, kept beside the matrix;
- else *bands*: of eight rows each, where they lie, whose products are added up; and *parts* of the
  output matrix, whose products stand side by side.

Measured on two cores, float32. With AVX-512, 60 matrices of 576 × 1536, in times of one row: 2, 4,
5, 8 and 10 rows take 1.8, 1.7, 1.6, 1.9 and 2.0 as they are, and 1.1, 1.2, 1.3, 1.7 and 1.9 in
panels. With AVX2 alone, the blocks of SmolLM2-135M, in milliseconds: 1, 2, 4, 6, 8 and 10 rows take
40, 55, 88, 90, 100 and 112 as they are, and 2, 4, 6, 8 and 10 rows 43, 53, 50, 73 and 95 in bands,
12 already 408. Its output matrix, behind twenty small ones: 2, 4 and 8 rows take 23, 29 and 34 as
it is, and 17, 22 and 27 in parts. One row meets the matrix as it is, and so do prompts.
"""

import functools
import math
import pathlib
import re
import weakref
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from early_exit import sharding

# Beside the paths of layers in blocks: the output matrix.
OUTPUT = "output"

# Columns of a panel, and rows of x in one product with it: more are slower than several products.
COLUMNS, _AT_ONCE = 64, 5
# Rows of a matrix in a band, and classes of an output matrix in a part, at least and at most.
BAND = 8
LEAST_PART, MOST_PART = 512, 4096

# Where the system says how much memory is left, and what the processor can.
MEMORY, PROCESSOR = pathlib.Path("/proc/meminfo"), pathlib.Path("/proc/cpuinfo")

Panels = dict[str, jax.Array]


class Kind(NamedTuple):
    """What is right for a processor: whether panels are, and for how many positions of all rows."""

    panels: bool
    most: int


# With AVX-512, and without.
WIDE, NARROW = Kind(panels=True, most=10), Kind(panels=False, most=8)

# By the identities of the arrays that they were cut from, as long as these live.
_known: dict[tuple[int, ...], tuple[list[weakref.ref], Panels]] = {}


@functools.cache
def kind() -> Kind:
    """That of this processor; `NARROW` where the system does not say."""
    said = PROCESSOR.read_text() if PROCESSOR.exists() else ""
    return WIDE if "avx512f" in said else NARROW


def are_few(x: jax.Array) -> bool:
    """Whether so many positions are few."""
    return 1 < math.prod(x.shape[:-1]) <= kind().most


def by_bands(x: jax.Array, matrix_IO: jax.Array, **how) -> jax.Array:
    """[…, I] times [I, O] → […, O].

    Args:
      how: further arguments of `jax.lax.dot_general`.
    """
    inputs, outputs = matrix_IO.shape
    bands = matrix_IO.reshape(-1, BAND, outputs)
    each = x.reshape(-1, len(bands), BAND).swapaxes(0, 1)
    found = jax.lax.dot_general(each, bands, (((2,), (1,)), ((0,), (0,))), **how)
    return found.sum(0).reshape(*x.shape[:-1], outputs)


def by_parts(x: jax.Array, table_OI: jax.Array, **how) -> jax.Array:
    """[…, I] times the transpose of [O, I] → […, O], where O can be divided into parts.

    Args:
      how: further arguments of `jax.lax.dot_general`.
    """
    outputs, inputs = table_OI.shape
    rows = x.reshape(-1, inputs)
    parts = table_OI.reshape(-1, part_of(outputs), inputs)
    each = jnp.broadcast_to(rows, (len(parts), *rows.shape))
    found = jax.lax.dot_general(parts, each, (((2,), (2,)), ((0,), (0,))), **how)
    return jnp.moveaxis(found, -1, 0).reshape(*x.shape[:-1], outputs)


def part_of(outputs: int) -> int | None:
    """Classes in each part of an output matrix; None where no number of them divides it."""
    fitting = (size for size in range(MOST_PART, LEAST_PART - 1, -1) if outputs % size == 0)
    return next(fitting, None)


def cut(matrix_IO: jax.Array) -> jax.Array:
    """[I, O] → panels [⌈O / 64⌉, I, 64], zeros where the last one has no columns."""
    inputs, outputs = matrix_IO.shape
    padded = jnp.pad(matrix_IO, ((0, 0), (0, -outputs % COLUMNS)))
    return padded.reshape(inputs, -1, COLUMNS).swapaxes(0, 1)


def by_panels(x: jax.Array, panels: jax.Array, outputs: int, **how) -> jax.Array:
    """[…, I] times the matrix [I, O] that the panels were cut from → […, O].

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


def prepared(params: dict[str, Any], module: Callable[[], nnx.Module]) -> Panels | None:
    """What `attach` needs to multiply few positions fast; None where they are multiplied as ever.

    That is on other devices than one CPU, and for other types than float32, which it multiplies
    natively. Where panels are right, they are those of the linear layers in a network's blocks, and
    of its output matrix, cut once for the same arrays. Else there are none: in bands, nothing is
    kept twice. So it is, too, where they would take more than half of the memory that is left.

    Args:
      module: → the network with these parameters.
    """
    leaves = jax.tree.leaves(params)
    on_devices = all(isinstance(x, jax.Array) for x in leaves)  # else each call copies them anyway
    if not on_devices or sharding.mesh_of(params) is not None:
        return None
    if {d.platform for d in leaves[0].devices()} != {"cpu"} or leaves[0].dtype != jnp.float32:
        return None
    if not kind().panels:
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
    """From now on the network multiplies few positions in this way. Inside the jitted function.

    Args:
      panels: what `prepared` has said of this network.
    """
    for path, linear in _linears(module):
        linear.dot_general = _instead(panels.get(path))
    module.output_product = _of_output(panels.get(OUTPUT))


def _instead(panels: jax.Array | None):
    """In place of `jax.lax.dot_general` in a linear layer; in bands where there are no panels."""

    def dot_general(x, kernel, dimensions, **how):
        # A layer that computes in another type than its weights have has turned them into it.
        in_parts = are_few(x) and kernel.dtype == jnp.float32
        if in_parts and panels is not None:
            return by_panels(x, panels, kernel.shape[1], **how)
        if in_parts and len(kernel) % BAND == 0:
            return by_bands(x, kernel, **how)
        return jax.lax.dot_general(x, kernel, dimensions, **how)

    return dot_general


def _of_output(panels: jax.Array | None):
    """In place of `table_product`; in parts where there are no panels."""

    def product(x, table, **how):
        if are_few(x) and panels is not None:
            return by_panels(x, panels, len(table), **how)
        if are_few(x) and part_of(len(table)):
            return by_parts(x, table, **how)
        return table_product(x, table, **how)

    return product


def table_product(x: jax.Array, table_OI: jax.Array, **how) -> jax.Array:
    """[…, I] times the transpose of [O, I] → […, O]."""
    return jax.lax.dot_general(x, table_OI, (((x.ndim - 1,), (1,)), ((), ())), **how)


def _linears(module: nnx.Module) -> Iterator[tuple[str, nnx.Linear]]:
    """Those of the blocks that decode: an encoder in front of them reads whole prompts.

    A layer that multiplies in a way of its own keeps it.
    """
    for index in range(module.config.depth):
        for path, part in nnx.iter_modules(module.cached_block(index)):
            if type(part) is nnx.Linear and part.dot_general is jax.lax.dot_general:
                yield "/".join(map(str, (index, *path))), part
