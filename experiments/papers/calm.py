"""Quality against depth by CALM's confidences, one threshold for all exits.

    python -m launch.tune --config=configs/smollm2_135m.py:gate=True --workdir=runs/gate
    python -m experiments.calibration.record --workdir=runs/gate --out=runs/records/gate.npz
    python -m experiments.papers.calm --records=runs/records/gate.npz --check

Schuster et al. 2022 (§3.5) ask when a token may leave: by the softmax, here the `margin` of the
two most probable tokens; by how little the hidden state still changes (`similarity`); or by a
learned classifier (`gate`), which the records have if the run has gates. The threshold for a mean
depth comes from one half of the texts, and quality, the share of tokens that are the full model's,
from the other. Beside them the oracle: each token leaves at the first exit that says what the full
model says.
"""

from pathlib import Path

import numpy as np
from absl import flags

from early_exit import policy as policies
from early_exit.calibration.records import Records
from early_exit.report import plots
from early_exit.runs.metrics import table
from early_exit.storage import files
from experiments import bars, figures
from experiments.papers.measures import one_threshold, oracle_depth, same

RECORDS = flags.DEFINE_string("records", None, "File of records.", required=True)
SPLITS = flags.DEFINE_integer("splits", 20, "Random halves.", lower_bound=2)
PLOT = flags.DEFINE_string("plot", None, "File for the plot, as SVG.")

SCORES = ("margin", "max_prob", "entropy", "similarity", "gate")
# Mean depths, as shares of all blocks.
DEPTHS = (0.95, 0.9, 0.8, 0.7, 0.6)


def main(argv):
    del argv
    splits, draws = (2, 20) if bars.QUICK.value else (SPLITS.value, 200)
    records = Records.load(Path(RECORDS.value))
    groups = np.unique(records.groups).size
    print(f"{records.labels.size} positions of {groups} texts, {splits} halvings\n")
    scores = [name for name in SCORES if name in records.scores]
    depth = oracle_depth(records)
    print(f"the oracle: all tokens the full model's, at a depth of {depth:.3f}\n")
    found = np.array([_split(records, scores, split, draws) for split in range(splits)])
    mean, low, high, spent = found.mean(axis=0)  # [of a figure][D, S]
    rows = [
        (share, name, spent[d, s], mean[d, s], low[d, s], high[d, s])
        for d, share in enumerate(DEPTHS)
        for s, name in enumerate(scores)
    ]
    header = ("depth", "by", "depth on new", "full model's", "from", "to (95 %)")
    print(table(rows, header=header))
    if PLOT.value:
        curves = {
            name: list(zip(spent[:, s], mean[:, s], strict=True)) for s, name in enumerate(scores)
        }
        drawn = plots.quality_against_cost(
            curves, "depth ÷ all blocks", "equal to the full model's"
        )
        files.write_text(Path(PLOT.value), drawn)
        print(f"plot in {PLOT.value}")
    softmax, saturation = scores.index("margin"), scores.index("similarity")
    bars.conclude(
        {"oracle": depth, "rows": rows},
        [
            bars.Bar(
                "margin − similarity, least over depths",
                float((mean[:, softmax] - mean[:, saturation]).min()),
                0.0,
                True,
            )
        ],
    )


def _split(records: Records, scores: list[str], split: int, draws: int) -> np.ndarray:
    """(quality on new texts, where its interval begins and ends, depth there) [4, D, S]."""
    known, fresh = records.split(0.5, split)
    depths = records.exit_depths / records.exit_depths[-1]
    agree = same(fresh)
    alike, spent = [], []
    for share in DEPTHS:
        for name in scores:
            limit = max(share, depths[0])
            threshold = one_threshold(known.score(name)[:-1], depths, limit)
            exits = policies.first_exit(fresh.score(name)[:-1], [threshold] * (len(depths) - 1))
            alike.append(agree[exits, np.arange(len(exits))])
            spent.append(depths[exits].mean())
    alike = np.array(alike, np.float64)
    of = figures.intervals(lambda chosen: alike[:, chosen].mean(axis=1), fresh.groups, draws)
    return np.array([*of, spent]).reshape(4, len(DEPTHS), len(scores))


if __name__ == "__main__":
    bars.run(main)
