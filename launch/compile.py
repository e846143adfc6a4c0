"""Compiles a config's programs for chips that need not be here, and says what they would cost.

    python -m launch.compile --config=configs/llama2_70b.py --topology=v5p:4x4x8
    python -m launch.compile --config=configs/llama2_7b.py --topology=v5e:2x4 --what=decode
    XLA_FLAGS=--xla_force_host_platform_device_count=8 python -m launch.compile --config=…

Nothing is loaded and nothing runs: the tuning step, calibration's pass over a batch, or the
decoding loop is lowered from shapes and compiled by the TPU's own compiler (`pip install
'early_exit[tpu-compile]'`), which works on any host: Llama-2 70B takes one to two minutes. Without
--topology it is compiled for the devices that are here. Exits with status 1 if it does not fit,
saying by how much and what to change.

With mesh.slices, there are so many slices like the one named. Times are estimates by the compiler,
which has never seen the chip wait; what goes between slices is timed as if it stayed inside one.
They serve to compare.
"""

import sys

from absl import flags

from early_exit import sharding
from early_exit.cost import chips
from early_exit.runs.metrics import table
from early_exit.training import ahead
from launch import common, decoding_flags

TOPOLOGY = flags.DEFINE_string("topology", None, "Kind and shape of a TPU slice, as v5p:4x4x8.")
WHAT = flags.DEFINE_enum("what", "tune", ("tune", "calibrate", "decode"), "The program to compile.")
ROWS = flags.DEFINE_integer(
    "rows", 1, "Rows decoded together, on all chips (`--batch` of launch.generate).", lower_bound=1
)
POSITIONS = flags.DEFINE_integer(
    "positions", 2048, "Positions of each row that is decoded.", lower_bound=1
)
BLOCKS = flags.DEFINE_integer(
    "blocks", None, "Compile a model of so many blocks, exits scaled.", lower_bound=2
)

flags.adopt_module_key_flags(decoding_flags)  # what --help lists

SECONDS_PER_DAY = 86_400


def main(argv):
    common.no_arguments(argv)
    config = common.settings()
    devices, chip = ahead.topology(TOPOLOGY.value, config.mesh.slices)
    mesh = sharding.make_mesh(config.mesh, devices)
    model = ahead.model_of(config, BLOCKS.value)
    if WHAT.value == "tune":
        estimate = ahead.tuning(config, model, mesh, chip)
        tokens, unit = config.data.batch_size * config.data.sequence_length, "step"
    elif WHAT.value == "calibrate":
        estimate = ahead.calibrating(config, model, mesh, chip)
        tokens, unit = config.data.batch_size * config.data.sequence_length, "batch"
    else:
        mode = decoding_flags.mode()
        estimate = ahead.decoding(config, model, mesh, chip, ROWS.value, POSITIONS.value, mode)
        tokens, unit = ROWS.value, "step at full depth"
    axes = ", ".join(f"{axis} {size}" for axis, size in mesh.shape.items())
    where = TOPOLOGY.value or "this host"
    print(f"{WHAT.value} on {where}: {mesh.size} chips ({axes}), {model.config.depth} blocks\n")
    print(table(memory_rows(estimate), header=("memory of a chip", "GiB")))
    if estimate.program is None or estimate.spare < 0:
        chips_memory = estimate.chip.memory / chips.GIB
        sys.exit(
            f"\ndoes not fit: {estimate.needed / chips.GIB:,.1f} GiB are needed and "
            f"{chips_memory:,.1f} there, {-estimate.spare / chips.GIB:,.1f} too few; "
            f"{estimate.advice()}"
        )
    print()
    print(table(work_rows(estimate, WHAT.value), header=(f"work of a {unit}", "")))
    header = ("between chips", "along", "times", "GiB on each", "GiB sent by each")
    exchanged = [
        (kind, axes, times, size / chips.GIB, sent / chips.GIB)
        for kind, axes, times, size, sent in estimate.exchanged()
    ]
    if exchanged:
        print(f"\n{table(exchanged, header=header)}")
    if chip is not None:
        steps = config.tune.steps if WHAT.value == "tune" else None
        print(f"\n{table(time_rows(estimate, tokens, steps), header=(f'time of a {unit}', ''))}")


def memory_rows(estimate: chips.Estimate) -> list[tuple[str, float]]:
    rows = [("parameters, state, input", estimate.arguments)]
    if estimate.temporaries is not None:
        rest = estimate.needed - estimate.arguments - estimate.temporaries
        rows += [("made on the way", estimate.temporaries), ("output, program", rest)]
    rows.append(("needed", estimate.needed))
    if estimate.chip is not None:
        rows += [("there", estimate.chip.memory), ("left", estimate.spare)]
    return [(name, size / chips.GIB) for name, size in rows]


def work_rows(estimate: chips.Estimate, what: str) -> list[tuple[str, float | None]]:
    compiled = estimate.program
    traced = estimate.traced_flops / estimate.chips
    rows = [("TFLOP in matrix products, traced, a chip", traced / 1e12)]
    if what != "decode":  # one row times a matrix is no matrix product to the compiler
        rows.append(("the same, compiled", compiled.flops / 1e12))
    if what == "tune":
        rows.append(("compiled ÷ traced", estimate.flops_ratio))
    return [*rows, ("loops of unknown length, counted once", compiled.open_loops)]


def time_rows(estimate: chips.Estimate, tokens: int, steps: int | None) -> list[tuple]:
    """What a call takes; `tokens` are those of one, `steps` how many calls a run is."""
    seconds, chip, parts = estimate.seconds, estimate.chip, estimate.parts
    at_peak = estimate.traced_flops / estimate.chips / chip.flops
    rows = [
        ("ms in matrix products, XLA's estimate", 1e3 * parts["products"]),
        ("the same at the chip's peak", 1e3 * at_peak),
        ("ms in all else on a chip (memory), XLA's", 1e3 * parts["memory"]),
        ("ms between chips (network), none of it hidden", 1e3 * parts["network"]),
        ("ms in all", 1e3 * seconds),
        ("ms to read what it is given, once", 1e3 * estimate.arguments / chip.bandwidth),
        ("bounded by", estimate.bound),
        ("of the chips' peak, %", 100 * at_peak / seconds),
        ("tokens a second", tokens / seconds),
        ("million tokens a day", tokens * SECONDS_PER_DAY / seconds / 1e6),
    ]
    if steps is not None:
        rows.append((f"days for {steps:,} steps", steps * seconds / SECONDS_PER_DAY))
    return rows


if __name__ == "__main__":
    flags.mark_flag_as_required("config")
    common.run(main, on_run=False, configured=True)
