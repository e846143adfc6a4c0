"""Residual networks (He et al. 2016) in the `Backbone` contract: one block is one residual unit.

The one idea: a BatchNorm's statistics are parameters like any other, and no call changes them.
Inference, and a frozen backbone, normalise by what is stored. Training normalises by the moments
of the batch and returns them; `base.update_statistics` then makes the next parameters, so that a
training step stays a function from state to state. Under sharding the moments are those of the
whole batch.
"""

import dataclasses
import itertools
from typing import ClassVar, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from early_exit import tree
from early_exit.backbones import base

STEMS = ("imagenet", "cifar")
BLOCKS = ("basic", "bottleneck")
# The running statistics, as a regex over the paths of parameters. No gradient moves them, and they
# are no matrices, which alone decay: any optimizer of this package leaves them as they are. One of
# your own that decays everything needs this to leave them out.
STATISTICS = r"(^|/)norm/(mean|variance)$"

_EPSILON = 1e-5  # of every BatchNorm, as in torch
_REDUCTION = 4  # how much narrower a bottleneck is inside
_GRID = 4  # places along each side, for heads that keep a coarse layout
# Layers, as networks are named by → (kind of block, blocks of each stage): He et al., table 1.
_IMAGENET = {
    18: ("basic", (2, 2, 2, 2)),
    34: ("basic", (3, 4, 6, 3)),
    50: ("bottleneck", (3, 4, 6, 3)),
    101: ("bottleneck", (3, 4, 23, 3)),
    152: ("bottleneck", (3, 8, 36, 3)),
}


class BlockShape(NamedTuple):
    """Where a block stands (both count from 0), its channels in and out, and its stride."""

    stage: int
    index: int
    inputs: int
    outputs: int
    stride: int

    @property
    def has_shortcut(self) -> bool:
        """Whether the shortcut is a 1×1 convolution: where the identity does not fit."""
        return self.inputs != self.outputs or self.stride != 1


