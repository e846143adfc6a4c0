"""What do exits cost the network they are trained with?

    python -m experiments.joint_tuning.run --check
    python -m experiments.joint_tuning.run --quick

Trains a small decoder from random weights on the standard library's text, jointly with three exits
and without any: the same batches in the same order, for several seeds. What counts is the final
exit's loss on held-out text, as a ratio to the run of the same seed without exits: a difference
that is smaller than the interval of its mean over seeds is none.

The weights are EE-LLM's for exits at a quarter and at half of
the depth, with one more exit between that and the end; a second run brings them up from zero.
"""

import tempfile
import time
from pathlib import Path

import numpy as np
from absl import flags

from configs import tiny
from early_exit.runs.metrics import table
from early_exit.settings.overrides import override
from early_exit.settings.read import changed, read
from early_exit.settings.sections import Settings
from early_exit.training.loop import tune
from experiments import bars

RUNS = flags.DEFINE_string("runs", None, "Folder of the runs, to go on with; temporary if absent.")

NETWORK = {"width": 128, "depth": 8, "heads": 4, "kv_heads": 4, "head_dim": 32, "mlp_width": 384}
POINTS, WEIGHTS = (2, 4, 6), (0.25, 0.5, 0.5)
SEEDS = 3


def settings(seed: int, steps: int) -> Settings:
    config = override(
        tiny.get_config(),
        {
            "seed": seed,
            "exits.points": POINTS,
            "exits.head": "norm",
            "exits.classes": 0,
            "exits.init": "random",
            "data.sequence_length": 128,
            "data.batch_size": 16,
            "tune.train": "all",
            "tune.loss": "cross_entropy",
            "tune.weights": WEIGHTS,
            "tune.steps": steps,
            "tune.learning_rate": 3e-3,
            "tune.backbone_rate": 1.0,
            "tune.warmup_steps": steps // 10,
            "tune.weight_decay": 0.1,
            "tune.checkpoint_every": steps,
            "tune.validate_every": steps,
            "tune.validation_batches": 16,
        },
    )
    # Other sizes than the source's: all of it is drawn anew, and only its tokenizer stays.
    config.model.changes = NETWORK
    return read(config)


def main(argv):
    del argv
    steps, seeds = (10, 1) if bars.QUICK.value else (300, SEEDS)
    variants = {
        "no exits": {"exits.points": (), "tune.weights": ()},
        "three exits": {},
        "weights from 0": {"tune.start_weights": (0.0,) * 3, "tune.weight_steps": steps // 2},
    }
    rows = {name: [] for name in variants}
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(RUNS.value or scratch)
        for seed in range(seeds):
            for name, changes in variants.items():
                config = changed(settings(seed, steps), changes)
                began = time.perf_counter()
                found = tune(config, folder / f"{name.replace(' ', '_')}_{seed}")
                seconds = time.perf_counter() - began
                rows[name].append([row["loss"] for row in found] + [seconds])
                print(
                    name, seed, *(f"{row['exit']}: {row['loss']:.4f}" for row in found), flush=True
                )
    finals = {name: np.array([row[-2] for row in found]) for name, found in rows.items()}
    ratios = {
        name: bars.mean_interval(final / finals["no exits"]) for name, final in finals.items()
    }
    shown = []
    for name, found in rows.items():
        mean = np.mean(found, axis=0)
        early = mean[:-2] if len(mean) > 2 else ["–"] * len(POINTS)
        _, around = bars.mean_interval(finals[name])
        shown.append((name, *early, mean[-2], around, *ratios[name], mean[-1]))
    header = ("trained with", *(f"exit {point}" for point in POINTS))
    header += ("final", "± (95 %)", "÷ no exits", "± (95 %)", "seconds")
    print("\n" + table(shown, header=header))
    bars.conclude(
        {"rows": rows, "ratios": ratios},
        [
            bars.Bar(f"final loss, {name} ÷ no exits, mean of seeds", ratio, 1.01)
            for name, (ratio, _) in ratios.items()
            if name != "no exits"
        ],
    )


if __name__ == "__main__":
    bars.run(main)
