"""Would tuning eight exits of Llama-2 70B fit a pod, and what would it cost? Compiled, not run.

    pip install 'early_exit[tpu-compile]'
    python -m experiments.pod_plan.run            # about ten minutes on 2 cores
    python -m experiments.pod_plan.run --check    # exits 1 if a bar falls short

The tuning step on slices of 128 chips, and the decoding loop on 8, all at the full depth of 80
blocks; `--quick` compiles models of 16.
"""

import jax

from configs import llama2_70b
from early_exit import sharding, tree
from early_exit.cost import chips, multiply_adds
from early_exit.decoding import mode
from early_exit.exits.multi_exit import MultiExit
from early_exit.runs.metrics import table
from early_exit.settings.read import read
from early_exit.settings.sections import MeshSettings, Settings
from early_exit.training import ahead
from experiments import bars

# Rows over `data`, matrices over `tensor`: the frozen backbone is never gathered.
SLICES = {
    "v5p:4x4x8": {"data": 16, "tensor": 8},
    "v6e:8x16": {"data": 16, "tensor": 8},
}
DECODE_ON, DECODE_MESH, DECODE_ROWS = "v5p:2x2x2", {"tensor": 8}, (1, 16)
POSITIONS = 2048
BATCH_AXES = {"data", "fsdp"}


def main(argv):
    del argv
    config = read(llama2_70b.get_config())
    model = ahead.model_of(config, 16 if bars.QUICK.value else None)
    analytic = _analytic_flops(config, model)
    heads = tree.size_in_bytes(model.abstract_exits(config.model.dtype))
    rows, checks, figures = [], [], {}
    for name, axes in SLICES.items():
        estimate = _tuning(config, model, name, axes)
        row = _row(name, estimate, config, analytic)
        reduced = _reduced_over_rows(estimate)
        # A chip has a part of each matrix, and reduces that with the chips of other rows.
        expected = heads / axes["tensor"]
        rows.append(row)
        figures[name] = {"row": row, "exchanged": estimate.exchanged(), "reduced": reduced}
        checks += [
            bars.Bar(f"{name}: GiB left on a chip", estimate.spare / chips.GIB, 0, at_least=True),
            bars.Bar(
                f"{name}: |matrix products compiled ÷ analytic − 1|",
                abs(estimate.program.flops * estimate.chips / analytic - 1),
                0.05,
            ),
            bars.Bar(f"{name}: bytes reduced over rows ÷ heads'", reduced / expected, 1.05),
            bars.Bar(f"{name}: of them in loops over blocks", _in_block_loops(estimate), 0),
        ]
        header = (f"between chips of {name}", "along", "times", "GiB")
        print(table(_exchanged(estimate), header=header), end="\n\n")
    print(table(rows, header=HEADER))
    decoding = []
    for count in DECODE_ROWS:
        estimate = _decoding(config, model, count)
        name = f"{DECODE_ON}, {count} rows"
        left = estimate.spare / chips.GIB
        checks.append(bars.Bar(f"decoding on {name}: GiB left on a chip", left, 0, at_least=True))
        reading = 1e3 * estimate.arguments / estimate.chip.bandwidth
        figure = estimate.needed / chips.GIB, 1e3 * estimate.seconds, 1e3 * estimate.xla_seconds
        decoding.append((name, *figure, reading))
    print("\n" + table(decoding, header=DECODE_HEADER))
    bars.conclude(figures | {"decoding": decoding}, checks)


HEADER = (
    "tuning on",
    "GiB needed",
    "left",
    "TFLOP, analytic",
    "compiled",
    "ms, XLA",
    "ms between chips",
    "G tokens a day",
    "hours for the recipe",
)


DECODE_HEADER = (
    "decoding on",
    "GiB needed",
    "ms a step, XLA's cycles",
    "its `optimal_seconds`, ms",
    "to read weights and cache, ms",
)


def _tuning(config: Settings, model: MultiExit, name: str, axes: dict) -> chips.Estimate:
    devices, chip = ahead.topology(name)
    estimate = ahead.tuning(config, model, sharding.make_mesh(MeshSettings(**axes), devices), chip)
    if estimate.program is None:
        raise SystemExit(f"{name}: does not fit, {estimate.needed / chips.GIB:.1f} GiB are needed")
    return estimate


def _row(name: str, estimate: chips.Estimate, config: Settings, analytic: int) -> tuple:
    tokens = config.data.batch_size * config.data.sequence_length
    seconds = estimate.seconds
    return (
        name,
        estimate.needed / chips.GIB,
        estimate.spare / chips.GIB,
        analytic / estimate.chips / 1e12,
        estimate.program.flops / 1e12,
        1e3 * estimate.compute_seconds,
        1e3 * estimate.exchange_seconds,
        tokens * 86_400 / seconds / 1e9,
        config.tune.steps * seconds / 3600,
    )


def _exchanged(estimate: chips.Estimate) -> list[tuple]:
    rows = estimate.exchanged()
    return [(kind, axes, times, size / chips.GIB) for kind, axes, times, size, _ in rows]


def _analytic_flops(config: Settings, model: MultiExit) -> int:
    """Of the matrix products of a step, all chips together, from shapes.

    Blocks are run once. A head is run and differentiated, which takes twice as much again; its
    logits are computed once more for that.
    """
    length = config.data.sequence_length
    row = {"tokens": jax.ShapeDtypeStruct((1, length), "int32")}
    of = multiply_adds.backbone(model.config, inputs=row)
    total = of.before(model.exits.points[-1]).multiply_adds
    logits = length * model.config.width * model.config.vocab_size
    for point in model.exits.points:
        head = multiply_adds.head(model.config, model.exits, of, point, "float32")[0].multiply_adds
        total += 3 * (head - logits) + 4 * logits
    return 2 * config.data.batch_size * total


def _reductions(estimate: chips.Estimate) -> list:
    return [
        each
        for each in estimate.program.collectives
        if each.kind in ("all-reduce", "reduce-scatter") and BATCH_AXES & {*each.axes}
    ]


def _reduced_over_rows(estimate: chips.Estimate) -> int:
    """Bytes that chips with different rows add up: gradients, and some scalars."""
    return sum(each.bytes for each in _reductions(estimate))


def _in_block_loops(estimate: chips.Estimate) -> int:
    """How many of these stand in a loop of the forward pass, which is where the blocks are."""
    large = [each for each in _reductions(estimate) if each.shape.bytes > 2**20]
    return sum("while" in each.source and "transpose" not in each.source for each in large)


def _decoding(config: Settings, model: MultiExit, rows: int) -> chips.Estimate:
    """Of a step in which every exit is consulted and every row goes through all blocks."""
    devices, chip = ahead.topology(DECODE_ON)
    mesh = sharding.make_mesh(MeshSettings(**DECODE_MESH), devices)
    return ahead.decoding(config, model, mesh, chip, rows, POSITIONS, mode.LOSSY)


if __name__ == "__main__":
    bars.run(main)
