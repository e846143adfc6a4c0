"""MobileNetV2 (Sandler et al. 2018) in the `Backbone` contract: one block is one inverted residual.

The one idea: a block is narrow at its ends and wide in between, where a convolution of each channel
by itself looks around. So hidden states are small wherever one may leave; what makes features of
them, a 1×1 convolution to many channels, is paid at the end alone.
"""

import dataclasses
from typing import NamedTuple

import jax
from flax import nnx

from early_exit.backbones import base
from early_exit.backbones.image_parts import (
    ACTIVATIONS,
    ImageConfig,
    ImageNetwork,
    Stump,
    Unit,
    rounded,
    through,
)

# Channels after the stem and after each block, and the blocks' strides: Sandler et al., table 2.
_WIDTHS = (16, 24, 24, 32, 32, 32, 64, 64, 64, 64, 96, 96, 96, 160, 160, 160, 320)
_STRIDES = (2, 1, 2, 1, 1, 2, 1, 1, 1, 1, 1, 1, 2, 1, 1, 1)
_STEM, _FEATURES = 32, 1280


class BlockShape(NamedTuple):
    """A block's channels in, within and out, and how its middle convolution goes over the image."""

    inputs: int
    inner: int
    outputs: int
    stride: int
    dilation: int

    @property
    def is_residual(self) -> bool:
        return self.stride == 1 and self.inputs == self.outputs


@dataclasses.dataclass(frozen=True)
class MobileNetV2Config(ImageConfig):
    """Sixteen blocks behind a stem of stride 2.

    Attributes:
      num_classes: 0 for a network that ends in its features.
      multiplier: of every width ("depth multiplier", in the paper α).
      divisor: widths are rounded to multiples of it.
      least: of every width.
      expansion: of a block's width within.
      output_stride: how much smaller than the image the hidden states become at most; from there
        on, convolutions are dilated instead.
      stem_expands: whether the stem has a 1×1 convolution between its first two.
      wide_features: whether a multiplier below 1 leaves the features as wide as they are.
      same: pads as TensorFlow does, in which published weights were trained.
      activation: one of `image_parts.ACTIVATIONS`.
      image_size: (H, W) that it was trained on; it takes others.
    """

    num_classes: int
    multiplier: float = 1.0
    divisor: int = 8
    least: int = 8
    expansion: float = 6.0
    output_stride: int = 32
    stem_expands: bool = False
    wide_features: bool = True
    same: bool = True
    activation: str = "relu6"
    norm_eps: float = 1e-3
    channels: int = 3
    image_size: tuple[int, ...] = (224, 224)

    incidental = ("image_size",)

    def __post_init__(self):
        if self.multiplier <= 0 or self.divisor < 1:
            raise ValueError(
                f"multiplier={self.multiplier} and divisor={self.divisor} make no widths; both "
                "must be positive"
            )
        if self.activation not in ACTIVATIONS:
            raise ValueError(
                f"unknown activation {self.activation!r}; choose one of {', '.join(ACTIVATIONS)}"
            )

    def _rounded(self, width: float) -> int:
        return rounded(int(round(width)), self.divisor, self.least)

    def _scaled(self, width: int) -> int:
        return self._rounded(width * self.multiplier)

    @property
    def depth(self) -> int:
        return len(_STRIDES)

    @property
    def stem_width(self) -> int:
        """Channels within the stem."""
        return self._scaled(_STEM)

    @property
    def width(self) -> int:
        keeps = self.wide_features and self.multiplier < 1
        return _FEATURES if keeps else self._scaled(_FEATURES)

    @property
    def blocks(self) -> tuple[BlockShape, ...]:
        """Every block, first to last."""
        widths = [self._scaled(width) for width in _WIDTHS]
        shapes, reached, dilation = [], 2, 1
        for inputs, outputs, stride in zip(widths, widths[1:], _STRIDES, strict=False):
            inner = self._rounded(inputs * self.expansion)
            dilates = reached == self.output_stride
            shapes.append(
                BlockShape(
                    inputs,
                    inner,
                    outputs,
                    stride=1 if dilates else stride,
                    dilation=dilation if dilates else 1,
                )
            )
            if dilates:
                dilation *= stride
            else:
                reached *= stride
        return tuple(shapes)

    def example_inputs(self):
        return self.image_shape(*self.image_size)

    def at(self, point):
        return Stump(self.blocks[point - 1].outputs, self.channels)

    def unit(self, size: int, inputs: int, outputs: int, stride: int = 1, **how) -> Unit:
        """A convolution as all are here."""
        usual = {"activation": self.activation, "epsilon": self.norm_eps}
        how = usual | {"padding": "SAME" if self.same else ""} | how
        return Unit(size, inputs, outputs, stride, **how)

    def build(self, rngs):
        return MobileNetV2(self, rngs=rngs)


class Stem(nnx.Module):
    """A convolution of stride 2, and what a block has behind its first convolution."""

    def __init__(self, config: MobileNetV2Config, *, rngs: nnx.Rngs):
        inner, unit = config.stem_width, config.unit
        self.first = unit(3, config.channels, inner, 2, rngs=rngs)
        if config.stem_expands:
            self.expand = unit(1, inner, inner, rngs=rngs)
        self.depthwise = unit(3, inner, inner, groups=inner, rngs=rngs)
        self.reduce = unit(1, inner, config.blocks[0].inputs, activation="", rngs=rngs)

    def __call__(self, x_BHWC: jax.Array, *, training: bool) -> tuple[jax.Array, dict]:
        return through(self, ("first", "expand", "depthwise", "reduce"), x_BHWC, training)


class Block(nnx.Module):
    """Widens, looks around in each channel, narrows; beside it the identity, where it fits."""

    def __init__(self, config: MobileNetV2Config, shape: BlockShape, *, rngs: nnx.Rngs):
        inner, unit = shape.inner, config.unit
        self.is_residual = shape.is_residual
        self.expand = unit(1, shape.inputs, inner, rngs=rngs)
        around = {"groups": inner, "dilation": shape.dilation}
        self.depthwise = unit(3, inner, inner, shape.stride, **around, rngs=rngs)
        self.reduce = unit(1, inner, shape.outputs, activation="", rngs=rngs)

    def __call__(self, hidden_BHWC: jax.Array, *, training: bool) -> tuple[jax.Array, dict]:
        """Hidden states → (hidden states, nested moments as of `BatchNorm`)."""
        x, moments = through(self, ("expand", "depthwise", "reduce"), hidden_BHWC, training)
        return hidden_BHWC + x if self.is_residual else x, moments


class MobileNetV2(ImageNetwork):
    """The last convolution is the readout's: it keeps to stored statistics in training, too."""

    def __init__(self, config: MobileNetV2Config, *, rngs: nnx.Rngs):
        self.config = config
        self.entry = Stem(config, rngs=rngs)
        self.blocks = nnx.Dict(
            {str(i): Block(config, shape, rngs=rngs) for i, shape in enumerate(config.blocks)}
        )
        self.last = config.unit(1, config.blocks[-1].outputs, config.width, rngs=rngs)
        if config.num_classes:
            self.output = base.Classifier(config.num_classes, config.width, rngs=rngs)

    def enter(self, images, *, training):
        hidden, moments = self.entry(images, training=training)
        return hidden, {"entry": moments}

    def features(self, hidden, context=None):
        wide, _ = self.last(hidden, training=False)
        return self.config.pool(wide, context)