@dataclasses.dataclass(frozen=True)
class ResNetConfig(base.BackboneConfig):
    """A residual network in stages; each but the first halves the image.

    Attributes:
      depths: blocks of each stage.
      widths: channels that each stage's blocks put out.
      num_classes: 0 for a network that ends in its features.
      block: `basic` (two 3×3 convolutions) or `bottleneck` (1×1, 3×3, 1×1).
      stem: `imagenet` (7×7 of stride 2, then 3×3 max-pooling of stride 2) or `cifar` (3×3).
      stem_width: channels after the stem.
      channels: of the images.
      first_stride: of the first stage.
      early_stride: a bottleneck's stride lies in its first convolution, as published, instead of
        in the 3×3 one ("v1.5", what torchvision and most weights have).
    """

    depths: tuple[int, ...]
    widths: tuple[int, ...]
    num_classes: int
    block: str = "basic"
    stem: str = "imagenet"
    stem_width: int = 64
    channels: int = 3
    first_stride: int = 1
    early_stride: bool = False

    reads: ClassVar[str] = "images"
    classifies: ClassVar[bool] = True
    head_kinds: ClassVar[tuple[str, ...]] = ("linear", "norm", "mlp", "grid")

    def __post_init__(self):
        if self.block not in BLOCKS:
            raise ValueError(f"unknown block {self.block!r}; choose one of {', '.join(BLOCKS)}")
        if self.stem not in STEMS:
            raise ValueError(f"unknown stem {self.stem!r}; choose one of {', '.join(STEMS)}")
        if not self.depths or len(self.depths) != len(self.widths):
            raise ValueError(
                f"depths={self.depths} and widths={self.widths} must name the same stages, "
                "at least one"
            )
        if min(self.depths) < 1:
            raise ValueError(f"every stage needs a block, not depths={self.depths}")
        if self.block == "bottleneck" and any(width % _REDUCTION for width in self.widths):
            raise ValueError(f"bottlenecks need multiples of {_REDUCTION}, not {self.widths}")

    def example_inputs(self) -> dict[str, jax.ShapeDtypeStruct]:
        size = 224 if self.stem == "imagenet" else 32
        return {"images": jax.ShapeDtypeStruct((1, size, size, self.channels), jnp.float32)}

    @classmethod
    def imagenet(cls, layers: int, num_classes: int = 1000) -> "ResNetConfig":
        """ResNet-18, -34, -50, -101 or -152."""
        if layers not in _IMAGENET:
            raise ValueError(f"no ResNet-{layers}; choose one of {', '.join(map(str, _IMAGENET))}")
        block, depths = _IMAGENET[layers]
        widths = (64, 128, 256, 512) if block == "basic" else (256, 512, 1024, 2048)
        return cls(depths, widths, num_classes, block)

    @classmethod
    def cifar(
        cls, layers: int, num_classes: int = 10, channels: int = 3, width: int = 16
    ) -> "ResNetConfig":
        """ResNet-20, -32, -44, -56, -110 or any other of 6·n + 2 layers (He et al., §4.2).

        Two shortcuts lie between stages. They are 1×1 convolutions ("option B") as everywhere
        else, where the paper pads with zeros ("option A") to save 1 % of ResNet-20's parameters.
        The paper's `width`, of the first stage, is 16.
        """
        if layers < 8 or layers % 6 != 2:
            raise ValueError(f"such networks have 6·n + 2 layers (20, 32, 44, …), not {layers}")
        depths = (layers // 6,) * 3
        widths = (width, 2 * width, 4 * width)
        return cls(depths, widths, num_classes, stem="cifar", stem_width=width, channels=channels)

    @property
    def depth(self) -> int:
        return sum(self.depths)

    @property
    def width(self) -> int:
        return self.widths[-1]

    @property
    def grid_width(self) -> int:
        return _GRID**2 * 2 * self.width

    @property
    def blocks(self) -> tuple[BlockShape, ...]:
        """Every block, first to last."""
        shapes, inputs = [], self.stem_width
        for stage, (depth, width) in enumerate(zip(self.depths, self.widths, strict=True)):
            for index in range(depth):
                stride = (2 if stage else self.first_stride) if index == 0 else 1
                shapes.append(BlockShape(stage, index, inputs, width, stride))
                inputs = width
        return tuple(shapes)

    @property
    def units(self) -> int:
        """Convolutions of a block, its shortcut excepted."""
        return 2 if self.block == "basic" else 3

    def at(self, point: int) -> "ResNetConfig":
        """The network that ends after block `point`: the width, and the parts of heads there.

        Raises:
          ValueError: no such block.
        """
        if not 1 <= point <= self.depth:
            raise ValueError(f"point {point} lies outside 1…{self.depth}")
        starts = itertools.accumulate(self.depths, initial=0)
        depths = tuple(
            min(depth, point - start)
            for depth, start in zip(self.depths, starts, strict=False)
            if start < point
        )
        return dataclasses.replace(self, depths=depths, widths=self.widths[: len(depths)])

    def build(self, rngs: nnx.Rngs) -> "ResNet":
        return ResNet(self, rngs=rngs)

    def build_norm(self, rngs: nnx.Rngs) -> nnx.LayerNorm:
        """For heads, over pooled features. The network itself has no norm in front of its readout.

        A LayerNorm: it needs no statistics, and is the same for one image as for a batch.
        """
        return _layer_norm(self.width, rngs)

    def pool(self, hidden, context):
        return hidden.mean((1, 2), dtype=jnp.float32).astype(hidden.dtype)

    def build_mlp(self, rngs: nnx.Rngs) -> "MLP":
        """For heads, over pooled features. The network itself has none."""
        return MLP(self.width, rngs=rngs)

    def build_grid(self, point: int, rngs: nnx.Rngs) -> "Grid":
        return Grid(self.at(point).width, 2 * self.width, rngs=rngs)


def _layer_norm(width: int, rngs: nnx.Rngs) -> nnx.LayerNorm:
    # The fast variance, E[x²] − E[x]², cancels where the mean is far from 0.
    return nnx.LayerNorm(width, epsilon=_EPSILON, use_fast_variance=False, rngs=rngs)


def _cells(size: int) -> np.ndarray:
    """float64 [_GRID, size]: each row averages the pixels of one cell; cells may overlap by one."""
    at, edges = np.arange(size), np.arange(_GRID + 1) * size
    inside = (at >= edges[:-1, None] // _GRID) & (at < -(-edges[1:, None] // _GRID))
    return inside / inside.sum(1, keepdims=True)


class BatchNorm(nnx.Module):
    """Normalises channels by stored or by the batch's statistics (Ioffe & Szegedy 2015)."""

    def __init__(self, width: int):
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
        factor = scale * jax.lax.rsqrt(variance + _EPSILON)
        out = wide * _per_channel(factor) + _per_channel(bias - mean * factor)
        return out.astype(x_BHWC.dtype), moments


def _per_channel(values_C: jax.Array) -> jax.Array:
    return values_C[None, None, None]


class Unit(nnx.Module):
    """A convolution without bias, padded by half its size on both sides, and its BatchNorm."""

    def __init__(self, size: int, inputs: int, outputs: int, stride: int, *, rngs: nnx.Rngs):
        # Not "SAME": with stride 2 that pads even sizes on one side only.
        self.conv = nnx.Conv(
            inputs,
            outputs,
            (size, size),
            stride,
            padding=((size // 2, size // 2),) * 2,
            use_bias=False,
            kernel_init=nnx.initializers.variance_scaling(2.0, "fan_out", "normal"),
            rngs=rngs,
        )
        self.norm = BatchNorm(outputs)

    def __call__(self, x_BHWC: jax.Array, training: bool) -> tuple[jax.Array, dict]:
        x_BHWC, moments = self.norm(self.conv(x_BHWC), training)
        return x_BHWC, {"norm": moments}


class Block(nnx.Module):
    """Two or three units, the shortcut beside them, and a ReLU after each and after the sum."""

    def __init__(self, config: ResNetConfig, shape: BlockShape, *, rngs: nnx.Rngs):
        inputs, outputs, stride = shape.inputs, shape.outputs, shape.stride
        if config.block == "basic":
            units = [(3, inputs, outputs, stride), (3, outputs, outputs, 1)]
        else:
            inner = outputs // _REDUCTION
            first, second = (stride, 1) if config.early_stride else (1, stride)
            units = [(1, inputs, inner, first), (3, inner, inner, second), (1, inner, outputs, 1)]
        self.units = nnx.Dict({str(i): Unit(*unit, rngs=rngs) for i, unit in enumerate(units)})
        if shape.has_shortcut:
            self.shortcut = Unit(1, inputs, outputs, stride, rngs=rngs)

    def __call__(self, hidden_BHWC: jax.Array, *, training: bool) -> tuple[jax.Array, dict]:
        """Hidden states → (hidden states, nested moments as of `BatchNorm`)."""
        x, moments = hidden_BHWC, {}
        for i in range(len(self.units)):
            x, moments[str(i)] = self.units[str(i)](jax.nn.relu(x) if i else x, training)
        moments = {"units": moments}
        if hasattr(self, "shortcut"):
            hidden_BHWC, moments["shortcut"] = self.shortcut(hidden_BHWC, training)
        return jax.nn.relu(x + hidden_BHWC), moments


class MLP(nnx.Module):
    """Two linear layers of equal width with a ReLU between them."""

    def __init__(self, width: int, *, rngs: nnx.Rngs):
        init = nnx.initializers.he_normal()
        self.up = nnx.Linear(width, width, kernel_init=init, rngs=rngs)
        self.down = nnx.Linear(width, width, kernel_init=nnx.initializers.normal(0.02), rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.down(jax.nn.relu(self.up(x)))


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
        self.norm = _layer_norm(outputs, rngs)

    def __call__(self, x_BHWC: jax.Array) -> jax.Array:
        """Hidden states → features [B, 16 · outputs]."""
        for i in range(len(self.convs)):
            x_BHWC = jax.nn.relu(self.convs[str(i)](x_BHWC))
        if x_BHWC.shape[1:3] != (_GRID, _GRID):
            down, right = (jnp.asarray(_cells(size), jnp.float32) for size in x_BHWC.shape[1:3])
            means = jnp.einsum("ih,bhwc,jw->bijc", down, x_BHWC.astype(jnp.float32), right)
            x_BHWC = means.astype(x_BHWC.dtype)
        return self.norm(x_BHWC).reshape(len(x_BHWC), -1)


class ResNet(base.Backbone):
    """Stem, blocks, global average pooling, output matrix with bias.

    Hidden states are [B, H, W, C]; between stages H and W halve and C grows.
    """

    def __init__(self, config: ResNetConfig, *, rngs: nnx.Rngs):
        self.config = config
        size, stride = (7, 2) if config.stem == "imagenet" else (3, 1)
        self.entry = Unit(size, config.channels, config.stem_width, stride, rngs=rngs)
        self.blocks = nnx.Dict(
            {str(i): Block(config, shape, rngs=rngs) for i, shape in enumerate(config.blocks)}
        )
        if config.num_classes:
            self.output = base.Classifier(config.num_classes, config.width, rngs=rngs)

    def stem(self, inputs: dict[str, jax.Array]) -> tuple[jax.Array, None]:
        """Inputs:
        images: float32 [B, H, W, channels], normalised as the weights expect.
        """
        hidden, context, _ = self._stem(inputs, training=False)
        return hidden, context

    def stem_training(self, inputs: dict[str, jax.Array]) -> tuple[jax.Array, None, base.Moments]:
        """Like `stem`, normalising by the batch's moments and returning them."""
        return self._stem(inputs, training=True)

    def _stem(self, inputs, training: bool):
        images, channels = inputs["images"], self.config.channels
        if images.ndim != 4 or images.shape[-1] != channels:
            raise ValueError(
                f"images are [B, H, W, {channels}], channels last; these have the shape "
                f"{list(images.shape)}"
            )
        images = images.astype(self.entry.conv.kernel[...].dtype)
        hidden, moments = self.entry(images, training)
        hidden = jax.nn.relu(hidden)
        if self.config.stem == "imagenet":
            hidden = nnx.max_pool(hidden, (3, 3), (2, 2), padding=((1, 1), (1, 1)))
        return hidden, None, tree.flatten({"entry": moments})

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
