"""Who looks at whom in attention.

The one idea: positions see each other by rules (direction, distance, the same document), and the
rules are what is passed on. An array of truths is made piece by piece; of all T × T pairs only
where T is small.
"""

import dataclasses

import jax
import jax.numpy as jnp


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Visibility:
    """What T positions of each row may look at, among themselves.

    Attributes:
      causal: nobody looks ahead.
      window: a position sees itself and the window − 1 before it and, if not causal, behind it;
        None for all.
      documents: integers [B, T], not negative: nobody looks into another document of the row.
      real: bool [B, T], nobody looks at the others.
    """

    causal: bool = dataclasses.field(default=False, metadata={"static": True})
    window: int | None = dataclasses.field(default=None, metadata={"static": True})
    documents: jax.Array | None = None
    real: jax.Array | None = None

    def between(self, query: int | jax.Array, key: int | jax.Array, size: int) -> jax.Array:
        """Whether `size` queries see `size` keys: bool [B or 1, size or 1, size].

        Args:
          query, key: the first of each.
        """

        def part(x_BT, first):
            return jax.lax.dynamic_slice_in_dim(x_BT, first, size, axis=1)

        seen = jnp.ones((1, 1, size), bool)
        if self.causal or self.window is not None:
            at = jnp.arange(size)
            behind = (query + at)[None, :, None] - (key + at)[None, None, :]
            seen = behind >= (0 if self.causal else 1 - self.window)
            if self.window is not None:
                seen &= behind < self.window
        if self.documents is not None:
            asking, asked = part(self.documents, query), part(self.documents, key)
            seen = seen & (asking[:, :, None] == asked[:, None, :])
        if self.real is not None:
            seen = seen & part(self.real, key)[:, None, :]
        return seen

    def mask(self, length: int) -> jax.Array | None:
        """Of all pairs, bool [B or 1, 1, T or 1, T]; None if all may look at all."""
        rules = self.window, self.documents, self.real
        if not self.causal and all(rule is None for rule in rules):
            return None
        return self.between(0, 0, length)[:, None]

    def padded(self, length: int, to: int) -> "Visibility":
        """The same of rows that are longer, by positions that no other sees."""
        more, real = ((0, 0), (0, to - length)), self.real
        if real is None and not self.causal and self.documents is None:
            real = jnp.ones((1, length), bool)
        return dataclasses.replace(
            self,
            documents=jax.tree.map(lambda x: jnp.pad(x, more, constant_values=-1), self.documents),
            real=jax.tree.map(lambda x: jnp.pad(x, more), real),
        )
