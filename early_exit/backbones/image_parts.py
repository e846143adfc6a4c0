"""What networks that read images share: the contract's common half, BatchNorm, parts of heads.

The one idea: a BatchNorm's statistics are parameters like any other, and no call changes them.
Inference, and a frozen backbone, normalise by what is stored. Training normalises by the moments
of the batch and returns them; `base.update_statistics` then makes the next parameters, so that a
training step stays a function from state to state. Under sharding the moments are those of the
whole batch.
"""

import abc
import dataclasses
import itertools
from collections.abc import Sequence
from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from early_exit import tree
from early_exit.backbones import base, layers

# The running statistics, as a regex over the paths of parameters. No gradient moves them, and they
# are no matrices, which alone decay: any optimizer of this package leaves them as they are. One of
# your own that decays everything needs this to leave them out.
STATISTICS = r"(^|/)norm/(mean|variance)$"
EPSILON = 1e-5  # of a BatchNorm, as in torch
ACTIVATIONS = layers.ACTIVATIONS | {"relu6": jax.nn.relu6}

# Pixels in front and behind, down and right.
Padding = tuple[tuple[int, int], tuple[int, int]]

_GRID = 4  # places along each side, for heads that keep a coarse layout


class ImageConfig(base.BackboneConfig):
    """Describes a classifier of images whose hidden states are [B, H, W, C].

    Attributes:
      channels: of the images.
    """

    channels: int
    reads: ClassVar[str] = "images"
    classifies: ClassVar[bool] = True
    head_kinds: ClassVar[tuple[str, ...]] = ("linear", "norm", "mlp", "grid")

    @property
    def grid_width(self) -> int:
        return grid_width(self.width)

    def image_shape(self, height: int, width: int) -> dict[str, jax.ShapeDtypeStruct]:
        """One image of that size, for `example_inputs`."""
        return {"images": jax.ShapeDtypeStruct((1, height, width, self.channels), jnp.float32)}

    def pool(self, hidden, context):
        return hidden.mean((1, 2), dtype=jnp.float32).astype(hidden.dtype)

    def build_norm(self, rngs: nnx.Rngs) -> nnx.LayerNorm:
        """For heads, over pooled features.

        A LayerNorm: it needs no statistics, and is the same for one image as for a batch.
        """
        return layer_norm(self.width, rngs)

    def build_mlp(self, rngs: nnx.Rngs) -> "MLP":
        """For heads, over pooled features."""
        return MLP(self.width, rngs=rngs)

    def build_grid(self, point: int, rngs: nnx.Rngs) -> "Grid":
        return Grid(self.at(point).width, 2 * self.width, rngs=rngs)


@dataclasses.dataclass(frozen=True)
class Stump(ImageConfig):
    """What a head sees of a network that it cuts off: how wide the hidden states are there."""

    width: int
    channels: int

    depth: ClassVar[int] = 0
    num_classes: ClassVar[int] = 0

    def build(self, rngs: nnx.Rngs) -> base.Backbone:
        raise NotImplementedError


class ImageNetwork(base.Backbone):
    """Stem, blocks, global average pooling, output matrix with bias.

    Its `blocks` map hidden states [B, H, W, C] to (hidden states, nested moments of the batch, as
    those of `BatchNorm`), and take `training`.
    """

    config: ImageConfig

    @abc.abstractmethod
    def enter(self, images: jax.Array, *, training: bool) -> tuple[jax.Array, dict]:
        """Images [B, H, W, channels] → the same of the stem."""

    def stem(self, inputs: dict[str, jax.Array]) -> tuple[jax.Array, None]:
        """Inputs:
        images: float32 [B, H, W, channels], normalised as the weights expect.
        """
        hidden, _ = self.enter(read(inputs, self.config.channels), training=False)
        return hidden, None

    def stem_training(self, inputs: dict[str, jax.Array]) -> tuple[jax.Array, None, base.Moments]:
        """Like `stem`, normalising by the batch's moments and returning them."""
        hidden, moments = self.enter(read(inputs, self.config.channels), training=True)
        return hidden, None, tree.flatten(moments)

    def run_blocks(self, hidden, start, stop, context):
        for i in range(start, stop):
            hidden, _ = self.blocks[str(i)](hidden, training=False)
        return hidden

    def run_blocks_training(self, hidden, start, stop, context, kept=None):
        """Like `run_blocks`, normalising by the batch's moments and returning them.

        The moments of all segments, `|`-ed together, are what `update_statistics` takes.
        """
        assert kept is None
        moments = {}
        for i in range(start, stop):
            hidden, moments[str(i)] = self.blocks[str(i)](hidden, training=True)
        return hidden, tree.flatten({"blocks": moments})

    def features(self, hidden, context=None):
        return self.config.pool(hidden, context)

    def output_table(self):
        self._check_classifier()
        return self.output.embedding[...]

    def output_bias(self):
        self._check_classifier()
        return self.output.bias[...]

    def _check_classifier(self):
        if not self.config.num_classes:
            raise ValueError("this network has no classifier (num_classes is 0); use its features")


