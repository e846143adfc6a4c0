"""How a query's product with a key becomes a score, and how logits are kept within bounds.

The one idea: whichever way attention is computed, it turns products into scores by one rule, which
is passed on, and which also tells how the score follows the product in a backward pass.
"""

import dataclasses

import jax
import jax.numpy as jnp


def soft_cap(x: jax.Array, cap: float | None) -> jax.Array:
    """cap · tanh(x / cap), always between −cap and cap (Bello et al. 2016); x without a cap."""
    return x if cap is None else cap * jnp.tanh(x / cap)


@dataclasses.dataclass(frozen=True)
class Scoring:
    """The rule of a network's attention.

    Attributes:
      scale: products are multiplied by it; None for 1/√d, d being the width of a head.
      cap: the soft cap of what is then the score; None for none.
    """

    scale: float | None = None
    cap: float | None = None

    def __call__(self, products: jax.Array, width: int) -> jax.Array:
        """float32 products of queries and keys that are `width` wide → scores."""
        return soft_cap(products * self.factor(width), self.cap)

    def factor(self, width: int) -> float:
        return width**-0.5 if self.scale is None else self.scale

    def slope(self, scores: jax.Array, width: int) -> jax.Array | float:
        """d(score)/d(product), told from the scores."""
        factor = self.factor(width)
        return factor if self.cap is None else factor * (1 - (scores / self.cap) ** 2)


# 1/√d, uncapped (Vaswani et al. 2017, eq. 1).
USUAL = Scoring()
