"""Accuracy against budget: EERO, and the plans that it is compared with, on small ResNets.

    python -m experiments.papers.eero --runs=runs/papers --check
    python -m experiments.papers.eero --quick

Trains a ResNet of nine blocks with four exits on scikit-learn's digits for each seed (two minutes
each), where that has not been done. Thresholds come from one half of the images that a network was
not trained on and are judged on the other, over many random halves. Intervals are over seeds, each
another network (Student's t, 95 %).
"""

from pathlib import Path

import numpy as np
from absl import flags

from configs import digits_resnet
from early_exit import policy as policies
from early_exit.calibration import budget as budgets
from early_exit.calibration.records import Records
from early_exit.evaluation import exits
from early_exit.runs.metrics import table
from early_exit.settings.overrides import override
from early_exit.settings.read import read
from experiments import bars, classifiers
from experiments.papers.measures import one_threshold

RUNS = flags.DEFINE_string("runs", "runs/papers", "Folder of the runs.")
SEEDS = flags.DEFINE_integer("seeds", 3, "Networks.", lower_bound=2)
SPLITS = flags.DEFINE_integer("splits", 100, "Random halves for each.", lower_bound=2)

# Of what the full network costs, exits included.
SHARES = (0.15, 0.2, 0.3, 0.5, 0.8)
ONE = "one threshold"
METHODS = (ONE, *budgets.METHODS)
SCORE = "max_prob"
# As in `experiments.calibration.budgets`: two halves, each within 1.36/√n in 95 of 100.
MOST_OVER = 1.36 * 2**0.5


def main(argv):
    del argv
    quick = bars.QUICK.value
    splits = 4 if quick else SPLITS.value
    folder = Path(RUNS.value) / ("quick" if quick else "digits")
    runs = [_records(folder, seed, quick) for seed in range(2 if quick else SEEDS.value)]
    always = np.array([records.correct.mean(axis=1) for records in runs])
    print(f"{len(runs)} networks, {runs[0].labels.size} images each, {splits} halvings\n")
    rows = [
        (int(depth), cost / runs[0].costs[-1], *bars.mean_interval(of))
        for depth, cost, of in zip(runs[0].exit_depths, runs[0].costs, always.T, strict=True)
    ]
    print("all leave at one exit:")
    print(table(rows, header=("exit", "cost ÷ full", "accuracy", "±")))

    right, spent = np.zeros((2, len(runs), len(SHARES), len(METHODS), splits))
    for r, records in enumerate(runs):
        for split in range(splits):
            known, fresh = records.split(0.5, split)
            for m, method in enumerate(METHODS):
                for b, policy in enumerate(_policies(known, method)):
                    reached = budgets.assess(policy, fresh, against="label")
                    right[r, b, m, split] = reached["quality"]
                    spent[r, b, m, split] = reached["spent"] / records.costs[-1]
    mean = right.mean(axis=-1)
    against = {"− eero": mean[:, :, [METHODS.index("eero")]], "− full": always[:, -1:, None]}
    rows = [
        (
            *(share, method, *bars.mean_interval(mean[:, b, m])),
            *(
                figure
                for reference in against.values()
                for figure in bars.mean_interval((mean - reference)[:, b, m])
            ),
            spent[:, b, m].mean(),
        )
        for b, share in enumerate(SHARES)
        for m, method in enumerate(METHODS)
    ]
    print("\nat most so much of the full cost, on average; differences network by network:")
    columns = ("accuracy", "±", *(x for name in against for x in (name, "±")))
    print(table(rows, header=("budget", "thresholds", *columns, "spent on new")))
    _conclude(runs, mean, spent, {"always": always.mean(axis=0).tolist(), "rows": rows})


def _records(folder: Path, seed: int, quick: bool) -> Records:
    """What a network says of all images that it was not trained on."""
    config = digits_resnet.get_config("layers=20,points=1:3:5:7")
    steps = {"tune.steps": 4, "tune.warmup_steps": 2} if quick else {"tune.steps": 480}
    tuned = classifiers.trained(read(override(config, {"seed": seed} | steps)), folder / str(seed))
    feed = tuned.feed
    splits = ("validation", "calibration", "test")
    batches = [batch for split in splits for batch in feed.held_out(split, None)]
    return exits.record(tuned.model, tuned.params, batches)


def _policies(known: Records, method: str) -> list[policies.ExitPolicy]:
    """A policy for each budget; the first exit is the least that one can spend."""
    limits = [max(share * known.costs[-1], known.costs[0]) for share in SHARES]
    if method != ONE:
        return budgets.sweep(known, SCORE, limits, method=method, against="label")
    scores = known.score(SCORE)[:-1]
    found = [one_threshold(scores, known.costs, limit) for limit in limits]
    return [policies.make([threshold] * len(scores), SCORE) for threshold in found]


def _conclude(runs: list[Records], right: np.ndarray, spent: np.ndarray, figures: dict) -> None:
    """Bars on accuracy [R, B, M] and on what was spent [R, B, M, splits]."""
    eero, tight, search = (METHODS.index(name) for name in ("eero", "eero_tight", "search"))
    over = []
    for records, of_run in zip(runs, spent, strict=True):
        first = records.costs[0] / records.costs[-1]
        unit = np.sqrt(len(records.labels) // 2) / (1 - first)
        limits = np.maximum(SHARES, first)[:, None]
        over.append(np.quantile((of_run[:, eero] - limits) * unit, 0.95, axis=-1).max())
    mean = right.mean(axis=0)
    others = np.delete(mean, search, axis=1)
    lost = float((mean[:, search] - others.max(axis=1)).min())
    bars.conclude(
        figures,
        [
            bars.Bar("eero: over budget × √images ÷ range, 95 %", float(max(over)), MOST_OVER),
            bars.Bar(
                "eero, carried out to the last − as published, least",
                float((mean[:, tight] - mean[:, eero]).min()),
                -0.002,
                True,
            ),
            bars.Bar("search − best other, least", lost, -0.01, True),
        ],
    )


if __name__ == "__main__":
    bars.run(main)
