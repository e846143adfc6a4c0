"""Exits on any Flax network, without a line of it written anew.

    python examples/own_module.py

Here a small ConvMixer that says which way waves run in a noisy image. `wrap` is told where its
parts lie, and finds out the rest.
"""

import jax
import numpy as np
from flax import nnx

import early_exit as ee


class Mixer(nnx.Module):
    """A depthwise convolution with a residual, then one of each pixel."""

    def __init__(self, width, rngs):
        self.spatial = nnx.Conv(width, width, (3, 3), feature_group_count=width, rngs=rngs)
        self.norm = nnx.BatchNorm(width, rngs=rngs)
        self.channels = nnx.Conv(width, width, (1, 1), rngs=rngs)
        self.dropout = nnx.Dropout(0.1, rngs=rngs)

    def __call__(self, x):
        x = x + nnx.gelu(self.norm(self.spatial(x)))
        return self.dropout(nnx.gelu(self.channels(x)))


class ConvMixer(nnx.Module):  # nothing in it knows of exits
    def __init__(self, rngs):
        self.patches = nnx.Conv(1, 16, (2, 2), strides=2, rngs=rngs)
        self.layers = nnx.List([Mixer(16, rngs) for _ in range(4)])
        self.head = nnx.Linear(16, 4, rngs=rngs)

    def __call__(self, images):
        x = self.patches(images)
        for layer in self.layers:
            x = layer(x)
        return self.head(x.mean((1, 2)))


NETWORK = ee.wrap(
    ConvMixer,
    {"images": jax.ShapeDtypeStruct((1, 16, 16, 1), "float32")},
    stem="patches",
    blocks="layers",
    output="head",
    name="conv_mixer",
)


def batch(seed, size=32):
    """Noise, and waves in one of four directions, which the label names."""
    rng = np.random.default_rng(seed)
    images, labels = rng.normal(size=(size, 16, 16, 1)), rng.integers(0, 4, size)
    down, right = np.mgrid[:16, :16]
    for image, label in zip(images, labels, strict=True):
        along = down * np.sin(label * np.pi / 4) + right * np.cos(label * np.pi / 4)
        image[..., 0] += np.sin(along * np.pi / 2 + rng.uniform(0, 6))
    return {"images": images.astype(np.float32), "labels": labels}


def main():
    ee.register.network(NETWORK)  # so that `ee.load` knows it by its name
    params = NETWORK.params_of(ConvMixer(nnx.Rngs(0)))  # or those of a network that you have
    model = ee.attach(ee.Model.of(NETWORK, params), (1, 2), init="random")
    data = [batch(seed) for seed in range(16)]
    how = {"loss": "cross_entropy", "train": "all", "learning_rate": 1e-2}
    model = ee.tune(model, data, steps=40, progress=False, **how)
    model = ee.calibrate(model, [batch(seed) for seed in range(20, 24)], epsilon=0.9)
    test = batch(99)
    found = ee.classify(model, {"images": test["images"]})
    right = (found.labels == test["labels"]).mean()
    print(f"{right:.0%} right, {found.depths.mean():.1f} of {model.depth} blocks in the mean")


if __name__ == "__main__":
    main()
