"""What decoding must read: the cost model of a multi-exit decoder, from shapes alone.

The one idea: decoding is bound by memory traffic, so a pass costs the bytes of the weights it
reads, once for all positions in it, and of the cache it looks at, once for each; a measured factor
says what more positions in one pass add.
"""

import dataclasses

import numpy as np

from early_exit import tree
from early_exit.exits.multi_exit import MultiExit


@dataclasses.dataclass(frozen=True)
class Traffic:
    """Bytes that decoding reads; E exits and the final one.

    Attributes:
      segments: int [E + 1], weights of the blocks of each segment.
      heads: int [E + 1], weights of each head with its output matrix, the final readout last.
      propagated: int [E + 1], weights that give keys and values of a segment that is skipped.
      cached: int [E + 1], keys and values of one position in the blocks of each segment.
    """

    segments: np.ndarray
    heads: np.ndarray
    propagated: np.ndarray
    cached: np.ndarray

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
        total += np.asarray(counts.read_BE, np.float64) @ self.cached
        if propagates:
            skipped = [(exits < segment).sum() for segment in range(len(self.segments))]
            total += np.array(skipped) @ self.propagated
        return float(total)


def traffic(model: MultiExit, params) -> Traffic:
    """What decoding with these parameters reads, arrays or their shapes."""
    backbone, segments = params["backbone"], model.segments
    blocks = [backbone["blocks"][str(i)] for i in range(model.config.depth)]
    projections = [[block["attention"][name] for name in ("key", "value")] for block in blocks]
    table = backbone["embedding" if model.config.tied else "output"]["embedding"]
    position = 2 * model.config.kv_heads * model.config.head_dim * table.dtype.itemsize

    shared = 0
    if model.exits.output == "shared":
        rows = model.exits.classes or model.config.vocab_size
        shared = rows * model.config.width * table.dtype.itemsize
    heads = [
        tree.size_in_bytes(params["exits"][str(point)]) + shared
        for point in model.exits.points
        if "exits" in params
    ] or [0] * len(model.exits.points)
    readout = tree.size_in_bytes((backbone["final_norm"], table))
    return Traffic(
        segments=np.array([tree.size_in_bytes(blocks[a:b]) for a, b in segments]),
        heads=np.array([*heads, readout]),
        propagated=np.array([tree.size_in_bytes(projections[a:b]) for a, b in segments]),
        cached=np.array([(b - a) * position for a, b in segments]),
    )
