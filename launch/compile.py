"""Compiles a config's programs for chips that need not be here, and says what they would cost.

    python -m launch.compile --config=configs/llama2_70b.py --topology=v5p:4x4x8
    python -m launch.compile --config=configs/llama2_7b.py --topology=v5e:2x4 --what=decode
    XLA_FLAGS=--xla_force_host_platform_device_count=8 python -m launch.compile --config=…

Nothing is loaded and nothing runs: the tuning step, or the decoding loop, is lowered from shapes
and compiled by the TPU's own compiler (`pip install 'early_exit[tpu-compile]'`), which works on any
host: Llama-2 70B takes one to two minutes. Without --topology it is compiled for the devices that
are here. Exits with status 1 if it does not fit, saying by how much and what to change.

Times are estimates by the compiler, which has never seen the chip wait; they serve to compare.
"""

import dataclasses
import functools
import os
import sys

import jax
import jax.numpy as jnp
from absl import flags

from early_exit import assemble, sharding
from early_exit.backbones import base
from early_exit.config import ConfigDict
from early_exit.evaluation import pod
from early_exit.exits.multi_exit import MultiExit
from early_exit.inference import decode, mode
from early_exit.inference.state import initial_state
from early_exit.metrics import table
from early_exit.policy import ExitPolicy
from early_exit.training import plan
from launch import common

TOPOLOGY = flags.DEFINE_string("topology", None, "Kind and shape of a TPU slice, as v5p:4x4x8.")
WHAT = flags.DEFINE_enum("what", "tune", ("tune", "decode"), "The program to compile.")
MODE = flags.DEFINE_enum("mode", "lossy", tuple(mode.BY_NAME), "How to decode.")
ROWS = flags.DEFINE_integer("rows", 1, "Rows decoded on each share of the mesh's data × fsdp.")
POSITIONS = flags.DEFINE_integer("positions", 2048, "Positions of each row that is decoded.")
BLOCKS = flags.DEFINE_integer("blocks", None, "Compile a model of so many blocks, exits scaled.")

SECONDS_PER_DAY = 86_400


def main(argv):
    common.no_arguments(argv)
    config = common.CONFIG.value
    devices, chip = topology(TOPOLOGY.value)
    mesh = sharding.make_mesh(config.mesh, devices)
    model = model_of(config, BLOCKS.value)
    if WHAT.value == "tune":
        estimate = tuning(config, model, mesh, chip)
        tokens, unit = config.data.batch_size * config.data.sequence_length, "step"
    else:
        rows = ROWS.value * mesh.shape["data"] * mesh.shape["fsdp"]
        decoding_mode = mode.BY_NAME[MODE.value]
        estimate = decoding(config, model, mesh, chip, rows, POSITIONS.value, decoding_mode)
        tokens, unit = rows, "sweep at full depth"
    axes = ", ".join(f"{axis} {size}" for axis, size in mesh.shape.items())
    where = TOPOLOGY.value or "this host"
    print(f"{WHAT.value} on {where}: {mesh.size} chips ({axes}), {model.config.depth} blocks\n")
    print(table(memory_rows(estimate), header=("memory of a chip", "GiB")))
    if estimate.program is None or estimate.spare < 0:
        chips_memory = estimate.chip.memory / pod.GIB
        sys.exit(
            f"\ndoes not fit: {estimate.needed / pod.GIB:,.1f} GiB are needed and "
            f"{chips_memory:,.1f} there, {-estimate.spare / pod.GIB:,.1f} too few; "
            f"{estimate.advice()}"
        )
    print()
    print(table(work_rows(estimate, WHAT.value), header=(f"work of a {unit}", "")))
    header = ("between chips", "along", "times", "GiB on each", "GiB sent by each")
    exchanged = [
        (kind, axes, times, size / pod.GIB, sent / pod.GIB)
        for kind, axes, times, size, sent in estimate.exchanged()
    ]
    if exchanged:
        print(f"\n{table(exchanged, header=header)}")
    if chip is not None:
        steps = config.tune.steps if WHAT.value == "tune" else None
        print(f"\n{table(time_rows(estimate, tokens, steps), header=(f'time of a {unit}', ''))}")


def topology(name: str | None):
    """(devices, chip) of a TPU slice; of this host without a name.

    Raises:
      ValueError: no such chip or slice.
      RuntimeError: the TPU's compiler is not installed.
    """
    if name is None:
        return jax.devices(), None
    kind = name.partition(":")[0]
    if kind not in pod.CHIPS:
        raise ValueError(f"unknown chip in --topology={name}; known are {', '.join(pod.CHIPS)}")
    # There is no TPU here to use, to ask, or to keep other processes from.
    jax.config.update("jax_platforms", "cpu")
    os.environ |= {"TPU_SKIP_MDS_QUERY": "1", "ALLOW_MULTIPLE_LIBTPU_LOAD": "1"}
    from jax.experimental import topologies  # libtpu reads these variables when it is loaded

    try:
        found = topologies.get_topology_desc(platform="tpu", topology_name=name)
    except jax.errors.JaxRuntimeError as error:
        raise ValueError(f"--topology={name} is no slice of chips: {error}") from error
    except (ImportError, RuntimeError, NotImplementedError) as error:
        raise RuntimeError(
            f"the TPU's compiler is not here ({error}); pip install 'early_exit[tpu-compile]'"
        ) from error
    return found.devices, pod.CHIPS[kind]


