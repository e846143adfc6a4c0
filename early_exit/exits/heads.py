"""Exit heads: what turns the hidden states after some block into a prediction.

The one idea: a head is a map to the features that an output matrix reads, so that losses can
take the matrix in chunks, decoding can take it whole, and several heads can share one. A language
model's head may predict only the `classes` most frequent tokens; one more row of its matrix then
stands for "none of these", which keeps its confidence honest and never leaves.

A classifier's head pools first, as its network does, and may build on the heads before it: see
their logits (`cascade`), and let them have a say in its answer (`ensemble`), both after Wołczyk et
al. 2021, "Zero Time Waste".
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from early_exit.backbones.base import BackboneConfig, Classifier

OUTPUTS = ("shared", "own")

# The network at an exit's place, and what parameters are drawn from → hidden states [..., D] →
# the features [..., D] that the output matrix reads.
Builder = Callable[[BackboneConfig, nnx.Rngs], nnx.Module]
_OWN = ("embedding", "linear", "norm", "mlp", "layer", "grid")
_registered: dict[str, Builder] = {}


def register(name: str, build: Builder) -> None:
    """Adds a kind of head. What it builds holds `nnx.Param`s only, and takes any [..., D].

    Raises:
      ValueError: another one has that name.
    """
    if name in _OWN or _registered.get(name, build) is not build:
        raise ValueError(f"there is a head {name!r} already; choose another name")
    _registered[name] = build


def registered() -> tuple[str, ...]:
    """The kinds that were added."""
    return tuple(_registered)


@dataclasses.dataclass(frozen=True)
class ExitConfig:
    """Where the exits are and what their heads are made of.

    Attributes:
      points: blocks (1-based) after which there is an exit, each in 1 … depth − 1.
      head: what stands before the output matrix: `embedding`, nothing, which classifiers call
        `linear`; `norm`; `mlp`, a residual feed-forward part, then norm; `layer`, one whole block,
        then norm; `grid`, strided convolutions, pooled not as one but in a coarse grid of places,
        then norm: early blocks see little of an image, so what is where in it says much of what
        it is. Or one that was added (`register`).
      output: `own`, an output matrix of each head, or `shared`, the backbone's.
      classes: how many tokens a head can predict, the most frequent ones; 0 for all.
      gate: whether each head has a gate, which tells from the hidden state alone whether the head
        will be right.
      cascade: whether each head sees the logits of the one before it; for classifiers.
      ensemble: whether an exit's answer is a learned geometric mean of its head's prediction and
        those of all heads before it; for classifiers.
      recurrent_taps: blocks (1-based, the last included) whose output a recurrent exit reads
        (`exits.recurrent`); () for none. It predicts what the other heads predict.
      recurrent_blocks: blocks of its own; 0 for a feed-forward part instead.

    Raises:
      ValueError: values that fit no network; those that do not fit one are found with it (`check`).

    Example:
      >>> ee.ExitConfig((8, 22, 28), head="norm").observed
      (8, 22, 28)
    """

    points: tuple[int, ...]
    head: str = "mlp"
    output: str = "own"
    classes: int = 0
    gate: bool = False
    cascade: bool = False
    ensemble: bool = False
    recurrent_taps: tuple[int, ...] = ()
    recurrent_blocks: int = 1

    def __post_init__(self):
        if self.output not in OUTPUTS:
            raise ValueError(f"unknown output {self.output!r}; choose one of {', '.join(OUTPUTS)}")
        for what, blocks in (("exit points", self.points), ("recurrent_taps", self.recurrent_taps)):
            if not all(isinstance(block, int) for block in blocks):
                raise ValueError(f"{what} must be ints, as in (6, 12), not {blocks}")
            if list(blocks) != sorted(set(blocks)):
                raise ValueError(f"{what} must rise without repeats, not {blocks}")
        if self.recurrent_blocks < 0:
            raise ValueError(f"recurrent_blocks must be 0 or more, not {self.recurrent_blocks}")
        if self.classes < 0:
            raise ValueError(f"exits.classes must be 0 (all) or positive, not {self.classes}")

    def check(self, backbone: BackboneConfig) -> None:
        """Raises ValueError where the exits do not fit a backbone."""
        depth, num_classes = backbone.depth, backbone.num_classes
        if not num_classes:
            raise ValueError(
                "the backbone has no output matrix, so its exits have nothing to predict; give its "
                "config num_classes"
            )
        kinds = (*backbone.head_kinds, *_registered)
        if self.head not in kinds:
            known = ", ".join(kinds)
            raise ValueError(f"this network carries no head {self.head!r}; choose one of {known}")
        outside = [point for point in self.points if not 1 <= point < depth]
        if outside:
            raise ValueError(
                f"exit points {outside} lie outside 1…{depth - 1}: the backbone has {depth} "
                f"blocks, and its own readout is the exit after block {depth}"
            )
        if self.recurrent_taps and not backbone.decodes:
            raise ValueError("a recurrent exit drafts text, which this network does not write")
        if self.recurrent_taps and backbone.encodes_prompts:
            raise ValueError(
                "a recurrent exit looks at nothing but what was written, and not at the prompt "
                "that an encoder has read; leave exits.recurrent_taps empty"
            )
        if outside := [tap for tap in self.recurrent_taps if not 1 <= tap <= depth]:
            raise ValueError(
                f"recurrent_taps {outside} lie outside 1…{depth}, the blocks of this network"
            )
        if self.classes >= num_classes:
            raise ValueError(
                f"exits.classes={self.classes} is not below the vocabulary of {num_classes}; "
                "use classes=0 to predict every token"
            )
        if backbone.classifies and self.classes:
            raise ValueError("exits.classes reduces a vocabulary; a classifier's heads need all 0")
        if not backbone.classifies and (self.cascade or self.ensemble):
            raise ValueError("exits.cascade and exits.ensemble are for classifiers")
        narrow = [p for p in self.points if self.width(backbone, p) != backbone.width]
        if self.output == "shared" and narrow:
            raise ValueError(
                f"heads after blocks {narrow} are not as wide as the network's output matrix, "
                "which they cannot share; choose exits.output=own"
            )

    @property
    def observed(self) -> tuple[int, ...]:
        """The blocks (1-based), rising, whose output some head reads."""
        return tuple(sorted({*self.points, *self.recurrent_taps}))

    def own_rows(self, num_classes: int) -> int:
        """Rows of a head's own output matrix, for a network of so many classes."""
        if self.output == "shared":
            return 1 if self.classes else 0  # only "none of these" is not in the backbone's
        return self.classes + 1 if self.classes else num_classes

    def width(self, backbone: BackboneConfig, point: int) -> int:
        """Of the features of the head after block `point`."""
        return backbone.grid_width if self.head == "grid" else backbone.at(point).width


