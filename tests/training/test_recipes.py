"""What the recipes change in a step: parts of batches, exits in turn, dropped blocks, weights."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from configs import smollm2_layerskip, tiny
from conftest import TINY, build
from early_exit import sharding, tree
from early_exit.backbones import base
from early_exit.settings.overrides import override
from early_exit.settings.read import read
from early_exit.training import loop, plan
from early_exit.training import step as steps
from early_exit.training.observe import observe
from early_exit.training.recipe import Recipe
from early_exit.training.schedule import ExitWeights

PLAIN = optax.sgd(1.0)  # the parameters after a step are those before it less the gradient
step = jax.jit(steps.tune_step, static_argnames=("model", "recipe", "optimizer"))
EVEN = Recipe("cross_entropy", ExitWeights((1.0, 0.5)), "all")


def batch(rows=4, length=8):
    """Rows of which each has more padding than the one before."""
    rng = np.random.default_rng(0)
    filled = np.arange(length)[None] < length - 2 * np.arange(rows)[:, None] // 2
    return {
        "tokens": rng.integers(0, 61, (rows, length)).astype(np.int32),
        "documents": filled.astype(np.int32),
        "positions": np.tile(np.arange(length, dtype=np.int32), (rows, 1)),
    }


def after(recipe, *, number=0, data=None, **exits):
    """(flat gradient of one step with that number, metrics)."""
    model, params = build(**{"head": "norm"} | exits)
    state = steps.init_state(params, PLAIN) | {"step": jnp.int32(number)}
    data = batch() if data is None else data
    new, metrics = step(state, {}, data, model=model, recipe=recipe, optimizer=PLAIN)
    old, new = tree.flatten(params), tree.flatten(new["params"])
    return {path: np.asarray(old[path] - new[path]) for path in old}, metrics


@pytest.mark.long
@pytest.mark.parametrize("loss", ["cross_entropy", "both"])
def test_parts_of_a_batch_give_the_whole_batchs_gradient(loss):
    whole = dataclasses.replace(EVEN, loss=loss)
    expected, metrics = after(whole)
    found, parts_metrics = after(dataclasses.replace(whole, accumulate=2))
    for path in expected:
        np.testing.assert_allclose(found[path], expected[path], rtol=1e-4, atol=2e-5)
    for name in metrics:
        np.testing.assert_allclose(parts_metrics[name], metrics[name], rtol=1e-5)


@pytest.mark.production
def test_parts_take_less_memory():
    config = dataclasses.replace(TINY, width=128, heads=4, kv_heads=4, head_dim=32, mlp_width=512)
    model, _ = build(config, head="norm")

    def temporary(parts):
        recipe = dataclasses.replace(EVEN, accumulate=parts)
        params = jax.eval_shape(lambda: build(config, head="norm")[1])
        state = jax.eval_shape(lambda p: steps.init_state(p, PLAIN), params)
        lowered = step.lower(state, {}, batch(8, 128), model=model, recipe=recipe, optimizer=PLAIN)
        return lowered.compile().memory_analysis().temp_size_in_bytes

    assert temporary(8) < 0.4 * temporary(1)


def test_an_exit_out_of_turn_is_not_computed():
    """Its loss is unknown, and the step is the one that it has no part in."""
    turns = ExitWeights((1.0, 0.5), curriculum="rotational", period=2)
    found, metrics = after(dataclasses.replace(EVEN, weights=turns), number=1)
    expected, _ = after(dataclasses.replace(EVEN, weights=ExitWeights((0.0, 0.5))))
    assert np.isnan(metrics["loss/exit_2"]) and np.isfinite(metrics["loss/exit_4"])
    assert np.isfinite(metrics["loss"])
    for path in expected:
        np.testing.assert_allclose(found[path], expected[path], rtol=1e-5, atol=1e-6)
    assert not any(found[path].any() for path in found if path.startswith("exits/2/"))


def test_confidence_weighs_positions_and_learns_nothing_from_it():
    """The gradient is that of weights fixed beforehand: confidences of the heads as they are."""
    recipe = Recipe("cross_entropy", ExitWeights((1.0, 1.0)))
    model, params = build(head="norm")
    exits = params.pop("exits")
    data = batch()
    seen = observe(params, data, model=model, recipe=recipe)
    mask = seen["mask"] > 0

    def weighed(exits, confidences):
        bound = model.bind(params | {"exits": exits})
        total = 0.0
        for e, (head, hidden) in enumerate(zip(bound.heads, seen["hidden"], strict=True)):
            features, _ = head.features(hidden, seen["context"])
            log_probs = jax.nn.log_softmax(features @ bound.exit_tables()[e].T)
            own = -jnp.take_along_axis(log_probs, seen["labels"][..., None], -1)[..., 0]
            highest = jnp.exp(log_probs).max(-1) if confidences is None else confidences[e]
            total += (own * highest * mask).sum() / mask.sum()
        return total

    bound = model.bind(params | {"exits": exits})
    confidences = [
        jax.nn.softmax(head.features(hidden, seen["context"])[0] @ table.T).max(-1)
        for head, hidden, table in zip(
            bound.heads, seen["hidden"], bound.exit_tables(), strict=True
        )
    ]
    expected, gradient = jax.value_and_grad(weighed)(exits, confidences)
    state = steps.init_state({"exits": exits}, PLAIN)
    recipe = dataclasses.replace(recipe, by_confidence=True)
    new, metrics = step(state, params, data, model=model, recipe=recipe, optimizer=PLAIN)
    np.testing.assert_allclose(metrics["loss"], expected, rtol=1e-5)
    moved = jax.tree.map(lambda old, new: old - new, exits, new["params"]["exits"])
    jax.tree.map(
        lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-3, atol=1e-5), moved, gradient
    )


@pytest.mark.parametrize("scan", [False, True])
def test_rows_leave_blocks_out_as_if_they_were_not_there(scan):
    """Of two rows, each as a network without its dropped blocks has it."""
    model, params = build(dataclasses.replace(TINY, depth=6))
    bound = model.bind(params)
    data = {"tokens": batch()["tokens"][:2]}
    hidden, context = bound.backbone.stem(data)
    kept = jnp.array([[1, 1], [0, 1], [1, 0], [1, 1], [0, 0], [1, 1]], bool)
    runner = bound.backbone
    if scan:
        looped = dataclasses.replace(model.config, scan=True)
        stacked = base.stack_blocks(params["backbone"])
        definition, _ = base.abstract(looped.build)
        runner = base.merge(definition, stacked)
    found, _ = runner.run_blocks_training(hidden, 1, 6, context, kept)
    for row in range(2):
        expected = hidden
        for block in range(1, 6):
            if kept[block, row]:
                expected = bound.backbone.run_blocks(expected, block, block + 1, context)
        np.testing.assert_allclose(found[row], expected[row], rtol=2e-4, atol=2e-4)


def test_other_blocks_are_left_out_at_every_step_and_the_same_after_a_restart():
    dropping = dataclasses.replace(EVEN, layer_dropout=0.5)
    whole, first = after(EVEN), after(dropping, number=3)
    second, again = after(dropping, number=4), after(dropping, number=3)
    losses = [float(metrics["loss"]) for _, metrics in (whole, first, second, again)]
    assert len({*losses}) == 3 and losses[1] == losses[3]


def test_layerskips_recipe_trains_and_resumes(tmp_path):
    """Its settings on a small model: every exit learns, and exits out of turn are not reported."""
    recipe = smollm2_layerskip.get_config("points=1:2:3:4:5")
    names = ("weights", "curriculum", "layer_dropout", "train", "loss")
    changes = {f"tune.{name}": recipe.tune[name] for name in names}
    config = read(
        override(
            tiny.get_config(),
            changes
            | {
                "exits.points": (1, 2, 3, 4, 5),
                "exits.head": "norm",
                "exits.output": "shared",
                "exits.classes": 0,
                "tune.curriculum_period": 2,
                "tune.accumulate": 2,
                "tune.steps": 4,
                "tune.warmup_steps": 1,
                "tune.validation_batches": 1,
            },
        )
    )
    rows = loop.tune(config, tmp_path)
    assert [row["exit"] for row in rows] == [1, 2, 3, 4, 5, 6]
    lines = (tmp_path / "metrics.jsonl").read_text()
    assert "NaN" not in lines
    first = next(line for line in lines.splitlines() if '"loss/exit_1"' in line)
    assert "loss/exit_2" not in first and "loss/exit_6" in first


def test_dropped_blocks_are_for_decoders():
    config = read(override(tiny.get_config(), {"tune.layer_dropout": 0.1, "tune.train": "all"}))
    network = dataclasses.make_dataclass("Other", [], namespace={"drops_blocks": False})()
    with pytest.raises(ValueError, match="tune.layer_dropout is for decoders"):
        plan.recipe(config, sharding.make_mesh(config.mesh), network)
