"""Residual networks against torch in one process: import, inference, and training step by step."""

import functools
import pathlib
import runpy

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from early_exit import tree
from early_exit.backbones import base
from early_exit.backbones.base import update_statistics
from early_exit.pretrained import resnet, torchvision
from early_exit.pretrained.load import load

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

pytestmark = pytest.mark.parity

FIXTURES = pathlib.Path(__file__).parents[1] / "fixtures"
CASES = {
    "basic": dict(layer_type="basic", hidden_sizes=[5, 9, 11, 7], depths=[1, 2, 1, 2]),
    "no shortcut": dict(layer_type="basic", hidden_sizes=[6], depths=[3], embedding_size=6),
    "bottleneck": dict(layer_type="bottleneck", hidden_sizes=[8, 20, 12], depths=[2, 1, 2]),
    "early stride": dict(
        layer_type="bottleneck", hidden_sizes=[16, 24], depths=[1, 3], downsample_in_bottleneck=True
    ),
    "grey": dict(
        layer_type="basic",
        hidden_sizes=[7, 8],
        depths=[2, 2],
        num_channels=1,
        downsample_in_first_stage=True,
    ),
    "cifar": dict(block="basic", stem="cifar", depths=[3, 3, 3], widths=[5, 8, 13]),
    "torchvision": dict(block="bottleneck", stem="imagenet", depths=[1, 2], widths=[12, 28]),
}


@pytest.fixture(scope="module")
def helpers():
    return runpy.run_path(str(FIXTURES / "make_resnet.py"))


@pytest.fixture(params=CASES)
def case(request, helpers, tmp_path):
    """(family, the loaded network, torch's network, the module whose train() counts)."""
    sizes = dict(CASES[request.param])
    if "layer_type" in sizes:
        sizes = dict(num_labels=6, embedding_size=4) | sizes
        module = helpers["random_transformers"](sizes, seed=1)
        module.save_pretrained(tmp_path, max_shard_size="20KB")
        return resnet, load(str(tmp_path)), helpers["TransformersResNet"](module), module
    sizes |= dict(num_classes=6, stem_width=4)
    module = helpers["randomise"](helpers["TorchvisionResNet"](**sizes), seed=1)
    helpers["save_torchvision"](module, sizes, tmp_path)
    return torchvision, load(str(tmp_path)), module, module


@functools.partial(jax.jit, static_argnums=(0, 3))
def run(config, params, images, training):
    """(hidden states of the stem and of every block, features, logits, moments)."""
    model = base.merge(base.abstract(config.build)[0], params)
    moments = {}
    if training:
        hidden, context, moments = model.stem_training({"images": images})
    else:
        hidden, context = model.stem({"images": images})
    states = [hidden]
    for i in range(config.depth):
        if training:
            hidden, more = model.run_blocks_training(hidden, i, i + 1, context)
            moments |= more
        else:
            hidden = model.run_blocks(hidden, i, i + 1, context)
        states.append(hidden)
    return states, model.features(hidden), model.readout(hidden), moments


def test_random_networks(case, helpers):
    _, pretrained, net, _ = case
    images = helpers["random_images"](3, 41, 36, pretrained.config.channels, seed=2)
    states, features, logits, _ = run(pretrained.config, pretrained.params, images, False)
    expected = helpers["evaluate"](net, images)
    for i, state in enumerate(states):
        np.testing.assert_allclose(state, expected[f"hidden_{i}"], rtol=0, atol=1e-4)
    np.testing.assert_allclose(features, expected["features"], rtol=0, atol=1e-4)
    np.testing.assert_allclose(logits, expected["logits"], rtol=0, atol=1e-4)


def test_three_steps_of_training(case, helpers):
    """torch's train() mode: forward pass, gradients, running statistics, plain descent.

    torch in float64 and small images: where a float32 rounds to the other side of a ReLU,
    gradients differ visibly, and the fewer pixels, the fewer do.
    """
    family, pretrained, net, module = case
    config, params, rate = pretrained.config, pretrained.params, 0.05
    entries = family.entries(config)
    module.double().train()

    def ours_as_theirs(params):
        flat = tree.flatten(params)
        return {e.name: e.layout.join([np.asarray(flat[p]) for p in e.paths]) for e in entries}

    def loss(params, images, targets):
        _, _, logits, moments = run(config, params, images, True)
        return jnp.square(logits - targets).mean(), (logits, moments)

    slope = jax.jit(jax.grad(loss, has_aux=True))
    size = (9, 12) if config.stem == "cifar" else (33, 40)
    for seed in range(3):
        images = helpers["random_images"](5, *size, config.channels, seed=seed)
        targets = helpers["random_images"](5, config.num_classes, seed=seed + 10)
        module.zero_grad()
        _, _, their_logits = helpers["forward"](net, images.astype(np.float64))
        torch.square(their_logits - torch.from_numpy(targets)).mean().backward()
        gradients, (logits, moments) = slope(params, images, targets)
        np.testing.assert_allclose(logits, their_logits.detach().numpy(), rtol=0, atol=1e-4)

        gradients_as_theirs = ours_as_theirs(gradients)
        with torch.no_grad():
            for name, weight in module.named_parameters():
                np.testing.assert_allclose(
                    gradients_as_theirs[name], weight.grad, rtol=0, atol=1e-4, err_msg=name
                )
                weight -= rate * weight.grad
        params = jax.tree.map(lambda p, g: p - rate * g, params, gradients)
        params = update_statistics(params, moments)

    stored = {name: tensor.numpy() for name, tensor in module.state_dict().items()}
    assert {int(v) for name, v in stored.items() if "num_batches" in name} == {3}
    for name, value in ours_as_theirs(params).items():
        np.testing.assert_allclose(value, stored[name], rtol=1e-4, atol=1e-4, err_msg=name)

    module.eval()
    expected = helpers["evaluate"](net, images.astype(np.float64))["logits"]
    np.testing.assert_allclose(run(config, params, images, False)[2], expected, rtol=0, atol=1e-4)
