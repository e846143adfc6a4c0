"""Runs with blocks in a loop and in bfloat16, and where a run's arrays lie before it starts."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs import digits_resnet, tiny
from early_exit import sharding, tree
from early_exit.runs import assemble, checkpoint, layout
from early_exit.settings.overrides import override
from early_exit.settings.read import changed, read
from early_exit.training import loop, plan

SETTINGS = {
    "exits.head": "norm",
    "exits.points": (3,),
    "exits.classes": 0,
    "data.sequence_length": 32,
    "data.batch_size": 2,
    "tune.train": "all",
    "tune.loss": "cross_entropy",
    "tune.steps": 2,
    "tune.warmup_steps": 1,
    "tune.validation_batches": 1,
}


def test_a_run_with_blocks_in_a_loop_leaves_what_any_run_leaves(tmp_path):
    """Joint and in bfloat16: float32, stacked parameters are kept, and loaded like others."""
    changes = {"model.scan": True, "model.remat": "block", "model.dtype": "bfloat16"}
    config = read(override(tiny.get_config(), SETTINGS | changes))
    rows = loop.tune(config, tmp_path)
    assert all(np.isfinite(row["loss"]) for row in rows)
    pretrained, plain = assemble.load_backbone(config)
    found = assemble.load_tuned(tmp_path)
    assert found.model == plain
    assert tree.shapes(found.params["backbone"]) == tree.shapes(pretrained.params)
    assert {leaf.dtype for leaf in jax.tree.leaves(found.params)} == {jnp.dtype("bfloat16")}

    like = {"params": assemble.abstract_trained(config, plain)}
    kept = checkpoint.restore(tmp_path / layout.CHECKPOINTS, like)[0]["params"]
    assert {leaf.dtype for leaf in jax.tree.leaves(kept)} == {jnp.dtype("float32")}
    up = kept["backbone"]["blocks"]["mlp"]["up"]["kernel"]
    for i in range(plain.config.depth):
        got = found.params["backbone"]["blocks"][str(i)]["mlp"]["up"]["kernel"]
        np.testing.assert_array_equal(got, up[i].astype(jnp.bfloat16))
        assert (got != pretrained.params["blocks"][str(i)]["mlp"]["up"]["kernel"]).any()
    # Steps of this size are less than bfloat16 tells apart at 1, and are not lost.
    scale = kept["backbone"]["final_norm"]["scale"]
    assert (scale != scale.astype(jnp.bfloat16)).any()


def test_loops_are_for_decoders():
    config = read(override(tiny.get_config(), {"model.scan": True}))
    resnet = assemble.abstract_model(read(digits_resnet.get_config()))
    with pytest.raises(ValueError, match="model.scan and model.remat are for decoders"):
        assemble.for_tuning(config, resnet)


def test_the_plan_of_a_run_is_what_it_has(tmp_path):
    config = read(override(tiny.get_config(), {"exits.head": "norm", "exits.points": (3,)}))
    run = loop.Run(config, tmp_path)
    planned = plan.state(config, run.model, run.mesh)
    state = run.state()
    assert jax.tree.structure(planned) == jax.tree.structure(state)
    for shape, leaf in zip(jax.tree.leaves(planned), jax.tree.leaves(state), strict=True):
        assert (shape.shape, shape.dtype, shape.sharding) == (leaf.shape, leaf.dtype, leaf.sharding)
    frozen = plan.frozen(config, run.model, run.mesh)
    assert tree.shapes(frozen) == tree.shapes(run.frozen)
    batch = run.place_batch(next(run.batches()))
    for name, shape in plan.token_batch(config, run.model, run.mesh).items():
        assert (shape.shape, shape.dtype) == (batch[name].shape, batch[name].dtype)
    with pytest.raises(ValueError, match="cannot be split over"):
        mesh = jax.sharding.AbstractMesh((2, 1, 1, 1), sharding.AXES)
        plan.token_batch(changed(config, {"data.batch_size": 3}), run.model, mesh)
