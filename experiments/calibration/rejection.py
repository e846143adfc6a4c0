"""Is a promised risk kept, and does it pay to choose exits and rejection together?

    python -m experiments.calibration.rejection --records=runs/digits/records.npz --check

Needs labelled records. Thresholds come from one half of the examples and are judged on the other,
over many random halves; of a text, one position counts as an example.
"""

from pathlib import Path

import numpy as np
from absl import flags

from early_exit import policy as policies
from early_exit.calibration import budget as budgets
from early_exit.calibration import rejection
from early_exit.calibration.records import Records
from early_exit.calibration.risk import one_of_each_group
from early_exit.report import plots
from early_exit.runs.metrics import table
from early_exit.storage import files
from experiments import bars

RECORDS = flags.DEFINE_string("records", None, "File of records.", required=True)
CONFIDENCE = flags.DEFINE_string("confidence", "max_prob", "Score to threshold.")
SPLITS = flags.DEFINE_integer("splits", 200, "Random halves.")
PLOT = flags.DEFINE_string("plot", None, "File for the plot, as SVG.")

DELTA = 0.1
# Risks to promise, as shares of the full model's error rate; and a rate to abstain at.
PLACES, ABSTAIN = (0.25, 0.5, 0.75), 0.1


def main(argv):
    del argv
    splits = 10 if bars.QUICK.value else SPLITS.value
    records = Records.load(Path(RECORDS.value))
    right, scores = records.correct, records.score(CONFIDENCE.value)
    print(f"{records.labels.size} positions of {np.unique(records.groups).size} groups")
    rows = [
        (int(depth), 1 - ok.mean(), rejection.aurc(s, ok), rejection.excess_aurc(s, ok))
        for depth, s, ok in zip(records.exit_depths, scores, right, strict=True)
    ]
    print(table(rows, header=("exit", "wrong", "AURC", "above the best order")))
    if PLOT.value:
        curves = {
            f"block {depth}": rejection.risk_coverage(s, ok)[:2]
            for depth, s, ok in zip(records.exit_depths, scores, right, strict=True)
        }
        files.write_text(Path(PLOT.value), plots.risk_against_coverage(curves))
        print(f"plot in {PLOT.value}")

    records = one_of_each_group(records, seed=0)  # what a promise is about
    full = 1 - records.correct[-1].mean()
    budget = (records.costs[0] + records.costs[-1]) / 2
    broken = np.zeros((len(PLACES), splits), bool)
    answered = np.zeros(broken.shape)
    wrong = np.zeros((2, splits))
    for split in range(splits):
        known, fresh = records.split(0.5, split)
        alone = budgets.fit(known, CONFIDENCE.value, budget, against="label")
        for p, place in enumerate(PLACES):
            policy = policies.never(len(right) - 1, CONFIDENCE.value)
            policy = rejection.fit(known, policy, risk=place * full, delta=DELTA, seed=split)
            reached = rejection.assess(policy, fresh)
            answered[p, split] = reached["answered"]
            broken[p, split] = (reached["wrong"] or 0.0) > place * full
        together = rejection.fit_exits(known, CONFIDENCE.value, budget, abstain=ABSTAIN)
        for i, exits in enumerate((alone, together)):
            policy = rejection.fit(known, exits, abstain=ABSTAIN)
            wrong[i, split] = rejection.assess(policy, fresh)["wrong"]
    rows = [(place * full, answered[p].mean(), broken[p].mean()) for p, place in enumerate(PLACES)]
    print(f"\n{splits} halvings; a risk promised with probability {1 - DELTA:g}")
    print(table(rows, header=("risk", "answered", "broken")))
    rows = [("exits, then rejection", wrong[0].mean()), ("together", wrong[1].mean())]
    print(f"\nhalf of the exits' range spent, {ABSTAIN:.0%} without an answer")
    print(table(rows, header=("chosen", "wrong among the rest")))
    margin = 3 * (DELTA * (1 - DELTA) / splits) ** 0.5
    bars.conclude(
        {"broken": broken.mean(axis=1).tolist(), "wrong": wrong.mean(axis=1).tolist()},
        [
            bars.Bar("a promise broken, most", float(broken.mean(axis=1).max()), DELTA + margin),
            bars.Bar(
                "together − one after the other", float(np.diff(wrong.mean(axis=1))[0]), 0.002
            ),
        ],
    )


if __name__ == "__main__":
    bars.run(main)