def model_of(config: ConfigDict, blocks: int | None = None) -> MultiExit:
    """The config's model, from shapes alone; with `blocks`, a shorter one with exits to match."""
    model = assemble.abstract_model(config)
    if blocks is None:
        return model
    network, exits = dataclasses.replace(model.config, depth=blocks), model.exits
    scaled = [round(point * blocks / model.config.depth) for point in exits.points]
    points = tuple(sorted({min(max(point, 1), blocks - 1) for point in scaled}))
    return MultiExit(network, dataclasses.replace(exits, points=points))


def tuning(config: ConfigDict, model: MultiExit, mesh, chip: pod.Chip | None) -> pod.Estimate:
    """Of one step of a run (`training.plan`)."""
    config = config.copy_and_resolve_references()
    config.exits.points = model.exits.points
    model = assemble.for_tuning(config, model)
    parts = (plan.state, plan.frozen)
    args = (*(part(config, model, mesh) for part in parts), plan.token_batch(config, mesh))
    traced = plan.step(config, model, mesh).trace(*args)
    return pod.estimate(traced, args, mesh, chip)


def decoding(
    config: ConfigDict,
    model: MultiExit,
    mesh,
    chip: pod.Chip | None,
    rows: int,
    positions: int,
    how: mode.Mode,
) -> pod.Estimate:
    """Of one sweep of the decoding loop, in which every row goes through all blocks.

    Matrices are split as in tuning, rows over `data` and `fsdp`, the cache's heads over `tensor`.

    Args:
      rows: of all chips together.
      positions: of each row, prompt and answer together.
    """
    dtype = jnp.dtype(config.model.dtype)
    _, backbone = base.abstract(model.config.build)
    params = {
        "backbone": plan.typed(backbone, dtype),
        "exits": model.abstract_exits(dtype),
    }
    if config.exits.classes:
        params["token_ids"] = jax.ShapeDtypeStruct((config.exits.classes,), jnp.int32)
    params = plan.placed(params, sharding.shardings(params, mesh))
    start = functools.partial(
        initial_state, model, [[0]] * rows, positions - how.capacity, mode=how, dtype=dtype
    )
    state = jax.eval_shape(lambda: start(key=jax.random.key(0)))
    by_row = sharding.batch_sharding(mesh)
    heads = sharding.cache_sharding(mesh, model.config.kv_heads)
    where = jax.tree.map(lambda _: by_row, state)
    where = where.change(cache=jax.tree.map(lambda _: heads, state.cache))
    policy = ExitPolicy(
        jax.ShapeDtypeStruct((len(model.exits.points),), jnp.float32), config.calibrate.confidence
    )
    scalar = jax.ShapeDtypeStruct((), jnp.int32)
    stops = jax.ShapeDtypeStruct((1,), jnp.int32)
    args = (params, plan.placed(state, where), policy, stops, scalar, scalar)
    traced = decode.decode.trace(*args, model=model, mode=how)
    return pod.estimate(traced, args, mesh, chip)


def memory_rows(estimate: pod.Estimate) -> list[tuple[str, float]]:
    rows = [("parameters, state, input", estimate.arguments)]
    if estimate.temporaries is not None:
        rest = estimate.needed - estimate.arguments - estimate.temporaries
        rows += [("made on the way", estimate.temporaries), ("output, program", rest)]
    rows.append(("needed", estimate.needed))
    if estimate.chip is not None:
        rows += [("there", estimate.chip.memory), ("left", estimate.spare)]
    return [(name, size / pod.GIB) for name, size in rows]


def work_rows(estimate: pod.Estimate, what: str) -> list[tuple[str, float | None]]:
    compiled = estimate.program
    traced = ("TFLOP in matrix products, traced, a chip", estimate.traced_flops / estimate.chips)
    once = [
        ("XLA's own count, each loop's body once", estimate.xla_flops),
        ("read from its program, likewise", compiled.flops_once),
    ]
    if what == "decode":  # one row times a matrix is no matrix product to the compiler
        rows = [traced, once[0]]
    else:
        rows = [traced, ("the same, compiled", compiled.flops), *once]
    rows = [(name, _or_none(flops / 1e12)) for name, flops in rows]
    if what == "tune":
        rows.append(("compiled ÷ traced", estimate.flops_ratio))
    return [*rows, ("loops of unknown length, counted once", compiled.open_loops)]


def time_rows(estimate: pod.Estimate, tokens: int, steps: int | None) -> list[tuple]:
    """What a call takes; `tokens` are those of one, `steps` how many calls a run is."""
    seconds, chip = estimate.seconds, estimate.chip
    rows = [
        ("ms, XLA's estimate for one chip", 1e3 * estimate.compute_seconds),
        (
            "XLA's `optimal_seconds`, each loop's body once, ms",
            _or_none(1e3 * estimate.xla_seconds),
        ),
        ("ms between chips, none of it hidden", 1e3 * estimate.exchange_seconds),
        ("ms in all", 1e3 * seconds),
        ("ms to read what it is given, once", 1e3 * estimate.arguments / chip.bandwidth),
        (
            "of the chips' peak, %",
            100 * estimate.traced_flops / estimate.chips / chip.flops / seconds,
        ),
        ("million tokens a day", tokens * SECONDS_PER_DAY / seconds / 1e6),
    ]
    if steps is not None:
        rows.append((f"days for {steps:,} steps", steps * seconds / SECONDS_PER_DAY))
    return rows


def _or_none(figure: float) -> float | None:
    """XLA has no figure for some kinds of devices, and a negative one for others."""
    return figure if figure > 0 else None


if __name__ == "__main__":
    flags.mark_flag_as_required("config")
    common.run(main, on_run=False, configured=True)
