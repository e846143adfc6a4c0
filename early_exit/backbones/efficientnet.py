"""EfficientNet (Tan & Le 2019) in the `Backbone` contract: one block is one inverted residual.

The one idea: a block of MobileNetV2's with one thing more, a weight for each channel that the whole
image decides on ("squeeze and excitation"); and one network made wider, deeper and sharper-eyed by
three numbers that go together.
"""

import dataclasses
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from early_exit.backbones import base
from early_exit.backbones.image_parts import (
    ACTIVATIONS,
    ImageConfig,
    ImageNetwork,
    Padding,
    Stump,
    Unit,
    rounded,
    through,
)

_STEM, _FEATURES = 32, 1280
# Of B0 to B4: how much wider, how much deeper, and pixels along a side (Tan & Le's code).
_PUBLISHED = {
    0: (1.0, 1.0, 224),
    1: (1.0, 1.1, 240),
    2: (1.1, 1.2, 260),
    3: (1.2, 1.4, 300),
    4: (1.4, 1.8, 380),
}


class BlockShape(NamedTuple):
    """A block's channels in, within and out, and its middle convolution."""

    inputs: int
    inner: int
    outputs: int
    size: int
    stride: int
    padding: Padding | str
    is_residual: bool


@dataclasses.dataclass(frozen=True)
class EfficientNetConfig(ImageConfig):
    """Stages of blocks behind a stem of stride 2.

    Attributes:
      num_classes: 0 for a network that ends in its features.
      wider: of every width.
      deeper: of every stage's blocks, rounded up.
      divisor: widths are rounded to multiples of it.
      inputs, outputs, sizes, strides, repeats, expansions: of each stage: channels in and out, the
        size and the first stride of the middle convolutions, blocks, and how much wider than its
        input a block is within.
      squeeze: how much narrower than a block's input the whole image's summary is.
      square: blocks (from 0) whose convolutions of stride 2 are padded alike on both sides.
      activation: one of `image_parts.ACTIVATIONS`.
      image_size: (H, W) that it was trained on; it takes others.
    """

    num_classes: int
    wider: float = 1.0
    deeper: float = 1.0
    divisor: int = 8
    inputs: tuple[int, ...] = (32, 16, 24, 40, 80, 112, 192)
    outputs: tuple[int, ...] = (16, 24, 40, 80, 112, 192, 320)
    sizes: tuple[int, ...] = (3, 3, 5, 3, 5, 5, 3)
    strides: tuple[int, ...] = (1, 2, 2, 2, 1, 2, 1)
    repeats: tuple[int, ...] = (1, 2, 2, 3, 3, 4, 1)
    expansions: tuple[int, ...] = (1, 6, 6, 6, 6, 6, 6)
    squeeze: float = 0.25
    square: tuple[int, ...] = ()
    activation: str = "silu"
    norm_eps: float = 1e-3
    channels: int = 3
    image_size: tuple[int, ...] = (224, 224)

    incidental = ("image_size",)

    def __post_init__(self):
        stages = ("inputs", "outputs", "sizes", "strides", "repeats", "expansions")
        counts = {name: len(getattr(self, name)) for name in stages}
        if len(set(counts.values())) > 1 or not self.inputs or min(self.repeats) < 1:
            raise ValueError(f"these must name the same stages, each with a block: {counts}")
        if self.wider <= 0 or self.deeper <= 0 or self.divisor < 1:
            raise ValueError(
                f"wider={self.wider}, deeper={self.deeper} and divisor={self.divisor} must be "
                "positive"
            )
        if self.activation not in ACTIVATIONS:
            known = ", ".join(ACTIVATIONS)
            raise ValueError(f"unknown activation {self.activation!r}; choose one of {known}")

    @classmethod
    def published(cls, number: int, num_classes: int = 1000) -> "EfficientNetConfig":
        """EfficientNet-B0 to -B4."""
        if number not in _PUBLISHED:
            raise ValueError(
                f"no EfficientNet-B{number}; choose one of {', '.join(map(str, _PUBLISHED))}"
            )
        wider, deeper, side = _PUBLISHED[number]
        return cls(num_classes, wider, deeper, image_size=(side, side))

    def _scaled(self, width: int) -> int:
        return rounded(width * self.wider, self.divisor, self.divisor)

    @property
    def depth(self) -> int:
        return sum(math.ceil(self.deeper * count) for count in self.repeats)

    @property
    def width(self) -> int:
        return self._scaled(_FEATURES)

    @property
    def blocks(self) -> tuple[BlockShape, ...]:
        """Every block, first to last."""
        shapes: list[BlockShape] = []
        for stage, repeats in enumerate(self.repeats):
            size, outputs = self.sizes[stage], self._scaled(self.outputs[stage])
            for index in range(math.ceil(self.deeper * repeats)):
                inputs = outputs if index else self._scaled(self.inputs[stage])
                stride, half = 1 if index else self.strides[stage], size // 2
                near = half if len(shapes) in self.square else half - 1
                shapes.append(
                    BlockShape(
                        inputs,
                        inputs * self.expansions[stage],
                        outputs,
                        size,
                        stride,
                        ((near, half), (near, half)) if stride == 2 else "SAME",
                        is_residual=index > 0,
                    )
                )
        return tuple(shapes)

    def example_inputs(self):
        return self.image_shape(*self.image_size)

    def at(self, point):
        return Stump(self.blocks[point - 1].outputs, self.channels)

    def unit(self, size: int, inputs: int, outputs: int, stride: int = 1, **how) -> Unit:
        """A convolution as all are here."""
        how = {"activation": self.activation, "epsilon": self.norm_eps} | how
        return Unit(size, inputs, outputs, stride, **how)

    def build(self, rngs):
        return EfficientNet(self, rngs=rngs)


