"""ε asked and ε found: thresholds head by head, as in Valade 2024, and for all heads together.

    python -m experiments.papers.valade --records=runs/records/news.npz --check

Thresholds come from one half of the texts (or examples) and are judged on the other, over many
random halves. Head by head, each threshold is the lowest above which the head's own predictions
agree with the full model at a rate ε, of all positions; but those that come to a deep head are the
ones that earlier heads found hard. All together (`calibration.thresholds`), the heads share a level
at which those who leave, where they leave, reach ε. And of scores, which tells best whether a head
says what the full model says.
"""

import itertools
from pathlib import Path

import numpy as np
from absl import flags

from early_exit import policy as policies
from early_exit.calibration import thresholds
from early_exit.calibration.records import Records
from early_exit.runs.metrics import table
from experiments import bars, figures
from experiments.papers.measures import of_leavers

RECORDS = flags.DEFINE_string("records", None, "File of records.", required=True)
SPLITS = flags.DEFINE_integer("splits", 50, "Random halves.", lower_bound=2)

EPSILONS = (0.8, 0.9, 0.95, 0.98)
SCORES = ("max_prob", "margin", "entropy")
APART, TOGETHER = "head by head", "all together"


def main(argv):
    del argv
    splits = 4 if bars.QUICK.value else SPLITS.value
    records = Records.load(Path(RECORDS.value))
    groups = np.unique(records.groups).size
    print(f"{records.labels.size} positions of {groups} texts or examples, {splits} halvings\n")
    found = {}
    for split, score in itertools.product(range(splits), SCORES):
        known, fresh = records.split(0.5, split)
        for recipe, rows in _thresholds(known, score).items():
            for epsilon, row in zip(EPSILONS, rows, strict=True):
                exits = policies.first_exit(fresh.score(score)[:-1], row)
                found.setdefault((score, recipe, epsilon), []).append(of_leavers(fresh, exits))
    rows = []
    for key, figures_of in found.items():
        agree, leave, depth = np.array(figures_of).T
        told = agree[np.isfinite(agree)]  # where anything left
        low, high = np.quantile(told, [0.05, 0.95]) if told.size else (np.nan, np.nan)
        mean = told.mean() if told.size else np.nan
        rows.append((*key, mean, low, high, leave.mean(), depth.mean()))
    header = ("score", "thresholds", "ε asked", "ε found", "5 %", "95 %", "leave early", "depth")
    print(table(rows, header=header))
    areas = _areas(records, 20 if bars.QUICK.value else 200)
    _conclude(rows, areas)


def _thresholds(known: Records, score: str) -> dict[str, np.ndarray]:
    """Recipe → thresholds [K, E] for each of `EPSILONS`."""
    return {
        APART: thresholds.path(known, score, np.array(EPSILONS)),
        TOGETHER: thresholds.ladder(known, score, EPSILONS),
    }


def _areas(records: Records, draws: int) -> list[tuple]:
    """(exit, score, AUC, its interval) of whether the exit says what the full model says."""
    rows = []
    for e, depth in enumerate(records.exit_depths[:-1]):
        agree = records.agrees[e]

        def of(chosen, e=e, agree=agree):
            return np.array(
                [figures.auc(records.score(name)[e][chosen], agree[chosen]) for name in SCORES]
            )

        each = zip(SCORES, *figures.intervals(of, records.groups, draws), strict=True)
        rows += [(int(depth), *row) for row in each]
    print("\nhow well a score tells whether the exit says what the full model says (AUC):")
    print(table(rows, header=("exit", "score", "AUC", "from", "to (95 %)")))
    return rows


def _conclude(rows: list[tuple], areas: list[tuple]) -> None:
    short = {
        recipe: max(asked - mean for _, of, asked, mean, *_ in rows if of == recipe)
        for recipe in (APART, TOGETHER)
    }
    bars.conclude(
        {"rows": rows, "areas": areas},
        [
            bars.Bar(f"ε asked − ε found on new, most: {TOGETHER}", short[TOGETHER], 0.01),
            bars.Bar(f"the same, {APART} (control)", short[APART], 0.01, True),
        ],
    )


if __name__ == "__main__":
    bars.run(main)
