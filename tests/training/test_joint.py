"""Training a backbone together with its exits, running statistics included."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from conftest import build
from early_exit import tree
from early_exit.backbones import base
from early_exit.backbones.encoder import EncoderConfig
from early_exit.backbones.image_parts import STATISTICS
from early_exit.backbones.resnet import ResNetConfig
from early_exit.exits.heads import ExitConfig
from early_exit.exits.multi_exit import MultiExit
from early_exit.settings.sections import TuneSettings
from early_exit.training import step as steps
from early_exit.training.observe import observe
from early_exit.training.optimizer import make_optimizer
from early_exit.training.recipe import TRAINED, Recipe
from early_exit.training.schedule import ExitWeights

C = 4
RESNET = ResNetConfig((1, 1), (4, 8), C, stem="cifar", stem_width=4, channels=1)
ENCODER = EncoderConfig(
    vocab_size=30, width=8, depth=3, heads=2, mlp_width=12, context_length=8, num_classes=C
)
PLAIN = optax.sgd(1.0)  # the parameters after a step are those before it less the gradient
step = jax.jit(steps.tune_step, static_argnames=("model", "recipe", "optimizer"))
KEYS = jax.random.split(jax.random.key(0), 4)
IMAGES = {
    "images": jax.random.normal(KEYS[0], (6, 8, 8, 1)),
    "labels": jax.random.randint(KEYS[1], (6,), 0, C),
    "valid": jnp.ones(6, bool),
}
TEXTS = {
    "tokens": jax.random.randint(KEYS[2], (6, 8), 0, 30),
    "mask": jnp.arange(8)[None] < jnp.array([[8], [5], [2], [8], [3], [6]]),
    "labels": jax.random.randint(KEYS[3], (6,), 0, C),
    "valid": jnp.ones(6, bool),
}
CASES = [(RESNET, IMAGES, (1,)), (ENCODER, TEXTS, (1, 2))]


def classifier(config, points, **exits):
    model = MultiExit(config, ExitConfig(points, **{"head": "mlp"} | exits))
    backbone = base.init(config, jax.random.key(1))
    # Matrices as they are drawn make logits that hardly differ.
    backbone = jax.tree.map(lambda x: x * 3 if x.ndim == 2 else x, backbone)
    heads = model.init_exits(jax.random.key(2), backbone, "random", None)
    return model, {"backbone": backbone, "exits": heads}


def after(model, params, batch, *, loss="cross_entropy", weights=None, train="all"):
    """(flat parameters after a step of plain gradient descent, metrics)."""
    weights = (1.0,) * len(model.exits.points) if weights is None else weights
    recipe = Recipe(loss, ExitWeights(weights), train)
    trained = {name: params[name] for name in TRAINED[train]}
    frozen = {name: x for name, x in params.items() if name not in trained}
    state = steps.init_state(trained, PLAIN)
    new, metrics = step(state, frozen, batch, model=model, recipe=recipe, optimizer=PLAIN)
    return tree.flatten(new["params"]), metrics


def moved(model, params, *args, **options):
    """Path → the gradient of a step, statistics left out; and the metrics."""
    new, metrics = after(model, params, *args, **options)
    old = tree.flatten(params)
    kept = (path for path in new if not re.search(STATISTICS, path))
    return {path: np.asarray(old[path] - new[path]) for path in kept}, metrics


@pytest.mark.parametrize(("config", "batch", "points"), CASES)
def test_the_sum_is_of_the_exits_losses_and_the_networks_own(config, batch, points):
    model, params = classifier(config, points)
    _, metrics = after(model, params, batch, weights=(0.3,) * len(points))
    alone = MultiExit(config, ExitConfig((), "linear"))
    _, own = after(alone, params | {"exits": {}}, batch)
    last = f"loss/exit_{config.depth}"
    np.testing.assert_allclose(metrics[last], own["loss"], rtol=1e-5)
    of_exits = [metrics[f"loss/exit_{point}"] for point in points]
    np.testing.assert_allclose(metrics["loss"], own["loss"] + 0.3 * sum(of_exits), rtol=1e-5)


@pytest.mark.parametrize(("config", "batch", "points"), CASES)
def test_exits_without_weight_change_nothing_for_the_network(config, batch, points):
    model, params = classifier(config, points)
    with_exits, _ = moved(model, params, batch, weights=(0.0,) * len(points))
    alone = MultiExit(config, ExitConfig((), "linear"))
    without, _ = moved(alone, params | {"exits": {}}, batch)
    for path, gradient in without.items():
        np.testing.assert_allclose(with_exits[path], gradient, atol=1e-6, err_msg=path)
    assert all((g == 0).all() for path, g in with_exits.items() if path.startswith("exits"))


@pytest.mark.parametrize(("config", "batch", "points"), CASES)
def test_exits_teach_the_blocks_before_them_and_no_other(config, batch, points):
    model, params = classifier(config, points[:1])
    little, _ = moved(model, params, batch, weights=(0.0,))
    much, _ = moved(model, params, batch, weights=(5.0,))
    blocks = [f"backbone/blocks/{i}/" for i in range(config.depth)]
    for i, block in enumerate(blocks):
        changed = any((much[p] != little[p]).any() for p in much if p.startswith(block))
        assert changed == (i < points[0])


def test_a_teacher_does_not_learn_from_its_pupils():
    """Self-distillation leaves the readout, and all behind the last exit, to the labels."""
    model, params = classifier(ENCODER, (1,))
    plain, _ = moved(model, params, TEXTS, loss="kl", weights=(0.0,))
    taught, metrics = moved(model, params, TEXTS, loss="kl", weights=(5.0,))
    assert metrics["loss/exit_1"] > 1e-3
    for path, gradient in taught.items():
        behind = path.startswith(("backbone/blocks/1", "backbone/blocks/2", "backbone/output"))
        if behind or path.startswith("backbone/pooler"):
            np.testing.assert_allclose(gradient, plain[path], atol=1e-6, err_msg=path)
    assert any((taught[p] != plain[p]).any() for p in taught if p.startswith("backbone/blocks/0"))


def test_jointly_tuned_language_models_learn_next_tokens_at_every_exit():
    model, params = build(head="norm")
    rng = np.random.default_rng(0)
    batch = {
        "tokens": rng.integers(0, 61, (4, 12)).astype(np.int32),
        "documents": np.ones((4, 12), np.int32),
        "positions": np.tile(np.arange(12, dtype=np.int32), (4, 1)),
    }
    optimizer = optax.adam(3e-3)
    recipe = Recipe("cross_entropy", ExitWeights((0.5, 0.5)), "all")
    state, seen = steps.init_state(params, optimizer), []
    for _ in range(25):
        state, metrics = step(state, {}, batch, model=model, recipe=recipe, optimizer=optimizer)
        seen.append([float(metrics[f"loss/exit_{point}"]) for point in (2, 4, 6)])
    assert (np.array(seen[-1]) < 0.5 * np.array(seen[0])).all(), (seen[0], seen[-1])


def test_statistics_follow_the_batch_in_joint_tuning_and_stand_still_behind_frozen_exits():
    model, params = classifier(RESNET, (1,))
    old = tree.flatten(params)
    new, _ = after(model, params, IMAGES)
    backbone = model.bind(params).backbone
    hidden, context, moments = backbone.stem_training(IMAGES)
    _, more = backbone.run_blocks_training(hidden, 0, RESNET.depth, context)
    statistics = [path for path in old if re.search(STATISTICS, path)]
    assert len(statistics) == len(moments | more) > 4
    for name, moment in (moments | more).items():
        path = f"backbone/{name}"
        np.testing.assert_allclose(new[path], 0.9 * old[path] + 0.1 * moment, atol=1e-5)
    frozen = {"backbone": params["backbone"]}
    recipe = Recipe("cross_entropy", ExitWeights((1.0,)))
    state = steps.init_state({"exits": params["exits"]}, PLAIN)
    state, _ = step(state, frozen, IMAGES, model=model, recipe=recipe, optimizer=PLAIN)
    assert state["params"].keys() == {"exits"}
    # Behind `stop_gradient` a row is read as in use: alone as in a batch.
    one = {name: x[:1] for name, x in IMAGES.items()}
    seen = functools.partial(observe, model=model, recipe=recipe)
    whole, single = seen(params, IMAGES)["hidden"][0], seen(params, one)["hidden"][0]
    np.testing.assert_allclose(whole[:1], single, atol=1e-5)


def test_ensembles_learn_beside_the_heads():
    both = MultiExit(ENCODER, ExitConfig((1, 2), "linear", ensemble=True))
    _, params = classifier(ENCODER, (1, 2), head="linear", ensemble=True)
    bare = MultiExit(ENCODER, ExitConfig((1, 2), "linear"))
    first, second = params["exits"]["1"], dict(params["exits"]["2"])
    del second["ensemble"]
    without = {"1": first, "2": second}
    got, _ = moved(both, params, TEXTS)
    want, _ = moved(bare, params | {"exits": without}, TEXTS)
    for path, gradient in want.items():
        np.testing.assert_allclose(got[path], gradient, atol=1e-6, err_msg=path)
    assert {path for path in got if path not in want} == {
        "exits/2/ensemble/weights",
        "exits/2/ensemble/bias",
    }
    assert all(got[path].any() for path in got if path not in want)


def test_the_backbone_learns_at_a_rate_of_its_own():
    params = {"backbone": {"w": jnp.ones((3, 3))}, "exits": {"2": {"w": jnp.ones((3, 3))}}}
    gradients = jax.tree.map(lambda x: 0.1 * x, params)
    for name in ("adamw", "sgd"):
        optimizer = make_optimizer(TuneSettings(optimizer=name, backbone_rate=0.25))
        updates, _ = optimizer.update(gradients, optimizer.init(params), params)
        np.testing.assert_allclose(
            updates["backbone"]["w"], 0.25 * updates["exits"]["2"]["w"], rtol=1e-6
        )
        assert (updates["exits"]["2"]["w"] < 0).all()
