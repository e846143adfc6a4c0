"""What decoding must read: the cost model of a multi-exit decoder, from shapes alone.

The one idea: decoding is bound by memory traffic, so a pass costs the bytes of the weights it
reads, once for all positions in it, and of the cache it looks at, once for each; a measured factor
says what more positions in one pass add. Of experts, those count that one position runs.
"""

import dataclasses
import functools

import jax
import numpy as np

from early_exit import tree
from early_exit.backbones import base
from early_exit.cost.multiply_adds import bytes_read, cost_of
from early_exit.exits.multi_exit import RECURRENT, MultiExit


@dataclasses.dataclass(frozen=True)
class Traffic:
    """Bytes that decoding reads; E exits and the final one.

    Attributes:
      segments: int [E + 1], weights of the blocks of each segment.
      heads: int [E + 1], weights of each head with its output matrix, the final readout last.
      propagated: int [E + 1], weights that give keys and values of a segment that is skipped.
      cached: int [E + 1], keys and values of one position in the blocks of each segment.
      draft: weights of a recurrent exit, each step of which reads most of them; 0 without.
    """

    segments: np.ndarray
    heads: np.ndarray
    propagated: np.ndarray
    cached: np.ndarray
    draft: int = 0

    @property
    def full(self) -> int:
        """Weights read for one token of the full model."""
        return int(self.segments.sum() + self.heads[-1])

    def shares(self) -> tuple[np.ndarray, np.ndarray]:
        """(the blocks before each exit, each head) as shares of a token of the full model."""
        return self.segments.cumsum() / self.full, self.heads / self.full

    def bytes_read(
        self,
        counts,
        exits: np.ndarray,
        *,
        propagates: bool,
        verifies: bool,
        factors: np.ndarray | None = None,
    ) -> float:
        """Bytes that one row's decoding has read.

        Args:
          counts: the row's `Counts`.
          exits: where its tokens left, those of the prompt's pass excepted.
          propagates: whether skipped blocks got keys and values projected (`Mode.propagates`).
          verifies: whether each pass of the last segment checked all its positions.
          factors: what a pass of each of the mode's widths costs, relative to one position; 1 if
            not given. With measured factors the result is a time, in bytes' worth.
        """
        counted = np.asarray(counts.passes_BEN, np.float64)
        passes = counted.sum(axis=-1) if factors is None else counted @ factors
        # The readout follows each pass of the last segment (the counted ones have the prompt's
        # too), and checks as many positions; otherwise it reads one.
        readouts = passes[-1] if verifies else counted[-1].sum()
        head_passes = np.append(np.asarray(counts.head_passes_BE, np.float64)[:-1], readouts)
        total = passes @ self.segments + head_passes @ self.heads
        total += float(counts.draft_steps_B) * self.draft
        total += np.asarray(counts.read_BE, np.float64) @ self.cached
        if propagates:
            skipped = [(exits < segment).sum() for segment in range(len(self.segments))]
            total += np.array(skipped) @ self.propagated
        return float(total)


def traffic(model: MultiExit, params: base.Params) -> Traffic:
    """What decoding with these parameters reads, arrays or their shapes."""
    leaves = tree.flatten({name: params[name] for name in ("backbone", "exits") if name in params})
    shapes = tuple((path, x.shape, x.dtype) for path, x in leaves.items())
    return _traffic(model, shapes, "exits" in params)


@functools.lru_cache(maxsize=64)  # every program asks
def _traffic(model: MultiExit, leaves: tuple, has_exits: bool) -> Traffic:
    config, segments = model.config, model.segments
    params = tree.unflatten({path: jax.ShapeDtypeStruct(*rest) for path, *rest in leaves})
    backbone, bare = params["backbone"], {"backbone": params["backbone"]}
    blocks = [backbone["blocks"][str(i)] for i in range(config.depth)]

    def network(params):
        return model.bind(params).backbone

    stem = jax.eval_shape(lambda params, x: network(params).stem(x), bare, config.example_inputs())
    hidden, context = stem

    def read_by(function) -> int:
        return cost_of(function, bare, hidden, context).bytes

    def weights(part: base.Params) -> int:
        return bytes_read(part, config.share_read)

    @functools.cache
    def projections(i: int) -> int:
        return read_by(lambda params, *x: network(params).cached_block(i).keys_values(*x))

    first = {}  # blocks of the same shapes read the same, and tracing is slow
    alike = [first.setdefault(str(tree.flatten(block)), i) for i, block in enumerate(blocks)]
    dtype = jax.tree.leaves(backbone)[0].dtype
    position = [
        sum(heads * size for heads, size in config.cached_rows(i)) * dtype.itemsize
        for i in range(config.depth)
    ]

    shared = 0
    if model.exits.output == "shared":
        table = jax.eval_shape(lambda params: network(params).output_table(), bare)
        rows = model.exits.classes or len(table)
        shared = rows * table.shape[1] * table.dtype.itemsize
    own = params.get("exits", {})  # heads that share everything have no leaves
    heads = [
        weights(own.get(str(point), {})) + shared if has_exits else 0
        for point in model.exits.points
    ]
    draft = 0
    if has_exits and model.exits.recurrent_taps:
        draft = weights(own[RECURRENT]) + shared
    readout = read_by(lambda params, *x: network(params).readout(*x))
    return Traffic(
        segments=np.array([sum(map(weights, blocks[a:b])) for a, b in segments]),
        heads=np.array([*heads, readout]),
        propagated=np.array([sum(projections(i) for i in alike[a:b]) for a, b in segments]),
        cached=np.array([sum(position[a:b]) for a, b in segments]),
        draft=draft,
    )
