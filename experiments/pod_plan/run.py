"""Would exits of Llama-3 8B and Llama-2 70B fit slices of TPUs, and how fast? Compiled, not run.

    pip install 'early_exit[tpu-compile]'
    python -m experiments.pod_plan.run                # about half an hour on 2 cores
    python -m experiments.pod_plan.run --model=8b     # a third of that
    python -m experiments.pod_plan.run --check        # exits 1 if a bar falls short

Llama-3 8B on 16 chips of v5e: tuning eight exits, calibration's pass, and decoding. Llama-2 70B on
128 chips: tuning, also with longer rows, and decoding on 8. All at full depth; `--quick` compiles
some of it, of models of 2 blocks.
"""

from collections.abc import Iterable

import jax
from absl import flags

from configs import llama2_70b, llama3_8b
from early_exit import sharding, tree
from early_exit.cost import chips, multiply_adds
from early_exit.decoding import mode
from early_exit.exits.multi_exit import MultiExit
from early_exit.runs.metrics import table
from early_exit.settings.read import changed, read
from early_exit.settings.sections import MeshSettings, Settings
from early_exit.training import ahead
from experiments import bars

MODELS = flags.DEFINE_multi_enum("model", ["8b", "70b"], ["8b", "70b"], "Which to plan.")

MODES = {"lossy": mode.LOSSY, "verified": mode.named("verified", ("exits", "lookup"))}
POSITIONS = 2048
QUICK_BLOCKS = 2
# Decoded together, on all chips.
ROWS = (16, 1)
BATCH_AXES = {"data", "fsdp"}

# Of 8 billion: float32 heads with their moments are most of it, and are split over all chips.
SMALL = "v5e:4x4"
SMALL_TUNE = {"data": 1, "fsdp": 4, "tensor": 4}
# As many parts as there are key/value heads; nothing along `fsdp`, which every step would gather.
SMALL_DECODE = {"data": 2, "tensor": 8}

# Of 70: rows over `data`, matrices over `tensor`, so that the frozen backbone is never gathered.
LARGE = {"v5p:4x4x8": {"data": 16, "tensor": 8}, "v6e:8x16": {"data": 16, "tensor": 8}}
LARGE_DECODE, LARGE_DECODE_MESH = "v5p:2x2x2", {"tensor": 8}
# Four times as long rows may take this much more, of what is made and dropped on the way.
LONGER, LONGER_ON, MOST_LONGER = 4, "v5p:4x4x8", 4.4

HEADER = ("", "GiB needed", "left", "ms products", "memory", "network", "tokens/s", "bounded by")


def main(argv):
    del argv
    rows, checks, figures = [], [], {}
    plans = {"8b": _small, "70b": _large}
    for name in dict.fromkeys(MODELS.value):
        figures[name] = {"rows": [], "exchanged": {}}
        for title, estimate, tokens, more in plans[name]():
            left = estimate.spare / chips.GIB
            checks.append(bars.Bar(f"{title}: GiB left on a chip", left, 0, at_least=True))
            if estimate.program is None:
                continue
            rows.append(_row(title, estimate, tokens))
            checks += more
            figures[name]["rows"].append(rows[-1])
            figures[name]["exchanged"][title] = estimate.exchanged()
            header = (f"between chips: {title}", "along", "times", "GiB")
            print(table(_exchanged(estimate), header=header), end="\n\n", flush=True)
    print(table(rows, header=HEADER))
    bars.conclude(figures, checks)


def _small():
    """(what, its estimate, tokens of a call, bars beside that of memory) of Llama-3 8B."""
    config = changed(
        read(llama3_8b.get_config()),
        {f"mesh.{axis}": size for axis, size in SMALL_TUNE.items()},
    )
    model = ahead.model_of(config, QUICK_BLOCKS if bars.QUICK.value else None)
    devices, chip = ahead.topology(SMALL)
    tokens = config.data.batch_size * config.data.sequence_length
    mesh = sharding.make_mesh(config.mesh, devices)
    estimate = ahead.tuning(config, model, mesh, chip)
    products = _products(f"8B, tune on {SMALL}", estimate, _analytic_flops(config, model))
    yield f"8B, tune on {SMALL}", estimate, tokens, [products]
    estimate = ahead.calibrating(config, model, mesh, chip)
    yield f"8B, calibrate on {SMALL}", estimate, tokens, []
    mesh = sharding.make_mesh(MeshSettings(**SMALL_DECODE), devices)
    for name, how in MODES.items():
        for count in _some(ROWS):
            estimate = ahead.decoding(config, model, mesh, chip, count, POSITIONS, how)
            yield f"8B, {name}, {_rows(count)} on {SMALL}", estimate, count, []


