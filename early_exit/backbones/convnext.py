"""ConvNeXt (Liu et al. 2022) in the `Backbone` contract: one block is one of its residual blocks.

The one idea: it is a transformer's block with a wide convolution of each channel where attention
was. What makes the image smaller between stages belongs to the block behind it.
"""

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from early_exit.backbones import base, layers
from early_exit.backbones.image_parts import ImageConfig, ImageNetwork, Stump, layer_norm

_EPSILON = 1e-6  # of every norm but the last
_AROUND = 7  # pixels along each side that a block looks at
_WIDER = 4  # how much wider a block is within


class BlockShape(NamedTuple):
    """Where a block stands (both count from 0), and its channels in and out."""

    stage: int
    index: int
    inputs: int
    outputs: int

    @property
    def reduces(self) -> bool:
        """Whether the image is halved in front of it."""
        return self.stage > 0 and self.index == 0


@dataclasses.dataclass(frozen=True)
class ConvNeXtConfig(ImageConfig):
    """Stages of blocks; each but the first halves the image.

    Attributes:
      depths: blocks of each stage.
      widths: channels of each stage.
      num_classes: 0 for a network that ends in its features.
      patch_size: (H, W) of what the stem makes one place of.
      layer_scale: whether what a block adds is scaled, channel by channel.
      activation: one of `layers.ACTIVATIONS`.
      norm_eps: of the last norm.
      image_size: (H, W) that it was trained on; it takes others.
    """

    depths: tuple[int, ...]
    widths: tuple[int, ...]
    num_classes: int
    patch_size: tuple[int, ...] = (4, 4)
    layer_scale: bool = True
    activation: str = "gelu"
    norm_eps: float = 1e-12
    channels: int = 3
    image_size: tuple[int, ...] = (224, 224)

    incidental = ("image_size",)

    def __post_init__(self):
        if not self.depths or len(self.depths) != len(self.widths) or min(self.depths) < 1:
            raise ValueError(
                f"depths={self.depths} and widths={self.widths} must name the same stages, each "
                "with a block"
            )
        if self.activation not in layers.ACTIVATIONS:
            known = ", ".join(layers.ACTIVATIONS)
            raise ValueError(f"unknown activation {self.activation!r}; choose one of {known}")

    @property
    def depth(self) -> int:
        return sum(self.depths)

    @property
    def width(self) -> int:
        return self.widths[-1]

    @property
    def blocks(self) -> tuple[BlockShape, ...]:
        """Every block, first to last."""
        shapes, inputs = [], self.widths[0]
        for stage, (depth, width) in enumerate(zip(self.depths, self.widths, strict=True)):
            for index in range(depth):
                shapes.append(BlockShape(stage, index, inputs, width))
                inputs = width
        return tuple(shapes)

    def example_inputs(self):
        return self.image_shape(*self.image_size)

    def at(self, point):
        return Stump(self.blocks[point - 1].outputs, self.channels)

    def build(self, rngs):
        return ConvNeXt(self, rngs=rngs)

    def build_norm(self, rngs):
        return layer_norm(self.width, rngs, self.norm_eps)


def _conv(inputs: int, outputs: int, size, stride, *, rngs: nnx.Rngs, **how) -> nnx.Conv:
    init = nnx.initializers.normal(0.02)
    return nnx.Conv(inputs, outputs, size, stride, kernel_init=init, rngs=rngs, **how)


class Block(nnx.Module):
    """Looks around in each channel, then mixes channels; beside it the identity."""

    def __init__(self, config: ConvNeXtConfig, shape: BlockShape, *, rngs: nnx.Rngs):
        inputs, width, init = shape.inputs, shape.outputs, nnx.initializers.normal(0.02)
        self.activation = config.activation
        if shape.reduces:
            self.reduce_norm = layer_norm(inputs, rngs, _EPSILON)
            self.reduce = _conv(inputs, width, (2, 2), 2, padding="VALID", rngs=rngs)
        half = ((_AROUND // 2,) * 2,) * 2
        how = {"padding": half, "feature_group_count": width}
        self.depthwise = _conv(width, width, (_AROUND, _AROUND), 1, **how, rngs=rngs)
        self.norm = layer_norm(width, rngs, _EPSILON)
        self.up = nnx.Linear(width, _WIDER * width, kernel_init=init, rngs=rngs)
        self.down = nnx.Linear(_WIDER * width, width, kernel_init=init, rngs=rngs)
        if config.layer_scale:
            self.layer_scale = nnx.Param(jnp.full(width, 1e-6))

    def __call__(self, hidden_BHWC: jax.Array, *, training: bool) -> tuple[jax.Array, dict]:
        """Hidden states → (hidden states, no moments: nothing here has statistics)."""
        if hasattr(self, "reduce"):
            hidden_BHWC = self.reduce(self.reduce_norm(hidden_BHWC))
        x = self.norm(self.depthwise(hidden_BHWC))
        x = self.down(layers.ACTIVATIONS[self.activation](self.up(x)))
        if hasattr(self, "layer_scale"):
            x = x * self.layer_scale[...][None, None, None]
        return hidden_BHWC + x, {}


class ConvNeXt(ImageNetwork):
    """Hidden states are [B, H, W, C]; between stages H and W halve and C grows."""

    def __init__(self, config: ConvNeXtConfig, *, rngs: nnx.Rngs):
        c = self.config = config
        size = tuple(c.patch_size)
        self.patches = _conv(c.channels, c.widths[0], size, size, padding="VALID", rngs=rngs)
        self.patch_norm = layer_norm(c.widths[0], rngs, _EPSILON)
        self.blocks = nnx.Dict(
            {str(i): Block(c, shape, rngs=rngs) for i, shape in enumerate(c.blocks)}
        )
        self.final_norm = c.build_norm(rngs)
        if c.num_classes:
            self.output = base.Classifier(c.num_classes, c.width, rngs=rngs)

    def enter(self, images, *, training):
        images = images.astype(self.patches.kernel[...].dtype)
        return self.patch_norm(self.patches(images)), {}

    def features(self, hidden, context=None):
        return self.final_norm(self.config.pool(hidden, context))
