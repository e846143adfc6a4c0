"""Says what a model is, what its exits cost, and what can be attached where; reads no weights.

    python -m launch.inspect runs/smollm2        (a run, or what one was exported to)
    python -m launch.inspect org/name            (a source of weights: a hub id, a folder, …)
    python -m launch.inspect --settings          (all that a config can say)

Costs are of one token, without attention to others, or of one image: multiply-adds, and the bytes
of the parameters that are read; each also as so many mean blocks and as a share of the full model.
"""

import dataclasses
import itertools
import shutil
from pathlib import Path

import jax.numpy as jnp
from absl import app, flags

from early_exit import tree
from early_exit.backbones.base import BackboneConfig
from early_exit.cost import multiply_adds
from early_exit.exits import artefact
from early_exit.exits.heads import ExitConfig
from early_exit.pretrained.describe import Described, describe
from early_exit.runs import assemble, checkpoint
from early_exit.runs.metrics import table
from early_exit.settings.listing import listing
from early_exit.storage import files
from launch import common

SETTINGS = flags.DEFINE_bool("settings", False, "List every setting: default, range and meaning.")

REDUCED = 4096  # classes of the reduced heads that are shown


@dataclasses.dataclass(frozen=True)
class Subject:
    """What is inspected: where the weights are, and what is known beside them."""

    source: str
    dtype: str = "float32"
    exits: ExitConfig | None = None
    state: str | None = None


def main(argv):
    if SETTINGS.value:
        common.no_arguments(argv)
        print(listing(shutil.get_terminal_size((100, 24)).columns))
        return
    if len(argv) != 2:
        raise app.UsageError("name one thing: a run, an export, or a source of weights")
    subject = _subject(argv[1])
    found = describe(subject.source)
    of = multiply_adds.backbone(found.config, jnp.dtype(subject.dtype))
    print("\n".join(f"{name:<12}{value}" for name, value in _facts(subject, found)))
    print(f"\n{_costs(found.config, of, subject)}")
    print(f"\n{_attachable(found.config, of)}")


def _subject(name: str) -> Subject:
    folder = Path(name)
    if artefact.is_in(folder):
        described = artefact.describe(folder)
        beside = (folder / "config.json").exists()
        return Subject(
            name if beside else assemble.load_config(folder).model.source,
            described.dtype,
            described.exits,
            f"exported from step {described.step}, {'with' if beside else 'without'} its backbone",
        )
    path = folder / "config.json"
    if path.exists() and {"model", "exits", "tune"} <= files.read_json(path).keys():
        config = assemble.load_config(folder)
        step = checkpoint.latest_step(folder / assemble.CHECKPOINTS)
        return Subject(
            config.model.source,
            config.model.dtype,
            assemble.exit_config(config),
            "a run without a checkpoint yet" if step is None else f"a run at step {step}",
        )
    return Subject(name)


def _facts(subject: Subject, found: Described):
    config, checkpoint_ = found.config, found.checkpoint
    parameters = tree.count(found.params)
    size = parameters * jnp.dtype(subject.dtype).itemsize
    described = checkpoint_.config
    yield "source", subject.source
    if subject.state:
        yield "state", subject.state
    yield "family", described.get("model_type", described.get("architecture"))
    yield "depth", f"{config.depth} blocks"
    yield "width", f"{config.width}"
    yield "parameters", f"{parameters:,}"
    stored = ", ".join(sorted(set(checkpoint_.dtypes.values())))
    yield "dtype", f"{subject.dtype}, {_mb(size)} MB (stored as {stored})"
    if hasattr(config, "context_length"):
        yield "context", f"{config.context_length:,} positions"
    if hasattr(config, "vocab_size"):
        yield "vocabulary", f"{config.vocab_size:,} tokens"
    if config.num_classes != getattr(config, "vocab_size", None):
        yield "classes", f"{config.num_classes:,}" if config.num_classes else "none: features only"
    if subject.exits:
        exits = subject.exits
        matrix = f"{exits.classes:,} classes" if exits.classes else "all classes"
        yield "exits", f"after blocks {', '.join(map(str, exits.points))}"
        yield "heads", f"{exits.head}, {exits.output} output matrix, {matrix}"


def _costs(config: BackboneConfig, of: multiply_adds.BackboneCost, subject: Subject) -> str:
    mean_adds, mean_bytes = of.mean_block

    def row(name: str, part: multiply_adds.Cost):
        adds = part.multiply_adds
        return (
            name,
            *(adds / 1e6, adds / mean_adds, adds / of.full.multiply_adds),
            *(part.bytes / 1e6, part.bytes / mean_bytes, part.bytes / of.full.bytes),
        )

    rows = [row("stem", of.stem)] if of.stem.multiply_adds else []
    first = 1
    for block, same in itertools.groupby(of.blocks):
        last = first + len(list(same)) - 1
        rows.append(
            row(f"block {first}" if first == last else f"blocks {first}–{last}, each", block)
        )
        first = last + 1
    if of.readout.multiply_adds:
        rows.append(row("readout", of.readout))
    rows.append(row("full model", of.full))
    passed = multiply_adds.Cost()
    for point in subject.exits.points if subject.exits else ():
        head, _ = multiply_adds.head(config, subject.exits, of, point, jnp.dtype(subject.dtype))
        passed += head
        rows.append(row(f"head after block {point}", head))
        rows.append(row(f"all, leaving after {point}", of.before(point) + passed))
    shares = ("of a block", "of the full")
    return table(rows, header=("part", "M mult-adds", *shares, "MB read", *shares))


def _attachable(config: BackboneConfig, of: multiply_adds.BackboneCost) -> str:
    if not config.num_classes:
        return "Exits predict what the network does, and this one has no output matrix yet."
    _, mean_bytes = of.mean_block
    reduces = not config.classifies and config.num_classes > REDUCED
    sizes = [0, REDUCED] if reduces else [0]
    rows = []
    for kind in config.head_kinds:
        row = [kind]
        for classes in sizes:
            exits = ExitConfig((1,), head=kind, classes=classes)
            head, parameters = multiply_adds.head(config, exits, of, 1, jnp.float32)
            row += [parameters / 1e6, head.bytes / mean_bytes]
        rows.append(row)
    header = ["head"]
    for classes in sizes:
        header += [f"M parameters, {classes or config.num_classes} classes", "of a block"]
    return (
        f"What can be attached after any of the blocks 1–{config.depth - 1}, with an output matrix "
        f"of its own:\n{table(rows, header)}"
    )


def _mb(size: int) -> str:
    return f"{size / 1e6:,.1f}"


if __name__ == "__main__":
    common.run(main, on_run=False)