def _large():
    """The same of Llama-2 70B."""
    config = read(llama2_70b.get_config())
    model = ahead.model_of(config, QUICK_BLOCKS if bars.QUICK.value else None)
    heads = tree.size_in_bytes(model.abstract_exits(config.model.dtype))
    tokens = config.data.batch_size * config.data.sequence_length
    analytic = _analytic_flops(config, model)
    for name, axes in _some(LARGE.items()):
        title, estimate = f"70B, tune on {name}", _tuning(config, model, name, axes)
        # A chip has a part of each matrix, and reduces that with the chips of other rows.
        reduced = _reduced_over_rows(estimate) / (heads / axes["tensor"])
        more = [
            _products(title, estimate, analytic),
            bars.Bar(f"{title}: bytes reduced over rows ÷ heads'", reduced, 1.05),
            bars.Bar(f"{title}: of them in loops over blocks", _in_block_loops(estimate), 0),
        ]
        yield title, estimate, tokens, more
        if name == LONGER_ON:
            yield _longer(config, name, axes, estimate.temporaries)
    devices, chip = ahead.topology(LARGE_DECODE)
    mesh = sharding.make_mesh(MeshSettings(**LARGE_DECODE_MESH), devices)
    for count in _some(ROWS):
        estimate = ahead.decoding(config, model, mesh, chip, count, POSITIONS, mode.LOSSY)
        yield f"70B, lossy, {_rows(count)} on {LARGE_DECODE}", estimate, count, []


def _longer(config: Settings, name: str, axes: dict, temporaries: int):
    """Rows that are longer, and what they take beyond what shorter ones take."""
    length = LONGER * config.data.sequence_length
    new = dict(config.model.new) | {"context_length": length}
    config = changed(config, {"data.sequence_length": length, "model.new": new})
    model = ahead.model_of(config, QUICK_BLOCKS if bars.QUICK.value else None)
    title, estimate = f"70B, T = {length}, on {name}", _tuning(config, model, name, axes)
    ratio = estimate.temporaries / temporaries
    bar = bars.Bar(f"{title}: temporaries ÷ those of a quarter", ratio, MOST_LONGER)
    return title, estimate, config.data.batch_size * length, [bar]


def _tuning(config: Settings, model: MultiExit, name: str, axes: dict) -> chips.Estimate:
    devices, chip = ahead.topology(name)
    estimate = ahead.tuning(config, model, sharding.make_mesh(MeshSettings(**axes), devices), chip)
    if estimate.program is None:
        raise SystemExit(f"{name}: does not fit, {estimate.needed / chips.GIB:.1f} GiB are needed")
    return estimate


def _products(title: str, estimate: chips.Estimate, analytic: int) -> bars.Bar:
    off = abs(estimate.program.flops * estimate.chips / analytic - 1)
    return bars.Bar(f"{title}: |matrix products compiled ÷ analytic − 1|", off, 0.05)


def _some(items: Iterable) -> list:
    """All; the first with `--quick`."""
    return list(items)[: 1 if bars.QUICK.value else None]


def _rows(count: int) -> str:
    return "1 row" if count == 1 else f"{count} rows"


def _row(title: str, estimate: chips.Estimate, tokens: int) -> tuple:
    needed, left = estimate.needed / chips.GIB, estimate.spare / chips.GIB
    parts = (1e3 * seconds for seconds in estimate.parts.values())
    return title, needed, left, *parts, tokens / estimate.seconds, estimate.bound


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


if __name__ == "__main__":
    bars.run(main)
