import functools
from pathlib import Path

import fake_devices
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from early_exit import tree
from early_exit.backbones import base
from early_exit.backbones.base import update_statistics
from early_exit.backbones.image_parts import STATISTICS, BatchNorm
from early_exit.backbones.resnet import ResNetConfig

ROOT = Path(__file__).parents[2]
CIFAR = ResNetConfig((1, 2), (4, 6), num_classes=5, stem="cifar", stem_width=4)
IMAGENET = ResNetConfig(
    (2, 1), (8, 12), num_classes=3, block="bottleneck", stem_width=5, first_stride=2
)
EARLY = ResNetConfig((1, 2), (8, 12), num_classes=3, block="bottleneck", early_stride=True)
CONFIGS = {"cifar": CIFAR, "imagenet": IMAGENET, "early stride": EARLY}


def random_params(config, seed=0):
    """Every part matters: no norm is 1, no bias or mean 0."""
    rng = np.random.default_rng(seed)
    flat = tree.flatten(base.abstract(config.build)[1])

    def draw(path, shape):
        if path.endswith(("scale", "variance")):
            return rng.uniform(0.5, 1.5, shape)
        return rng.normal(0, np.prod(shape[:-1]) ** -0.5 if len(shape) > 1 else 0.4, shape)

    drawn = {path: draw(path, leaf.shape).astype(np.float32) for path, leaf in flat.items()}
    return jax.tree.map(jnp.asarray, tree.unflatten(drawn))


def random_images(config, batch=3, seed=0, size=(13, 18)):
    shape = (batch, *size, config.channels)
    return np.random.default_rng(seed).normal(0.3, 1.2, shape).astype(np.float32)


@functools.partial(jax.jit, static_argnums=0)
def infer(config, params, images):
    """(hidden states after the stem and every block, logits)."""
    model = base.merge(base.abstract(config.build)[0], params)
    hidden, context = model.stem({"images": images})
    states = [hidden]
    for i in range(config.depth):
        states.append(model.run_blocks(states[-1], i, i + 1, context))
    return states, model.readout(states[-1])


@functools.partial(jax.jit, static_argnums=0)
def train(config, params, images):
    """(hidden states, logits, moments), in two segments."""
    model = base.merge(base.abstract(config.build)[0], params)
    hidden, context, moments = model.stem_training({"images": images})
    states = [hidden]
    for start, stop in ((0, 1), (1, config.depth)):
        hidden, more = model.run_blocks_training(hidden, start, stop, context)
        moments |= more
        states.append(hidden)
    return states, model.readout(hidden), moments