class Squeeze(nnx.Module):
    """A weight in (0, 1) for each channel, from the mean of all (Hu et al. 2018)."""

    def __init__(self, channels: int, within: int, activation: str, *, rngs: nnx.Rngs):
        self.activation = activation
        self.reduce = nnx.Conv(channels, within, (1, 1), rngs=rngs)
        self.expand = nnx.Conv(within, channels, (1, 1), rngs=rngs)

    def __call__(self, x_BHWC: jax.Array) -> jax.Array:
        mean = x_BHWC.mean((1, 2), keepdims=True, dtype=jnp.float32).astype(x_BHWC.dtype)
        weight = jax.nn.sigmoid(self.expand(ACTIVATIONS[self.activation](self.reduce(mean))))
        return x_BHWC * weight


class Block(nnx.Module):
    """Widens, looks around in each channel, weighs channels, narrows."""

    def __init__(self, config: EfficientNetConfig, shape: BlockShape, *, rngs: nnx.Rngs):
        inner, unit = shape.inner, config.unit
        self.is_residual = shape.is_residual
        if inner != shape.inputs:
            self.expand = unit(1, shape.inputs, inner, rngs=rngs)
        around = {"groups": inner, "padding": shape.padding}
        self.depthwise = unit(shape.size, inner, inner, shape.stride, **around, rngs=rngs)
        within = max(1, int(shape.inputs * config.squeeze))
        self.squeeze = Squeeze(inner, within, config.activation, rngs=rngs)
        self.reduce = unit(1, inner, shape.outputs, activation="", rngs=rngs)

    def __call__(self, hidden_BHWC: jax.Array, *, training: bool) -> tuple[jax.Array, dict]:
        """Hidden states → (hidden states, nested moments as of `BatchNorm`)."""
        x, moments = through(self, ("expand", "depthwise"), hidden_BHWC, training)
        x, last = through(self, ("reduce",), self.squeeze(x), training)
        return hidden_BHWC + x if self.is_residual else x, moments | last


class EfficientNet(ImageNetwork):
    """The last convolution is the readout's: it keeps to stored statistics in training, too."""

    def __init__(self, config: EfficientNetConfig, *, rngs: nnx.Rngs):
        c = self.config = config
        behind = ((0, 1), (0, 1))
        self.entry = c.unit(3, c.channels, c._scaled(_STEM), 2, padding=behind, rngs=rngs)
        self.blocks = nnx.Dict(
            {str(i): Block(c, shape, rngs=rngs) for i, shape in enumerate(c.blocks)}
        )
        self.last = c.unit(1, c.blocks[-1].outputs, c.width, rngs=rngs)
        if c.num_classes:
            self.output = base.Classifier(c.num_classes, c.width, rngs=rngs)

    def enter(self, images, *, training):
        hidden, moments = self.entry(images, training)
        return hidden, {"entry": moments}

    def features(self, hidden, context=None):
        wide, _ = self.last(hidden, training=False)
        return self.config.pool(wide, context)
