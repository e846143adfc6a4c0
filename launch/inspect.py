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

import jax.numpy as jnp
from absl import app, flags

from early_exit import tree
from early_exit.backbones import base
from early_exit.backbones.base import BackboneConfig
from early_exit.cost import multiply_adds
from early_exit.exits import artefact
from early_exit.exits.heads import ExitConfig
from early_exit.pretrained.describe import describe
from early_exit.runs import assemble, checkpoint, layout
from early_exit.runs.metrics import table
from early_exit.settings.listing import listing
from early_exit.settings.sections import Settings
from early_exit.storage import buckets, files
from launch import common

SETTINGS = flags.DEFINE_bool("settings", False, "List every setting: default, range and meaning.")

REDUCED = 4096  # classes of the reduced heads that are shown


@dataclasses.dataclass(frozen=True)
class Subject:
    """What is inspected.

    Attributes:
      source: where the weights come from, in words.
      family: of the network.
      network: its config.
      stored: types of the tensors that there are weights of; none where no weights are yet.
      dtype: to compute in.
      exits: attached to it.
      state: of the run, or of what it was exported to.
    """

    source: str
    family: str
    network: BackboneConfig
    stored: tuple[str, ...] = ()
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
    of = multiply_adds.backbone(subject.network, jnp.dtype(subject.dtype))
    print("\n".join(f"{name:<12}{value}" for name, value in _facts(subject)))
    print(f"\n{_costs(subject.network, of, subject)}")
    print(f"\n{_attachable(subject.network, of)}")


def _subject(name: str) -> Subject:
    folder = buckets.place(name)
    if artefact.is_in(folder):
        described = artefact.describe(folder)
        beside = (folder / "config.json").exists()
        whole = _of_weights(name) if beside else _of_config(layout.load_config(folder))
        return dataclasses.replace(
            whole,
            dtype=described.dtype,
            exits=described.exits,
            state=f"exported from step {described.step}, {'with' if beside else 'without'} its "
            "backbone",
        )
    path = folder / "config.json"
    if path.exists() and {"model", "exits", "tune"} <= files.read_json(path).keys():
        config = layout.load_config(folder)
        step = checkpoint.latest_step(folder / layout.CHECKPOINTS)
        state = "a run without a checkpoint yet" if step is None else f"a run at step {step}"
        return dataclasses.replace(
            _of_config(config), exits=assemble.exit_config(config), state=state
        )
    return _of_weights(name)


def _of_weights(source: str) -> Subject:
    found = describe(source)
    described = found.checkpoint.config
    return Subject(
        source,
        described.get("model_type", described.get("architecture")),
        found.config,
        tuple(sorted(set(found.checkpoint.dtypes.values()))),
    )


def _of_config(config: Settings) -> Subject:
    """The network that a run's config names, its changes included."""
    model = config.model
    if model.new:
        subject = Subject("made anew", model.new["family"], assemble.abstract_model(config).config)
    elif checkpoint.latest_step(buckets.place(model.source) / layout.CHECKPOINTS) is not None:
        before = _of_config(layout.load_config(buckets.place(model.source)))
        subject = dataclasses.replace(before, source=f"the run in {model.source}", stored=())
    else:
        subject = _of_weights(model.source)
    network = assemble.abstract_model(config).config
    changed = "" if network == subject.network else ", changed"
    return dataclasses.replace(
        subject, source=f"{subject.source}{changed}", network=network, dtype=model.dtype
    )


def _facts(subject: Subject):
    config = subject.network
    _, params = base.abstract(config.build)
    parameters = tree.count(params)
    size = parameters * jnp.dtype(subject.dtype).itemsize
    yield "source", subject.source
    if subject.state:
        yield "state", subject.state
    yield "family", subject.family
    yield "depth", f"{config.depth} blocks"
    yield "width", f"{config.width}"
    yield "parameters", f"{parameters:,}"
    stored = f" (stored as {', '.join(subject.stored)})" if subject.stored else ""
    yield "dtype", f"{subject.dtype}, {_mb(size)} MB{stored}"
    if hasattr(config, "context_length"):
        yield "context", f"{config.context_length:,} positions"
    if hasattr(config, "vocab_size"):
        yield "vocabulary", f"{config.vocab_size:,} tokens"
    if config.num_classes != getattr(config, "vocab_size", None):
        yield "classes", f"{config.num_classes:,}" if config.num_classes else "none: features only"
    if subject.exits and subject.exits.points:
        exits = subject.exits
        matrix = f"{exits.classes:,} classes" if exits.classes else "all classes"
        yield "exits", f"after blocks {', '.join(map(str, exits.points))}"
        yield "heads", f"{exits.head}, {exits.output} output matrix, {matrix}"
    if subject.exits and subject.exits.recurrent_taps:
        taps = ", ".join(map(str, subject.exits.recurrent_taps))
        own = subject.exits.recurrent_blocks
        blocks = "1 block" if own == 1 else f"{own} blocks" if own else "a feed-forward part"
        yield "recurrent", f"{blocks} of its own, reads what blocks {taps} put out"


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
    if subject.exits and subject.exits.recurrent_taps:
        draft, _ = multiply_adds.draft(config, subject.exits, of, jnp.dtype(subject.dtype))
        rows.append(row("draft of the recurrent exit", draft))
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