class Head(nnx.Module):
    """One exit's head. Of its parts only those that `ExitConfig` asks for exist."""

    def __init__(self, network: BackboneConfig, exits: ExitConfig, point: int, *, rngs: nnx.Rngs):
        here = self.network = network.at(point)
        earlier, classes = exits.points.index(point), network.num_classes
        if exits.head == "grid":
            self.grid = network.build_grid(point, rngs)
        if exits.head == "mlp":
            self.mlp_norm = here.build_input_norm(rngs)
            self.mlp = network.build_head_mlp(point, rngs)
        if exits.head == "layer":
            self.block = here.build_block(rngs)
        if exits.head in _registered:
            self.custom = _registered[exits.head](here, rngs)
        if exits.head in ("norm", "mlp", "layer"):
            self.norm = here.build_norm(rngs)
        rows = exits.own_rows(classes)
        if rows and network.classifies:
            self.output = Classifier(rows, exits.width(network, point), rngs=rngs)
        elif rows:
            init = nnx.initializers.normal(0.02)
            self.output = nnx.Embed(rows, here.width, embedding_init=init, rngs=rngs)
        if exits.gate:
            self.gate = Gate(here, rngs=rngs)
        if exits.cascade and earlier:
            init = nnx.initializers.normal(0.02)
            self.cascade = nnx.Linear(classes, classes, use_bias=False, kernel_init=init, rngs=rngs)
        if exits.ensemble and earlier:
            self.ensemble = Ensemble(earlier + 1, classes)

    @property
    def has_block(self) -> bool:
        """Whether the head attends to earlier positions, so that decoding caches for it too."""
        return hasattr(self, "block")

    @property
    def is_cheap(self) -> bool:
        """Whether it is a norm at most in front of the output matrix."""
        return not any(hasattr(self, part) for part in ("mlp", "block", "grid", "custom"))

    def features(
        self, hidden: jax.Array, context: Any, past=None, past_length_B=None
    ) -> tuple[jax.Array, Any]:
        """Hidden states at the exit → (features [..., D], the block's new keys and values).

        The second is None but for a language model's heads with a block.
        """
        if hasattr(self, "grid"):
            return self.grid(hidden), None
        rows = None
        if self.has_block and self.network.classifies:
            hidden = self.block(hidden, context)
        elif self.has_block:
            hidden, rows = self.block(hidden, context, past, past_length_B)
        hidden = self.network.pool(hidden, context)
        if hasattr(self, "custom"):
            hidden = self.custom(hidden)
        if hasattr(self, "mlp"):
            hidden = hidden + self.mlp(self.mlp_norm(hidden))
        if hasattr(self, "norm"):
            hidden = self.norm(hidden)
        return hidden, rows

    def gate_logit(self, hidden: jax.Array, context: Any) -> jax.Array:
        """The gate's logit of "this head is right", of hidden states alone: float32 [...]."""
        return self.gate(self.network.pool(hidden, context))

    def gate_score(self, hidden: jax.Array, context: Any = None) -> jax.Array:
        """How likely the head is right, judged by hidden states alone: float32 [...]."""
        return jax.nn.sigmoid(self.gate_logit(hidden, context))