def read(inputs: dict[str, jax.Array], channels: int) -> jax.Array:
    """The images among the inputs.

    Raises:
      ValueError: they have another shape than [B, H, W, channels].
    """
    images = inputs["images"]
    if images.ndim != 4 or images.shape[-1] != channels:
        raise ValueError(
            f"images are [B, H, W, {channels}], channels last; these have the shape "
            f"{list(images.shape)}"
        )
    return images


def layer_norm(width: int, rngs: nnx.Rngs, epsilon: float = EPSILON) -> nnx.LayerNorm:
    # The fast variance, E[x²] − E[x]², cancels where the mean is far from 0.
    return nnx.LayerNorm(width, epsilon=epsilon, use_fast_variance=False, rngs=rngs)


class BatchNorm(nnx.Module):
    """Normalises channels by stored or by the batch's statistics (Ioffe & Szegedy 2015)."""

    def __init__(self, width: int, epsilon: float = EPSILON):
        self.epsilon = epsilon
        self.scale = nnx.Param(jnp.ones(width))
        self.bias = nnx.Param(jnp.zeros(width))
        self.mean = nnx.Param(jnp.zeros(width))
        self.variance = nnx.Param(jnp.ones(width))

    def __call__(self, x_BHWC: jax.Array, training: bool) -> tuple[jax.Array, dict]:
        """(normalised, the batch's {"mean", "variance"} if training, else {}); in float32.

        As in torch, the batch is normalised by its biased variance, and the unbiased one returned.
        """
        wide = x_BHWC.astype(jnp.float32)
        scale, bias, mean, variance = (
            param[...].astype(jnp.float32)
            for param in (self.scale, self.bias, self.mean, self.variance)
        )
        # What an optimizer would make of a gradient is not what they are: averages of batches.
        mean, variance = jax.lax.stop_gradient((mean, variance))
        moments = {}
        if training:
            count = wide.size // wide.shape[-1]
            if count < 2:
                raise ValueError(
                    f"a batch of shape {x_BHWC.shape} has one value per channel, and so no "
                    "variance; train with more or larger images"
                )
            mean, variance = wide.mean((0, 1, 2)), wide.var((0, 1, 2))
            moments = {"mean": mean, "variance": variance * (count / (count - 1))}
        factor = scale * jax.lax.rsqrt(variance + self.epsilon)
        out = wide * _per_channel(factor) + _per_channel(bias - mean * factor)
        return out.astype(x_BHWC.dtype), moments


def _per_channel(values_C: jax.Array) -> jax.Array:
    return values_C[None, None, None]


