"""What makes an exit good: its head, its start, the text it sees, or a backbone that gives way?

    python -m launch.distill --config=configs/smollm2_135m.py --made=made/smollm2 --tokens=120_000
    python -m experiments.exit_quality.run --made=made/smollm2 --runs=runs/exit_quality

The ablation of EE-Tuning (Pan et al. 2024), small: every run sees the same number of tokens, of
Python source or of conversations that the model made itself (`launch.distill`). Frozen runs are
tuned from cached hidden states (`launch.cache`), which are made first. In joint tuning the backbone
learns too, once with exits and once without. Agreement and coverage are counted on held-out text of
both kinds. Runs that are there are not tuned again: remove their folders to do so.
"""

import dataclasses
import itertools
import json
import time
from pathlib import Path

import jax
import numpy as np
from absl import flags

from configs import smollm2_135m
from early_exit.data import feed as feeds
from early_exit.distillation import hidden_states
from early_exit.evaluation import exits as evaluation
from early_exit.runs import assemble, checkpoint, layout
from early_exit.runs.metrics import table
from early_exit.settings.overrides import override
from early_exit.settings.read import read
from early_exit.settings.sections import Settings
from early_exit.storage import files
from early_exit.training.loop import tune
from experiments import bars

RUNS = flags.DEFINE_string("runs", None, "Folder of the runs and of the cached states.")
MADE = flags.DEFINE_string("made", None, "Folder of conversations that the model made itself.")

TEXTS = ("python", "own")
HEADS, INITS = ("mlp", "norm", "layer"), ("copy", "random")
STEPS = 56
BATCHES = 6  # of held-out text of each kind


@dataclasses.dataclass(frozen=True)
class Case:
    """One run of the ablation; without a head, there are no exits."""

    head: str
    init: str
    text: str
    train: str = "frozen"

    @property
    def folder(self) -> Path:
        return Path(RUNS.value) / "_".join(dataclasses.astuple(self))


CASES = [
    *(Case(head, init, text) for head, init, text in itertools.product(HEADS, INITS, TEXTS)),
    Case("mlp", "copy", "own", "joint"),
    Case("none", "copy", "own", "joint"),
]


def settings(case: Case) -> Settings:
    config = smollm2_135m.get_config("train=all" if case.train == "joint" else None)
    steps = 3 if bars.QUICK.value else STEPS
    changes = {
        "data.source": "stdlib" if case.text == "python" else f"made:{MADE.value}",
        "tune.steps": steps,
        "tune.warmup_steps": min(8, steps - 1),
        "tune.validate_every": steps,
        "tune.validation_batches": 1,
        "tune.checkpoint_every": steps,
    }
    if case.head != "none":
        changes |= {"exits.head": case.head, "exits.init": case.init}
    else:
        changes |= {"exits.points": (), "exits.classes": 0}
        changes |= {"tune.weights": (), "tune.start_weights": (), "tune.weight_steps": 0}
    if case.train == "frozen":
        changes |= {"tune.hidden_states": str(Path(RUNS.value) / f"states_{case.text}")}
    elif case.head != "none":
        changes |= {"tune.weight_steps": steps // 2}
    return read(override(config, changes))


def tuned(case: Case) -> float:
    """Tunes a case's exits if that is still to be done; how many minutes that took."""
    config, minutes = settings(case), case.folder / "minutes.json"
    if checkpoint.latest_step(case.folder / layout.CHECKPOINTS) != config.tune.steps:
        began = time.perf_counter()
        tune(config, case.folder)
        files.write_text(minutes, files.json_text((time.perf_counter() - began) / 60))
    return json.loads(minutes.read_text())


def cached(text: str) -> float:
    """Makes the hidden states of a text if that is still to be done; how many minutes it took."""
    config = settings(Case("mlp", "copy", text))
    folder = Path(config.tune.hidden_states)
    minutes = folder.with_suffix(".json")
    if not minutes.exists():
        began = time.perf_counter()
        hidden_states.fill(config, folder, batches=config.tune.steps, top_k=64)
        files.write_text(minutes, files.json_text((time.perf_counter() - began) / 60))
    return json.loads(minutes.read_text())


def measured(case: Case) -> dict[str, list[dict]]:
    """Text → a row per exit, on batches of that text that no run has seen."""
    path = case.folder / "measured.json"
    if not path.exists():
        found = assemble.load_tuned(case.folder)
        rows = {}
        for text in TEXTS:
            config = settings(dataclasses.replace(case, text=text))
            feed = feeds.make(config, found.model.config, found.tokenizer)
            batches = list(feed.held_out("test", 1 if bars.QUICK.value else BATCHES))
            rows[text] = evaluation.summary(evaluation.record(found.model, found.params, batches))
        files.write_json(path, rows)
    return json.loads(path.read_text())


def main(argv):
    del argv
    if not (RUNS.value and MADE.value):
        raise ValueError("give --runs, a folder, and --made, one that launch.distill has filled")
    Path(RUNS.value).mkdir(parents=True, exist_ok=True)
    minutes = {text: cached(text) for text in TEXTS}
    print(table(minutes.items(), header=("hidden states of", "minutes")), flush=True)

    # Those that bars are about.
    cases = [case for case in CASES if case.head in ("mlp", "none") and case.init == "copy"]
    cases = cases if bars.QUICK.value else CASES
    rows, figures, finals = [], {}, {}
    for case in cases:
        took, found = tuned(case), measured(case)
        jax.clear_caches()
        name = " ".join(dataclasses.astuple(case))
        figures[name] = {"minutes": took} | found
        finals[case] = {text: of[-1]["loss"] for text, of in found.items()}
        cells = [
            f"{100 * row['agreement']:.1f} / {100 * row['coverage']:.1f}"
            for text in TEXTS
            for row in found[text][:-1]
        ] or ["–"] * 6
        rows.append((*dataclasses.astuple(case), *cells, took))
        print(*rows[-1], flush=True)
    header = ("head", "init", "text", "backbone")
    points = smollm2_135m.get_config().exits.points
    header += tuple(f"{text} {point}" for text in TEXTS for point in points) + ("minutes",)
    print("\nagreement with the full model / coverage at 95 % agreement, in %\n")
    print(table(rows, header=header))

    with_exits, without = (finals[case] for case in CASES[-2:])
    before = finals[CASES[0]]
    print(
        "\n"
        + table(
            [
                ("before", *before.values()),
                ("jointly, with exits", *with_exits.values()),
                ("without exits", *without.values()),
            ],
            header=("final exit's loss", *TEXTS),
        )
    )

    def agreement(head, init, text, where="own"):
        name = f"{head} {init} {text} frozen"
        return np.mean([row["agreement"] for row in figures[name][where][:-1]])

    bars.conclude(
        figures,
        [
            bars.Bar(
                "final loss on its own text, jointly with exits ÷ without",
                with_exits["own"] / without["own"],
                1.01,
            ),
            bars.Bar(
                "points of agreement on own text that own text adds (mlp, copy)",
                100 * (agreement("mlp", "copy", "own") - agreement("mlp", "copy", "python")),
                0,
                at_least=True,
            ),
        ],
    )


if __name__ == "__main__":
    bars.run(main)