class Gate(nnx.Module):
    """Norm, a narrow hidden layer, and the logit of "this head will be right"."""

    WIDTH = 64

    def __init__(self, network: BackboneConfig, *, rngs: nnx.Rngs):
        self.norm = network.build_norm(rngs)
        self.hidden = nnx.Linear(network.width, self.WIDTH, rngs=rngs)
        self.logit = nnx.Linear(self.WIDTH, 1, rngs=rngs)

    def __call__(self, hidden: jax.Array) -> jax.Array:
        """Hidden states, pooled if the network pools, [..., D] → float32 [...]."""
        narrow = jax.nn.silu(self.hidden(self.norm(hidden)))
        return self.logit(narrow)[..., 0].astype(jnp.float32)


class Ensemble(nnx.Module):
    """A weighted geometric mean of predictions (Wołczyk et al. 2021, eq. 4).

    In logarithms: log b + Σ_j w_j · log p_j up to a constant, with w_j ≥ 0.
    """

    def __init__(self, members: int, classes: int):
        # softplus(this) is 1 / members: at the start, the plain geometric mean.
        self.weights = nnx.Param(jnp.full(members, jnp.log(jnp.expm1(1 / members))))
        self.bias = nnx.Param(jnp.zeros(classes))

    def __call__(self, logits: Sequence[jax.Array]) -> jax.Array:
        """Each member's logits [..., C] → those of all together."""
        weights = jax.nn.softplus(self.weights[...].astype(jnp.float32))
        log_probs = jnp.stack([jax.nn.log_softmax(x) for x in logits], axis=-1)
        mixed = log_probs @ weights
        return mixed + jnp.broadcast_to(self.bias[...].astype(jnp.float32), mixed.shape)
