"""Exit heads: what turns the hidden states after some block into a prediction.

The one idea: a head is a map to the features that an output matrix reads, so that losses can
take the matrix in chunks, decoding can take it whole, and several heads can share one. A head
may predict only the `classes` most frequent tokens; one more row of its matrix then stands for
"none of these", which keeps its confidence honest and never leaves.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from early_exit.backbones.base import BackboneConfig

KINDS = ("embedding", "norm", "mlp", "layer")
OUTPUTS = ("shared", "own")


@dataclasses.dataclass(frozen=True)
class ExitConfig:
    """Where the exits are and what their heads are made of.

    Attributes:
      points: blocks (1-based) after which there is an exit, each in 1 … depth − 1.
      head: `embedding` (nothing before the output matrix), `norm`, `mlp` (residual feed-forward,
        then norm) or `layer` (one whole block, then norm).
      output: `own`, an output matrix of each head, or `shared`, the backbone's.
      classes: how many tokens a head can predict, the most frequent ones; 0 for all.
      gate: whether each head has a gate, which tells from the hidden state alone whether the head
        will agree with the full model.
    """

    points: tuple[int, ...]
    head: str = "mlp"
    output: str = "own"
    classes: int = 0
    gate: bool = False

    def __post_init__(self):
        if self.head not in KINDS:
            raise ValueError(f"unknown head {self.head!r}; choose one of {', '.join(KINDS)}")
        if self.output not in OUTPUTS:
            raise ValueError(f"unknown output {self.output!r}; choose one of {', '.join(OUTPUTS)}")
        if not self.points:
            raise ValueError("exits.points is empty; name at least one block to exit after")
        if not all(isinstance(point, int) for point in self.points):
            raise ValueError(f"exit points must be ints, as in (6, 12), not {self.points}")
        if list(self.points) != sorted(set(self.points)):
            raise ValueError(f"exit points must rise without repeats, not {self.points}")
        if self.classes < 0:
            raise ValueError(f"exits.classes must be 0 (all) or positive, not {self.classes}")

    def check(self, depth: int, num_classes: int) -> None:
        """Raises ValueError where the exits do not fit a backbone."""
        if not num_classes:
            raise ValueError(
                "the backbone has no output matrix, so its exits have nothing to predict; give its "
                "config num_classes"
            )
        outside = [point for point in self.points if not 1 <= point < depth]
        if outside:
            raise ValueError(
                f"exit points {outside} lie outside 1…{depth - 1}: the backbone has {depth} "
                f"blocks, and its own readout is the exit after block {depth}"
            )
        if self.classes >= num_classes:
            raise ValueError(
                f"exits.classes={self.classes} is not below the vocabulary of {num_classes}; "
                "use classes=0 to predict every token"
            )


class Head(nnx.Module):
    """One exit's head. Of its parts only those that `ExitConfig` asks for exist."""

    def __init__(
        self, backbone: BackboneConfig, exits: ExitConfig, num_classes: int, *, rngs: nnx.Rngs
    ):
        if exits.head == "mlp":
            self.mlp_norm = backbone.build_norm(rngs)
            self.mlp = backbone.build_mlp(rngs)
        if exits.head == "layer":
            self.block = backbone.build_block(rngs)
        if exits.head != "embedding":
            self.norm = backbone.build_norm(rngs)
        rows = exits.classes + 1 if exits.classes else num_classes
        if exits.output == "shared":
            rows = 1 if exits.classes else 0  # only "none of these" is not in the backbone's
        if rows:
            init = nnx.initializers.normal(0.02)
            self.output = nnx.Embed(rows, backbone.width, embedding_init=init, rngs=rngs)
        if exits.gate:
            self.gate = Gate(backbone, rngs=rngs)

    @property
    def has_block(self) -> bool:
        """Whether the head attends to earlier positions, so that decoding caches for it too."""
        return hasattr(self, "block")

    def features(
        self, hidden: jax.Array, context: Any, past=None, past_length_B=None
    ) -> tuple[jax.Array, Any]:
        """Hidden states at the exit → (features [..., D], the block's new keys and values).

        The second is None for heads without a block.
        """
        rows = None
        if hasattr(self, "mlp"):
            hidden = hidden + self.mlp(self.mlp_norm(hidden))
        if self.has_block:
            hidden, rows = self.block(hidden, context, past, past_length_B)
        if hasattr(self, "norm"):
            hidden = self.norm(hidden)
        return hidden, rows

    def gate_score(self, hidden: jax.Array) -> jax.Array:
        """How likely the head agrees, judged by hidden states [..., D] alone: float32 [...]."""
        return jax.nn.sigmoid(self.gate(hidden))


class Gate(nnx.Module):
    """Norm, a narrow hidden layer, and the logit of "this head will agree"."""

    WIDTH = 64

    def __init__(self, backbone: BackboneConfig, *, rngs: nnx.Rngs):
        self.norm = backbone.build_norm(rngs)
        self.hidden = nnx.Linear(backbone.width, self.WIDTH, rngs=rngs)
        self.logit = nnx.Linear(self.WIDTH, 1, rngs=rngs)

    def __call__(self, hidden: jax.Array) -> jax.Array:
        """Hidden states [..., D] → float32 [...]."""
        narrow = jax.nn.silu(self.hidden(self.norm(hidden)))
        return self.logit(narrow)[..., 0].astype(jnp.float32)
