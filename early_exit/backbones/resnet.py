"""Residual networks (He et al. 2016) in the `Backbone` contract.

The one idea: one block is one residual unit; where a stage begins, it halves the image.
"""

import dataclasses
import itertools
from typing import NamedTuple

import jax
from flax import nnx

from early_exit.backbones import base
from early_exit.backbones.image_parts import ImageConfig, ImageNetwork, Unit

STEMS = ("imagenet", "cifar")
BLOCKS = ("basic", "bottleneck")

_REDUCTION = 4  # how much narrower a bottleneck is inside
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
class ResNetConfig(ImageConfig):
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
        return self.image_shape(size, size)

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


class ResNet(ImageNetwork):
    """Hidden states are [B, H, W, C]; between stages H and W halve and C grows."""

    def __init__(self, config: ResNetConfig, *, rngs: nnx.Rngs):
        self.config = config
        size, stride = (7, 2) if config.stem == "imagenet" else (3, 1)
        self.entry = Unit(
            size, config.channels, config.stem_width, stride, activation="relu", rngs=rngs
        )
        self.blocks = nnx.Dict(
            {str(i): Block(config, shape, rngs=rngs) for i, shape in enumerate(config.blocks)}
        )
        if config.num_classes:
            self.output = base.Classifier(config.num_classes, config.width, rngs=rngs)

    def enter(self, images, *, training):
        hidden, moments = self.entry(images, training)
        if self.config.stem == "imagenet":
            hidden = nnx.max_pool(hidden, (3, 3), (2, 2), padding=((1, 1), (1, 1)))
        return hidden, {"entry": moments}
