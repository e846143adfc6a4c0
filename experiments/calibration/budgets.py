"""What a budget buys: EERO as published and carried out to the last, geometric shares, search.

    python -m experiments.calibration.budgets --records=runs/demo/records.npz --check

Thresholds come from one half of the texts (or examples) and are judged on the other, over many
random halves. Needs only records: `launch.calibrate` leaves some.
"""

from pathlib import Path

import numpy as np
from absl import flags

from early_exit.calibration import budget as budgets
from early_exit.calibration import plans
from early_exit.calibration.records import Records
from early_exit.report import plots
from early_exit.runs.metrics import table
from early_exit.storage import files
from experiments import bars

RECORDS = flags.DEFINE_string("records", None, "File of records.", required=True)
CONFIDENCE = flags.DEFINE_string("confidence", "max_prob", "Score to threshold.")
COSTS = flags.DEFINE_enum("costs", "blocks", ("blocks", "multiply_adds"), "Unit of the budgets.")
AGAINST = flags.DEFINE_enum("against", "agreement", ("agreement", "label"), "What is good.")
SPLITS = flags.DEFINE_integer("splits", 100, "Random halves.")
PLOT = flags.DEFINE_string("plot", None, "File for the plot, as SVG.")

# Budgets, as shares of the way from the first exit's cost to the last's.
PLACES = (0.2, 0.4, 0.6, 0.8)
# Two halves of n groups, each within 1.36/√n of the truth in 95 of 100 (Kolmogorov): together √2.
MOST_OVER = 1.36 * 2**0.5


def main(argv):
    del argv
    splits = 5 if bars.QUICK.value else SPLITS.value
    records = Records.load(Path(RECORDS.value))
    costs = budgets.costs_of(records, COSTS.value)
    limits = costs[0] + np.array(PLACES) * np.ptp(costs)
    spent = np.zeros((len(limits), len(budgets.METHODS), splits))
    spent_fresh, quality, asked = spent.copy(), spent.copy(), spent[:, 0].copy()
    for split in range(splits):
        known, fresh = records.split(0.5, split)
        risks = 1 - budgets.goodness(known, AGAINST.value).mean(axis=1)
        asked[:, split] = [plans.eero_shares(risks, costs, b)[0] @ costs / b for b in limits]
        for m, method in enumerate(budgets.METHODS):
            found = budgets.sweep(
                known,
                CONFIDENCE.value,
                limits,
                method=method,
                costs=COSTS.value,
                against=AGAINST.value,
            )
            for b, policy in enumerate(found):
                reached = budgets.assess(policy, fresh, COSTS.value, AGAINST.value)
                spent[b, m, split] = policy.provenance["spent"] / limits[b]
                spent_fresh[b, m, split] = reached["spent"] / limits[b]
                quality[b, m, split] = reached["quality"]
    groups = len(np.unique(records.groups))
    print(f"{records.labels.size} positions of {groups} groups, {splits} halvings")
    good = {"agreement": "equal to the full model's", "label": "right"}[AGAINST.value]
    full = budgets.goodness(records, AGAINST.value)
    print(table([("always", *full.mean(axis=1))], header=("exit", *map(str, records.exit_depths))))
    rows = [
        (limits[b], method, *(x[b, m].mean() for x in (spent, spent_fresh, quality)))
        for b in range(len(limits))
        for m, method in enumerate(budgets.METHODS)
    ]
    print(table(rows, header=(COSTS.value, "method", "spent", "spent on new", good)))
    if PLOT.value:
        curves = {
            method: [
                (limits[b] * spent_fresh[b, m].mean(), quality[b, m].mean())
                for b in range(len(limits))
            ]
            for m, method in enumerate(budgets.METHODS)
        }
        files.write_text(Path(PLOT.value), plots.quality_against_cost(curves, COSTS.value, good))
        print(f"plot in {PLOT.value}")
    eero, tight, _, search = range(len(budgets.METHODS))
    over = (spent_fresh - 1) * limits[:, None, None] / np.ptp(costs) * np.sqrt(groups // 2)
    mean = quality.mean(axis=2)
    best = mean[:, :search].max(axis=1)
    error = np.sqrt(best * (1 - best) / (groups // 2))  # of a quality measured on one half
    lost = float(((mean[:, search] - best) / error).min())
    gained = float((mean[:, tight] - mean[:, eero]).min())
    carried_out = float((spent[:, tight] / asked).min())
    bars.conclude(
        {"budgets": limits.tolist(), "spent": spent.mean(axis=2).tolist(), "good": mean.tolist()},
        [
            bars.Bar("eero: over budget × √groups ÷ range, 95 %", _high(over[:, eero]), MOST_OVER),
            bars.Bar("eero_tight: the same", _high(over[:, tight]), MOST_OVER),
            bars.Bar("eero_tight: spent ÷ planned", carried_out, 0.95, True),
            bars.Bar("eero_tight − eero, least", gained, -0.001, True),
            bars.Bar("search − best plan, least, in standard errors", lost, -1, True),
        ],
    )


def _high(over: np.ndarray) -> float:
    """The largest 95 % quantile over splits."""
    return float(np.quantile(over, 0.95, axis=1).max())


if __name__ == "__main__":
    bars.run(main)
