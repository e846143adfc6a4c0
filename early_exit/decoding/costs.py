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
    """

    passes_N: jax.Array
    draft: jax.Array
    heads: jax.Array = dataclasses.field(default_factory=lambda: jnp.float32(1))

    @classmethod
    def assumed(cls, mode: Mode, batch: int) -> "Costs":
        """Where nothing was measured."""
        positions = np.array(mode.widths) * batch
        passes = (1 + POSITION * (positions - 1)) / (1 + POSITION * (batch - 1))
        return cls(jnp.asarray(passes, jnp.float32), jnp.float32(DRAFT))
