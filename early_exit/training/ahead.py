"""Programs compiled ahead, for chips that need not be here.

The one idea: lowered from shapes with shardings, the tuning step and the decoding loop are the very
ones that would run; the TPU's compiler, which works on any host, says what they cost.
"""

import dataclasses
import functools
import os

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from early_exit import sharding
from early_exit.backbones import base
from early_exit.cost import chips
from early_exit.decoding import decode, mode
from early_exit.decoding.costs import Costs
from early_exit.decoding.rules import Rules
from early_exit.decoding.state import initial_state, placed
from early_exit.evaluation import exits
from early_exit.exits.multi_exit import MultiExit
from early_exit.policy import ExitPolicy
from early_exit.runs import assemble
from early_exit.settings.read import changed
from early_exit.settings.sections import Settings
from early_exit.training import plan


def topology(name: str | None, slices: int = 1):
    """(devices, chip) of a TPU slice, or of several alike; of this host without a name.

    Raises:
      ValueError: no such chip or slice.
      RuntimeError: the TPU's compiler is not installed.
    """
    if name is None:
        return jax.devices(), None
    kind = name.partition(":")[0]
    if kind not in chips.CHIPS:
        raise ValueError(f"unknown chip in topology {name!r}; known are {', '.join(chips.CHIPS)}")
    # There is no TPU here to use, to ask, or to keep other processes from.
    jax.config.update("jax_platforms", "cpu")
    os.environ |= {"TPU_SKIP_MDS_QUERY": "1", "ALLOW_MULTIPLE_LIBTPU_LOAD": "1"}
    from jax.experimental import topologies  # libtpu reads these variables when it is loaded

    try:
        found = topologies.get_topology_desc(platform="tpu", topology_name=name, num_slices=slices)
    except jax.errors.JaxRuntimeError as error:
        raise ValueError(f"topology {name!r} is no slice of chips: {error}") from error
    except (ImportError, RuntimeError, NotImplementedError) as error:
        raise RuntimeError(
            f"the TPU's compiler is not here ({error}); pip install 'early_exit[tpu-compile]'"
        ) from error
    return found.devices, chips.CHIPS[kind]


def model_of(config: Settings, blocks: int | None = None) -> MultiExit:
    """The config's model, from shapes alone; with `blocks`, a shorter one with exits to match.

    Raises:
      ValueError: not a language model.
    """
    model = assemble.abstract_model(config)
    if model.config.classifies:
        raise ValueError("only language models are compiled ahead, and this is a classifier")
    if blocks is None:
        return model
    network, exits = dataclasses.replace(model.config, depth=blocks), model.exits
    scaled = [round(point * blocks / model.config.depth) for point in exits.points]
    points = tuple(sorted({min(max(point, 1), blocks - 1) for point in scaled}))
    return MultiExit(network, dataclasses.replace(exits, points=points))


def tuning(
    config: Settings, model: MultiExit, mesh: Mesh, chip: chips.Chip | None
) -> chips.Estimate:
    """Of one step of a run (`training.plan`)."""
    config = changed(config, {"exits.points": model.exits.points})
    model = assemble.for_tuning(config, model)
    parts = (plan.state, plan.frozen)
    args = (*(part(config, model, mesh) for part in parts), plan.token_batch(config, model, mesh))
    traced = plan.step(config, model, mesh).trace(*args)
    return chips.estimate(traced, args, mesh, chip)


def calibrating(
    config: Settings, model: MultiExit, mesh: Mesh, chip: chips.Chip | None
) -> chips.Estimate:
    """Of one batch of calibration's pass, in which every position is scored at every exit."""
    batch = plan.token_batch(config, model, mesh)
    args = _params(config, model, mesh), batch | {"groups": batch["documents"]}
    return chips.estimate(exits.score_batch.trace(*args, model=model), args, mesh, chip)


def _params(config: Settings, model: MultiExit, mesh: Mesh) -> base.Params:
    """All parameters, of the type that they are used in, as shapes with shardings."""
    dtype = jnp.dtype(config.model.dtype)
    _, backbone = base.described(model.config)
    params = {"backbone": plan.typed(backbone, dtype), "exits": model.abstract_exits(dtype)}
    if config.exits.classes:
        params["token_ids"] = jax.ShapeDtypeStruct((config.exits.classes,), jnp.int32)
    return plan.placed(params, sharding.shardings(params, mesh))


def decoding(
    config: Settings,
    model: MultiExit,
    mesh: Mesh,
    chip: chips.Chip | None,
    rows: int,
    positions: int,
    how: mode.Mode,
) -> chips.Estimate:
    """Of one step of the decoding loop, in which every row goes through all blocks.

    The state lies where decoding has it (`decoding.state.placed`).

    Args:
      rows: of all chips together.
      positions: of each row, prompt and answer together.
    """
    dtype, params = jnp.dtype(config.model.dtype), _params(config, model, mesh)
    start = functools.partial(
        initial_state, model, [[0]] * rows, positions - how.capacity, mode=how, dtype=dtype
    )
    state = jax.eval_shape(lambda: start(key=jax.random.key(0)))
    state = plan.placed(state, placed(state, mesh))
    policy = ExitPolicy(
        jax.ShapeDtypeStruct((len(model.exits.points),), jnp.float32), config.calibrate.confidence
    )
    scalar = jax.ShapeDtypeStruct((), jnp.int32)
    rules = jax.eval_shape(lambda: Rules.same(rows, stop_ids=[0]))
    rules = dataclasses.replace(rules, policy=policy)
    costs = jax.eval_shape(lambda: Costs.assumed(how, rows))
    args = (params, state, rules, costs, scalar, scalar)
    traced = decode.decode.trace(*args, model=model, mode=how)
    return chips.estimate(traced, args, mesh, chip)
