"""What a tuning step is, and where its arrays lie: known before any weight is read.

The one idea: a run on the devices that are here, and a program compiled for a pod that is not, are
the same jitted step with the same shardings; only the mesh differs.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh

from early_exit import sharding
from early_exit.backbones import base
from early_exit.data import feed
from early_exit.exits.multi_exit import MultiExit
from early_exit.runs import assemble
from early_exit.settings.sections import Settings
from early_exit.training import schedule
from early_exit.training import step as steps
from early_exit.training.optimizer import make_optimizer
from early_exit.training.recipe import Recipe


def recipe(config: Settings, mesh: Mesh, network: base.BackboneConfig) -> Recipe:
    """What the config asks for.

    Raises:
      ValueError: settings that do not fit the mesh or the network.
    """
    tune = config.tune
    if tune.accumulate > 1:
        sharding.row_rank(mesh, config.data.batch_size // tune.accumulate)
    if tune.layer_dropout and not network.drops_blocks:
        raise ValueError("tune.layer_dropout is for decoders; leave it at 0")
    feed.check_length(config.data, network)
    return Recipe(
        loss=tune.loss,
        weights=schedule.ExitWeights(
            tune.weights or (1.0,) * len(config.exits.points),
            start=tune.start_weights,
            steps=tune.weight_steps,
            path=tune.weight_path,
            curriculum=tune.curriculum,
            period=tune.curriculum_period,
        ),
        train=tune.train,
        dtype=config.model.dtype,
        table_parts=mesh.shape["tensor"],
        by_confidence=tune.by_confidence,
        layer_dropout=tune.layer_dropout,
        accumulate=tune.accumulate,
        seed=config.seed,
        draft_weights=tuple(
            tune.recurrent_decay**step
            for step in range(tune.recurrent_steps if config.exits.recurrent_taps else 0)
        ),
    )


def step(config: Settings, model: MultiExit, mesh: Mesh):
    """The jitted `tune_step`: (state, frozen, batch) → (state, metrics). Donates the state.

    Args:
      model: as it is tuned (`assemble.for_tuning`).
    """
    function = functools.partial(
        steps.tune_step,
        model=model,
        recipe=recipe(config, mesh, model.config),
        optimizer=make_optimizer(config.tune),
    )
    where = jax.tree.map(lambda x: x.sharding, state(config, model, mesh))
    return jax.jit(
        sharding.under(mesh, function),
        donate_argnums=0,
        out_shardings=(where, sharding.replicated(mesh)),
    )


def state(config: Settings, model: MultiExit, mesh: Mesh) -> steps.TuneState:
    """The run's state as shapes with shardings; the optimizer's lies where its parameters do."""
    params, optimizer = assemble.abstract_trained(config, model), make_optimizer(config.tune)
    shapes = jax.eval_shape(functools.partial(steps.init_state, optimizer=optimizer), params)
    where, everywhere = sharding.shardings(params, mesh), sharding.replicated(mesh)
    opt_state = optax.tree_map_params(
        optimizer,
        lambda _, spec: spec,
        shapes["opt_state"],
        where,
        transform_non_params=lambda _: everywhere,
    )
    return placed(shapes, {"params": where, "opt_state": opt_state, "step": everywhere})


def frozen(config: Settings, model: MultiExit, mesh: Mesh) -> base.Params:
    """The parameters that are not trained, as shapes with shardings."""
    params = {}
    if config.tune.train != "all":
        _, backbone = base.described(model.config)
        params["backbone"] = typed(backbone, config.model.dtype)
    if config.exits.classes:
        params["token_ids"] = jax.ShapeDtypeStruct((config.exits.classes,), jnp.int32)
    return placed(params, sharding.shardings(params, mesh))


def token_batch(config: Settings, model: MultiExit, mesh: Mesh) -> dict[str, jax.ShapeDtypeStruct]:
    """A language model's batch, as shapes with shardings.

    Raises:
      ValueError: its rows cannot be split over the mesh.
    """
    rows, length = config.data.batch_size, config.data.sequence_length
    sharding.row_rank(mesh, rows)
    where = sharding.batch_sharding(mesh)
    row = jax.ShapeDtypeStruct((rows, length), jnp.int32, sharding=where)
    batch = dict.fromkeys(("tokens", "documents", "positions"), row)
    if model.config.encodes_prompts:
        shape = rows, config.data.prompt_length or length
        for name, dtype in (("prompt", jnp.int32), ("prompt_real", jnp.bool_)):
            batch[name] = jax.ShapeDtypeStruct(shape, dtype, sharding=where)
    return batch


def typed(params: base.Params, dtype) -> base.Params:
    """Shapes of another type."""
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, dtype), params)


def placed(shapes: Any, where: Any) -> Any:
    """Shapes with the shardings of a tree like them."""
    return jax.tree.map(
        lambda x, place: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place), shapes, where
    )
