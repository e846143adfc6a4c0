"""What the steps of decoding cost on a device, relative to each other.

The one idea: whether a draft pays is a question of seconds, and only the device knows them. So
costs are arrays that a program is given, not constants in it: measured ones, or these assumptions.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from early_exit.decoding.mode import Mode

# Of a pass with one position: what another one adds, as measured for SmolLM2-135M on two cores with
# AVX-512 (`experiments/decoding_speed`); and a draft, by the weights that one reads there.
POSITION, DRAFT = 0.1, 0.06


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Costs:
    """Of a batch of B rows, in passes of one position in each row through the full model.

    Attributes:
      passes_N: float32, a pass of each of the mode's widths, all rows together; the first is 1.
      draft: float32 scalar, a step of a recurrent exit, all rows together.
      heads: float32 scalar, of asking exits on the way: what it takes, by what their weights are
        of the full model's.
      saved_E: float32, what an early token saves if it stands, asking aside: two passes, less the
        one that ends at the exit and the next, which takes its position along. None: by weights.
    """

    passes_N: jax.Array
    draft: jax.Array
    heads: jax.Array = dataclasses.field(default_factory=lambda: jnp.float32(1))
    saved_E: jax.Array | None = None

    @classmethod
    def assumed(cls, mode: Mode, batch: int) -> "Costs":
        """Where nothing was measured."""
        positions = np.array(mode.widths) * batch
        passes = (1 + POSITION * (positions - 1)) / (1 + POSITION * (batch - 1))
        return cls(jnp.asarray(passes, jnp.float32), jnp.float32(DRAFT))


def by_weights(depth_shares: np.ndarray, passes_N: jax.Array | np.ndarray) -> jax.Array:
    """`Costs.saved_E`, if all weights take as long to read as each other, on either side.

    Args:
      depth_shares: [E], the blocks before each exit as shares of a token of the full model.
    """
    behind = 1 - jnp.asarray(depth_shares, jnp.float32)
    return behind * (2 - jnp.asarray(passes_N, jnp.float32)[:2][-1])
