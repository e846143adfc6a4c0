"""Vision transformers (Dosovitskiy et al. 2021; Touvron et al. 2021, DeiT) in the `Backbone`
contract.

The one idea: an image is a row of patches, with tokens of its own in front, and all blocks are
alike. So heads may be whole blocks, and what is read, the first token or the mean of the patches,
is there after any of them.
"""

import dataclasses
from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from early_exit.backbones import base, image_parts, layers
from early_exit.backbones.visibility import Visibility

POOLINGS = ("first", "mean")


@dataclasses.dataclass(frozen=True)
class ViTConfig(image_parts.ImageConfig):
    """A pre-norm encoder of patches.

    Attributes:
      token_width: of the hidden states, D.
      num_classes: 0 for a network that ends in its features.
      image_size: (H, W) that its positions were trained on; for other images they are resized.
      patch_size: (H, W).
      distilled: whether a second token, of a teacher's (DeiT), stands behind the first.
      taught: whether that token has a classifier, too: logits are the mean of both then.
      pooling: what one prediction is made from: the `first` token, or the `mean` of the patches.
      pooler: whether a dense layer with a tanh stands behind the last norm.
      qkv_bias: of queries, keys and values.
      activation: of the feed-forward part, one of `layers.ACTIVATIONS`.
    """

    token_width: int
    depth: int
    heads: int
    mlp_width: int
    num_classes: int
    image_size: tuple[int, ...] = (224, 224)
    patch_size: tuple[int, ...] = (16, 16)
    channels: int = 3
    distilled: bool = False
    taught: bool = False
    pooling: str = "first"
    pooler: bool = False
    qkv_bias: bool = True
    activation: str = "gelu"
    norm_eps: float = 1e-12

    head_kinds: ClassVar[tuple[str, ...]] = ("linear", "norm", "mlp", "layer")

    def __post_init__(self):
        if self.token_width % self.heads:
            raise ValueError(f"token_width={self.token_width} is no multiple of heads={self.heads}")
        if self.activation not in layers.ACTIVATIONS:
            known = ", ".join(layers.ACTIVATIONS)
            raise ValueError(f"unknown activation {self.activation!r}; choose one of {known}")
        if self.pooling not in POOLINGS:
            known = ", ".join(POOLINGS)
            raise ValueError(f"unknown pooling {self.pooling!r}; choose one of {known}")
        if len(self.image_size) != 2 or len(self.patch_size) != 2 or not all(self.patch_size):
            raise ValueError(
                f"image_size={self.image_size} and patch_size={self.patch_size} must be (H, W)"
            )
        if min(self.grid) < 1:
            raise ValueError(f"no patch of {self.patch_size} fits into {self.image_size} pixels")
        if self.taught and not (self.distilled and self.num_classes and self.pooling == "first"):
            raise ValueError("taught needs distilled, num_classes and pooling='first'")
        if self.taught and self.pooler:
            raise ValueError("a network that is taught has no pooler")

    @property
    def width(self) -> int:
        """Of the features: those of both tokens, if both have classifiers."""
        return self.token_width * (2 if self.taught else 1)

    @property
    def grid(self) -> tuple[int, int]:
        """How many patches the positions are of, down and right."""
        return tuple(x // p for x, p in zip(self.image_size, self.patch_size, strict=True))

    @property
    def extra(self) -> int:
        """How many tokens stand in front of the patches."""
        return 2 if self.distilled else 1

    def example_inputs(self):
        return self.image_shape(*self.image_size)

    def pool(self, hidden, context):
        """[B, T, D] → [B, width]."""
        if self.taught:
            return hidden[:, :2].reshape(len(hidden), -1)
        if self.pooling == "first":
            return hidden[:, 0]
        patches = hidden[:, self.extra :]
        return patches.mean(1, dtype=jnp.float32).astype(hidden.dtype)

    def build(self, rngs):
        return ViT(self, rngs=rngs)

    def build_token_norm(self, rngs: nnx.Rngs) -> nnx.LayerNorm:
        return image_parts.layer_norm(self.token_width, rngs, self.norm_eps)

    def build_norm(self, rngs):
        """For heads; but for networks that are taught, such as stands in front of the readout."""
        return image_parts.layer_norm(self.width, rngs, self.norm_eps)

    def build_mlp(self, rngs):
        return MLP(self, self.width, rngs=rngs)

    def build_block(self, rngs):
        return Block(self, rngs=rngs)


def _linear(inputs: int, outputs: int, rngs: nnx.Rngs, bias: bool = True) -> nnx.Linear:
    init = nnx.initializers.normal(0.02)
    return nnx.Linear(inputs, outputs, use_bias=bias, kernel_init=init, rngs=rngs)


class Attention(nnx.Module):
    """Every token looks at every token."""

    def __init__(self, config: ViTConfig, *, rngs: nnx.Rngs):
        self.heads, width = config.heads, config.token_width
        self.query = _linear(width, width, rngs, config.qkv_bias)
        self.key = _linear(width, width, rngs, config.qkv_bias)
        self.value = _linear(width, width, rngs, config.qkv_bias)
        self.output = _linear(width, width, rngs)

    def __call__(self, x_BTD: jax.Array) -> jax.Array:
        query, key, value = (
            project(x_BTD).reshape(*x_BTD.shape[:2], self.heads, -1)
            for project in (self.query, self.key, self.value)
        )
        return self.output(layers.attend(query, key, value, Visibility()).reshape(x_BTD.shape))


class MLP(nnx.Module):
    """Feed-forward with one hidden layer."""

    def __init__(self, config: ViTConfig, width: int, *, rngs: nnx.Rngs):
        self.activation = config.activation
        self.up = _linear(width, config.mlp_width, rngs)
        self.down = _linear(config.mlp_width, width, rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.down(layers.ACTIVATIONS[self.activation](self.up(x)))


class Block(nnx.Module):
    """One pre-norm transformer block."""

    def __init__(self, config: ViTConfig, *, rngs: nnx.Rngs):
        self.attention_norm = config.build_token_norm(rngs)
        self.attention = Attention(config, rngs=rngs)
        self.mlp_norm = config.build_token_norm(rngs)
        self.mlp = MLP(config, config.token_width, rngs=rngs)

    def __call__(self, hidden_BTD: jax.Array, context: None = None) -> jax.Array:
        hidden_BTD = hidden_BTD + self.attention(self.attention_norm(hidden_BTD))
        return hidden_BTD + self.mlp(self.mlp_norm(hidden_BTD))


class ViT(image_parts.ImageNetwork):
    """Hidden states are [B, T, D]: the extra tokens, then the patches, row by row."""

    def __init__(self, config: ViTConfig, *, rngs: nnx.Rngs):
        c = self.config = config
        init, count = nnx.initializers.normal(0.02), c.grid[0] * c.grid[1]
        self.patches = nnx.Conv(
            c.channels, c.token_width, c.patch_size, c.patch_size, padding="VALID", rngs=rngs
        )
        self.tokens = nnx.Param(init(rngs.params(), (c.extra, c.token_width)))
        self.positions = nnx.Param(init(rngs.params(), (c.extra + count, c.token_width)))
        self.blocks = nnx.Dict({str(i): Block(c, rngs=rngs) for i in range(c.depth)})
        self.final_norm = c.build_token_norm(rngs)
        if c.pooler:
            self.pooler = _linear(c.width, c.width, rngs)
        if c.num_classes:
            self.output = base.Classifier(c.num_classes, c.token_width, rngs=rngs)
        if c.taught:
            self.taught_output = base.Classifier(c.num_classes, c.token_width, rngs=rngs)

    def enter(self, images, *, training=False):
        """Images of any size that holds a patch; pixels behind the last whole patch are not read.

        Raises:
          ValueError: smaller images.
        """
        c = self.config
        grid = tuple(x // p for x, p in zip(images.shape[1:3], c.patch_size, strict=True))
        if min(grid) < 1:
            raise ValueError(
                f"images of {' × '.join(map(str, images.shape[1:3]))} pixels hold no patch of "
                f"{' × '.join(map(str, c.patch_size))}; make them larger"
            )
        tokens, positions = self.tokens[...], self.positions[...]
        patches = self.patches(images.astype(tokens.dtype))
        patches = patches.reshape(len(images), -1, c.token_width)
        front = jnp.broadcast_to(tokens[None], (len(images), *tokens.shape))
        hidden = jnp.concatenate([front, patches], axis=1)
        if grid != c.grid:
            positions = _resized(positions, c.extra, c.grid, grid)
        return hidden + jnp.broadcast_to(positions[None], hidden.shape), {}

    def run_blocks(self, hidden, start, stop, context):
        for i in range(start, stop):
            hidden = self.blocks[str(i)](hidden)
        return hidden

    def run_blocks_training(self, hidden, start, stop, context, kept=None):
        assert kept is None
        return self.run_blocks(hidden, start, stop, context), {}

    def features(self, hidden, context=None):
        """Hidden states [B, T, D] → [B, width]."""
        c = self.config
        if c.taught:
            return self.final_norm(hidden[:, :2]).reshape(len(hidden), -1)
        pooled = self.final_norm(c.pool(hidden, context))
        return jnp.tanh(self.pooler(pooled)) if c.pooler else pooled

    def output_table(self):
        table = super().output_table()
        if not self.config.taught:
            return table
        return jnp.concatenate([table, self.taught_output.embedding[...]], axis=1) / 2

    def output_bias(self):
        bias = super().output_bias()
        return (bias + self.taught_output.bias[...]) / 2 if self.config.taught else bias


def _resized(
    positions: jax.Array, extra: int, grid: tuple[int, int], to: tuple[int, int]
) -> jax.Array:
    """Positions of the patches of another grid [extra + to, D], by bicubic interpolation.

    As transformers does it (`interpolate_pos_encoding`), which is torch's without antialiasing.
    """
    front, table = positions[:extra], positions[extra:].astype(jnp.float32)
    down, right = (
        jnp.asarray(_bicubic(old, new), jnp.float32) for old, new in zip(grid, to, strict=True)
    )
    table = jnp.einsum("ih,hwd,jw->ijd", down, table.reshape(*grid, -1), right)
    table = table.reshape(-1, table.shape[-1]).astype(positions.dtype)
    return jnp.concatenate([front, table])


def _bicubic(old: int, new: int) -> np.ndarray:
    """float64 [new, old]: the weights of samples in a row that is stretched (Keys 1981, a = −3/4).

    Ends are continued by their last sample, and pixels are areas, not points.
    """
    place = (np.arange(new) + 0.5) * old / new - 0.5
    first, weights = np.floor(place).astype(int), np.zeros((new, old))
    for offset in range(-1, 3):
        distance = np.abs(place - (first + offset))
        near = 1.25 * distance**3 - 2.25 * distance**2 + 1
        far = -0.75 * (distance**3 - 5 * distance**2 + 8 * distance - 4)
        share = np.where(distance <= 1, near, far)
        np.add.at(weights, (np.arange(new), np.clip(first + offset, 0, old - 1)), share)
    return weights
