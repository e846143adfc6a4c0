"""What the rows of a batch go by: what may differ from row to row without another program."""

import dataclasses
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from early_exit.decoding.sampling import GREEDY, RowSampling, Sampling
from early_exit.policy import ExitPolicy

# Stop tokens are padded to a multiple of this: another number of them would be another program.
_STOPS = 8


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Rules:
    """Of B rows.

    Attributes:
      policy: when positions leave; its thresholds may be float32 [E, B], each row's own. None
        compiles a model without any exit in it.
      stop_ids_BN: int32, tokens that end a row, filled up with −1.
      sampling: how tokens are drawn; None compiles greedy decoding alone.
    """

    policy: ExitPolicy | None
    stop_ids_BN: jax.Array
    sampling: RowSampling | None

    @classmethod
    def of(
        cls,
        policy: ExitPolicy | None,
        stop_ids: Sequence[Sequence[int]],
        sampling: Sequence[Sampling],
        *,
        draws: bool | None = None,
    ) -> "Rules":
        """From a list for each row.

        Args:
          draws: whether drawing is compiled; by default where some row draws.
        """
        longest = max(map(len, stop_ids), default=0)
        size = longest + (-longest % _STOPS or _STOPS)
        padded = np.full((len(stop_ids), size), -1, np.int32)
        for row, ids in zip(padded, stop_ids, strict=True):
            row[: len(ids)] = ids
        if draws is None:
            draws = any(row.temperature for row in sampling)
        return cls(policy, jnp.asarray(padded), RowSampling.of(sampling) if draws else None)

    @classmethod
    def same(
        cls,
        batch: int,
        policy: ExitPolicy | None = None,
        stop_ids: Sequence[int] = (),
        sampling: Sampling = GREEDY,
    ) -> "Rules":
        """For every row."""
        return cls.of(policy, [stop_ids] * batch, [sampling] * batch)

    def stops(self, tokens: jax.Array) -> jax.Array:
        """bool [B, …], whether tokens [B, …] end their rows."""
        ids = self.stop_ids_BN.reshape(len(tokens), *[1] * (tokens.ndim - 1), -1)
        return (tokens[..., None] == ids).any(axis=-1)