class Reference:
    """The network in numpy and float64, written from the papers."""

    def __init__(self, config, params, training):
        self.config, self.training, self.moments = config, training, {}
        flat = tree.flatten(params)
        self.params = {path: np.asarray(leaf, np.float64) for path, leaf in flat.items()}

    def unit(self, x, path, stride):
        kernel = self.params[f"{path}/conv/kernel"]
        size = len(kernel)
        pad = size // 2
        padded = np.pad(x, ((0, 0), (pad, pad), (pad, pad), (0, 0)))
        rows, columns = ((n + 2 * pad - size) // stride + 1 for n in x.shape[1:3])
        x = sum(
            padded[:, i : i + rows * stride : stride, j : j + columns * stride : stride]
            @ kernel[i, j]
            for i in range(size)
            for j in range(size)
        )
        norm = {k: self.params[f"{path}/norm/{k}"] for k in ("scale", "bias", "mean", "variance")}
        if self.training:
            pixels = x.reshape(-1, x.shape[-1])
            norm |= {"mean": pixels.mean(0), "variance": pixels.var(0)}
            self.moments[f"{path}/norm/mean"] = norm["mean"]
            self.moments[f"{path}/norm/variance"] = pixels.var(0, ddof=1)
        normal = (x - norm["mean"]) / np.sqrt(norm["variance"] + 1e-5)
        return normal * norm["scale"] + norm["bias"]

    def stem(self, images):
        if self.config.stem == "cifar":
            return np.maximum(self.unit(images, "entry", 1), 0)
        x = np.maximum(self.unit(images, "entry", 2), 0)
        x = np.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)), constant_values=-np.inf)
        rows, columns = ((n - 3) // 2 + 1 for n in x.shape[1:3])
        windows = [
            x[:, i : i + 2 * rows : 2, j : j + 2 * columns : 2] for i in range(3) for j in range(3)
        ]
        return np.max(windows, axis=0)

    def block(self, x, i):
        stage, within = [(s, k) for s, n in enumerate(self.config.depths) for k in range(n)][i]
        stride = 1 if within else 2 if stage else self.config.first_stride
        path = f"blocks/{i}"
        if self.config.block == "basic":
            strides = (stride, 1)
        else:
            strides = (stride, 1, 1) if self.config.early_stride else (1, stride, 1)
        out = x
        for k, unit_stride in enumerate(strides):
            out = self.unit(out, f"{path}/units/{k}", unit_stride)
            out = out if k == len(strides) - 1 else np.maximum(out, 0)
        if f"{path}/shortcut/conv/kernel" in self.params:
            x = self.unit(x, f"{path}/shortcut", stride)
        return np.maximum(out + x, 0)

    def __call__(self, images):
        states = [self.stem(images.astype(np.float64))]
        for i in range(self.config.depth):
            states.append(self.block(states[-1], i))
        features = states[-1].mean((1, 2))
        return states, features @ self.params["output/embedding"].T + self.params["output/bias"]


@pytest.fixture(scope="module", params=CONFIGS)
def config(request):
    return CONFIGS[request.param]


def test_inference_is_the_reference(config):
    params, images = random_params(config), random_images(config)
    states, logits = infer(config, params, images)
    want_states, want_logits = Reference(config, params, training=False)(images)
    for found, want in zip(states, want_states, strict=True):
        np.testing.assert_allclose(found, want, atol=1e-4)
    np.testing.assert_allclose(logits, want_logits, atol=1e-4)


def test_training_normalises_by_the_batch_and_returns_its_moments(config):
    params, images = random_params(config), random_images(config)
    states, logits, moments = train(config, params, images)
    reference = Reference(config, params, training=True)
    want_states, want_logits = reference(images)
    for found, i in zip(states, (0, 1, config.depth), strict=True):
        np.testing.assert_allclose(found, want_states[i], atol=1e-4)
    np.testing.assert_allclose(logits, want_logits, atol=1e-4)
    assert moments.keys() == reference.moments.keys()
    for path, want in reference.moments.items():
        np.testing.assert_allclose(moments[path], want, atol=1e-4, rtol=1e-4, err_msg=path)


def test_statistics_after_three_batches(config):
    params = first = random_params(config)
    want = {k: v for k, v in tree.flatten(first).items() if k.endswith(("/mean", "/variance"))}
    for seed in range(3):
        images = random_images(config, seed=seed)
        params = update_statistics(params, train(config, params, images)[2], momentum=0.25)
        reference = Reference(config, first, training=True)
        reference(images)
        want = {k: 0.75 * v + 0.25 * reference.moments[k] for k, v in want.items()}
    before, after = tree.flatten(first), tree.flatten(params)
    assert before.keys() == after.keys()
    for path, value in after.items():
        if path in want:
            np.testing.assert_allclose(value, want[path], atol=1e-4, rtol=1e-4, err_msg=path)
        else:
            assert value is before[path]
    # Inference goes by what was stored.
    np.testing.assert_allclose(
        infer(config, params, images)[1],
        Reference(config, params, training=False)(images)[1],
        atol=1e-4,
    )


def test_only_training_mixes_images():
    params, images = random_params(CIFAR), random_images(CIFAR)
    alone = [infer(CIFAR, params, image[None])[1][0] for image in images]
    np.testing.assert_allclose(infer(CIFAR, params, images)[1], np.stack(alone), atol=1e-5)
    trained_alone = [train(CIFAR, params, image[None])[1][0] for image in images]
    assert np.abs(train(CIFAR, params, images)[1] - np.stack(trained_alone)).max() > 1e-2


def test_an_optimizer_can_leave_the_statistics_alone():
    """No gradient reaches them, in training or inference; the rule takes them out of its state."""
    params, images = random_params(CIFAR), random_images(CIFAR)
    for run in (infer, train):
        slope = jax.jit(
            jax.grad(lambda params, run=run: (run(CIFAR, params, images)[1] ** 2).sum())
        )
        gradients = tree.flatten(slope(params))
        still = {path for path, gradient in gradients.items() if not np.asarray(gradient).any()}
        assert still == {path for path in gradients if path.endswith(("/mean", "/variance"))}

    rules = ((STATISTICS, "freeze"), ("", "train"))
    labels = tree.unflatten({path: tree.match(rules, path) for path in tree.flatten(params)})
    optimizer = optax.multi_transform(
        {"train": optax.adamw(0.1, weight_decay=0.1), "freeze": optax.set_to_zero()}, labels
    )
    state = optimizer.init(params)
    updates, state = optimizer.update(tree.unflatten(gradients), state, params)
    moved = {path for path, update in tree.flatten(updates).items() if np.asarray(update).any()}
    assert moved == gradients.keys() - still
    first_moments = jax.tree.leaves(state.inner_states["train"].inner_state[0].mu)
    assert len(first_moments) == len(moved)


def test_a_variance_needs_two_values():
    with pytest.raises(ValueError, match=r"\(1, 1, 1, 4\) has one value per channel"):
        BatchNorm(4)(jnp.ones((1, 1, 1, 4)), training=True)


def test_moments_of_no_parameter_are_refused():
    with pytest.raises(KeyError, match="blocks/7/norm/mean"):
        update_statistics(random_params(CIFAR), {"blocks/7/norm/mean": jnp.zeros(4)})


@pytest.mark.parametrize("config", [CIFAR, IMAGENET], ids=["cifar", "imagenet"])
def test_heads_after_a_block_have_its_width(config):
    """`at` is the network that ends there: same parameters, same hidden states, fitting parts."""
    params, images = random_params(config), random_images(config)
    states, _ = infer(config, params, images)
    assert config.at(config.depth) == config
    for point in range(1, config.depth):
        shorter = config.at(point)
        assert (shorter.depth, shorter.width) == (point, states[point].shape[-1])
        table = {"output/embedding": jnp.zeros((config.num_classes, shorter.width))}
        flat = tree.flatten(params) | table
        kept = tree.flatten(base.abstract(shorter.build)[1])
        kept = tree.unflatten({path: flat[path] for path in kept})
        np.testing.assert_allclose(infer(shorter, kept, images)[0][-1], states[point], atol=1e-6)

        def parts(hidden, shorter=shorter):
            pooled, rngs = hidden.mean((1, 2)), nnx.Rngs(0)
            return shorter.build_norm(rngs)(pooled), shorter.build_mlp(rngs)(pooled)

        norm, mlp = jax.eval_shape(parts, states[point])
        assert norm.shape == mlp.shape == (3, shorter.width)


def test_points_outside_the_network():
    for point in (0, 4):
        with pytest.raises(ValueError, match=f"point {point} lies outside 1…3"):
            CIFAR.at(point)


@pytest.mark.parametrize(
    ("config", "parameters"),
    [
        # torchvision's documentation, "num_params".
        (ResNetConfig.imagenet(18), 11_689_512),
        (ResNetConfig.imagenet(34), 21_797_672),
        (ResNetConfig.imagenet(50), 25_557_032),
        (ResNetConfig.imagenet(101), 44_549_160),
        (ResNetConfig.imagenet(152), 60_192_808),
        # He et al. (2016), table 6, in millions: 0.27, 0.46, 0.66, 0.85, 1.7; here exactly, with
        # 2,752 more for the two projections.
        (ResNetConfig.cifar(20), 269_722 + 2752),
        (ResNetConfig.cifar(32), 464_154 + 2752),
        (ResNetConfig.cifar(44), 658_586 + 2752),
        (ResNetConfig.cifar(56), 853_018 + 2752),
        (ResNetConfig.cifar(110), 1_727_962 + 2752),
    ],
    ids=lambda value: str(value) if isinstance(value, int) else "",
)
def test_named_networks_have_the_published_size(config, parameters):
    flat = tree.flatten(base.abstract(config.build)[1])
    trained = {path: leaf for path, leaf in flat.items() if "mean" not in path}
    trained = {path: leaf for path, leaf in trained.items() if "variance" not in path}
    assert tree.count(trained) == parameters


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: ResNetConfig.cifar(21), r"6·n \+ 2 layers \(20, 32, 44, …\), not 21"),
        (lambda: ResNetConfig.imagenet(20), "no ResNet-20; choose one of 18, 34"),
        (lambda: ResNetConfig((1,), (4, 8), 2), r"depths=\(1,\) and widths=\(4, 8\) must name"),
        (lambda: ResNetConfig((), (), 2), "must name the same stages, at least one"),
        (lambda: ResNetConfig((1, 0), (4, 8), 2), r"needs a block, not depths=\(1, 0\)"),
        (lambda: ResNetConfig((1,), (4,), 2, block="wide"), "unknown block 'wide'; choose one of"),
        (lambda: ResNetConfig((1,), (4,), 2, stem="vit"), "unknown stem 'vit'; choose one of"),
        (lambda: ResNetConfig((1,), (6,), 2, block="bottleneck"), r"multiples of 4, not \(6,\)"),
    ],
)
def test_configs_that_make_no_network(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_images_must_have_their_channels_last():
    images = np.zeros((2, 3, 16, 16), np.float32)
    with pytest.raises(ValueError, match=r"are \[B, H, W, 3\], channels last; .*\[2, 3, 16, 16\]"):
        infer(CIFAR, random_params(CIFAR), images)


def test_a_network_without_classes_ends_in_its_features():
    bare = ResNetConfig(CIFAR.depths, CIFAR.widths, num_classes=0, stem="cifar", stem_width=4)
    params = random_params(CIFAR)
    with_classes = params.pop("output")
    assert with_classes["embedding"].shape == (5, 6)
    with pytest.raises(ValueError, match="no classifier .*; use its features"):
        infer(bare, params, random_images(bare))


def test_half_precision_weights_give_float32_logits():
    params = random_params(CIFAR)
    half = jax.tree.map(lambda x: x.astype(jnp.bfloat16), params)
    states, logits = infer(CIFAR, half, random_images(CIFAR))
    assert states[-1].dtype == jnp.bfloat16 and logits.dtype == jnp.float32
    np.testing.assert_allclose(logits, infer(CIFAR, params, random_images(CIFAR))[1], atol=0.1)


def test_parameters_are_all_there_is():
    """Statistics among them; no mutable state."""
    model = nnx.eval_shape(lambda: CIFAR.build(nnx.Rngs(0)))
    assert {type(v) for _, v in nnx.to_flat_state(nnx.state(model))} == {nnx.Param}


SHARDED = """
import sys
import jax, numpy as np
from early_exit import sharding, tree
from early_exit.settings.sections import MeshSettings
from early_exit.backbones.base import update_statistics
from backbones.test_resnet import CIFAR, random_images, random_params, train

assert jax.device_count() == 8

def step(params, images):
    def loss(params):
        _, logits, moments = train(CIFAR, params, images)
        return (logits ** 2).mean(), moments
    gradients, moments = jax.grad(loss, has_aux=True)(params)
    return {"gradients": gradients, "updated": update_statistics(params, moments)}

params, images = random_params(CIFAR), random_images(CIFAR, batch=16)
one = jax.jit(step)(params, images)
mesh = sharding.make_mesh(MeshSettings(data=2, fsdp=4))
params = jax.device_put(params, sharding.shardings(params, mesh))
images = jax.device_put(images, sharding.batch_sharding(mesh))
many = jax.jit(step).lower(params, images).compile()
assert "all-reduce" in many.as_text() and len(images.addressable_shards) == 8
np.savez(sys.argv[1], **tree.flatten(one))
np.savez(sys.argv[2], **tree.flatten(many(params, images)))
"""


def test_moments_on_eight_devices_are_those_on_one(tmp_path):
    """Each device has two of sixteen images; the statistics are of all sixteen."""
    paths = [tmp_path / "one.npz", tmp_path / "many.npz"]
    fake_devices.python("-c", SHARDED, *paths)
    one, many = (dict(np.load(path)) for path in paths)
    assert one.keys() == many.keys() and len(one) > 50
    for name, value in one.items():
        np.testing.assert_allclose(many[name], value, rtol=1e-5, atol=1e-5, err_msg=name)