class Unit(nnx.Module):
    """A convolution without bias, its BatchNorm, and an activation if it has one.

    Padded by half its size on both sides, as in torch, or as `padding` says: "SAME", as TensorFlow
    pads, by no more than is needed, which with a stride of 2 is more behind than in front.
    """

    def __init__(
        self,
        size: int,
        inputs: int,
        outputs: int,
        stride: int = 1,
        *,
        groups: int = 1,
        dilation: int = 1,
        padding: str | Padding = "",
        activation: str = "",
        epsilon: float = EPSILON,
        rngs: nnx.Rngs,
    ):
        self.activation = activation
        self.conv = nnx.Conv(
            inputs,
            outputs,
            (size, size),
            stride,
            padding=padding or ((size // 2 * dilation,) * 2,) * 2,
            kernel_dilation=dilation,
            feature_group_count=groups,
            use_bias=False,
            kernel_init=nnx.initializers.variance_scaling(2.0, "fan_out", "normal"),
            rngs=rngs,
        )
        self.norm = BatchNorm(outputs, epsilon)

    def __call__(self, x_BHWC: jax.Array, training: bool) -> tuple[jax.Array, dict]:
        """(what it makes of hidden states, nested moments as of `BatchNorm`).

        Computed in the type of its weights.
        """
        x_BHWC = x_BHWC.astype(self.conv.kernel[...].dtype)
        x_BHWC, moments = self.norm(self.conv(x_BHWC), training)
        if self.activation:
            x_BHWC = ACTIVATIONS[self.activation](x_BHWC)
        return x_BHWC, {"norm": moments}


def _cells(size: int) -> np.ndarray:
    """float64 [_GRID, size]: each row averages the pixels of one cell; cells may overlap by one."""
    at, edges = np.arange(size), np.arange(_GRID + 1) * size
    inside = (at >= edges[:-1, None] // _GRID) & (at < -(-edges[1:, None] // _GRID))
    return inside / inside.sum(1, keepdims=True)


def through(
    part: nnx.Module, names: Sequence[str], x: jax.Array, training: bool
) -> tuple[jax.Array, dict]:
    """(what a part's units make of x, one after the other, their moments); some may lack."""
    moments = {}
    for name in names:
        if hasattr(part, name):
            x, moments[name] = getattr(part, name)(x, training)
    return x, moments


def rounded(width: float, divisor: int, least: int) -> int:
    """A multiple of `divisor` near a width, and not under 9/10 of it (Sandler et al. 2018)."""
    whole = max(least, int(width + divisor / 2) // divisor * divisor)
    return whole + divisor if whole < 0.9 * width else whole


class MLP(nnx.Module):
    """Two linear layers of equal width with a ReLU between them."""

    def __init__(self, width: int, *, rngs: nnx.Rngs):
        init = nnx.initializers.he_normal()
        self.up = nnx.Linear(width, width, kernel_init=init, rngs=rngs)
        self.down = nnx.Linear(width, width, kernel_init=nnx.initializers.normal(0.02), rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.down(jax.nn.relu(self.up(x)))


def grid_width(width: int) -> int:
    """Of the features of a grid head, for a network of that width."""
    return _GRID**2 * 2 * width


class Grid(nnx.Module):
    """For heads: what is in an image, and where: features of 4×4 places, each normalised.

    3×3 convolutions of stride 2, with a ReLU after each, stand in for the stages that an early exit
    leaves out, at a small part of their cost. Each halves the image and doubles the channels, as
    those do, once more than the network does: images of usual sizes then are 4×4. Convolutions in
    front of a head are as in MSDNet (Huang et al. 2018); it averages over the image, and early
    blocks see too little of it for that.
    """

    def __init__(self, inputs: int, outputs: int, *, rngs: nnx.Rngs):
        widths = [inputs, min(2 * inputs, outputs)]
        while widths[-1] < outputs:
            widths.append(min(2 * widths[-1], outputs))
        init, padding = nnx.initializers.he_normal(), ((1, 1), (1, 1))
        self.convs = nnx.Dict(
            {
                str(i): nnx.Conv(*pair, (3, 3), 2, padding=padding, kernel_init=init, rngs=rngs)
                for i, pair in enumerate(itertools.pairwise(widths))
            }
        )
        self.norm = layer_norm(outputs, rngs)

    def __call__(self, x_BHWC: jax.Array) -> jax.Array:
        """Hidden states → features [B, 16 · outputs]."""
        for i in range(len(self.convs)):
            x_BHWC = jax.nn.relu(self.convs[str(i)](x_BHWC))
        if x_BHWC.shape[1:3] != (_GRID, _GRID):
            down, right = (jnp.asarray(_cells(size), jnp.float32) for size in x_BHWC.shape[1:3])
            means = jnp.einsum("ih,bhwc,jw->bijc", down, x_BHWC.astype(jnp.float32), right)
            x_BHWC = means.astype(x_BHWC.dtype)
        return self.norm(x_BHWC).reshape(len(x_BHWC), -1)
