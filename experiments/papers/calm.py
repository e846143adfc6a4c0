"""Quality against depth by CALM's confidences, on given text and in lossy decoding.

    python -m launch.tune --config=configs/smollm2_135m.py:gate=True --workdir=runs/gate
    python -m experiments.calibration.record --workdir=runs/gate --out=runs/records/gate.npz
    python -m experiments.papers.calm --records=runs/records/gate.npz --workdir=runs/gate \\
        --answers=runs/said_gate.json --check

Schuster et al. 2022 (§3.5) ask when a token may leave: by the softmax, here the `margin` of the
two most probable tokens; by how little the hidden state still changes (`similarity`); or by a
learned classifier (`gate`), which the records have if the run has gates. They have one threshold
for all exits; beside it, the best for each exit that can be found (`calibration.search`).
Thresholds for a mean depth come from one half of the texts, and quality, the share of tokens that
are the full model's, from the other.

With --workdir, the same thresholds in lossy decoding, where what a token skips gets keys and values
projected from the state that it left with: the full model's own answers are judged token by token
(`evaluation.scoring`), with the full model's keys and values and with those.
"""

import itertools
from pathlib import Path

import numpy as np
from absl import flags

from early_exit import policy as policies
from early_exit.calibration import budget as budgets
from early_exit.calibration.records import Records
from early_exit.decoding.mode import LOSSY
from early_exit.evaluation import scoring
from early_exit.report import plots
from early_exit.runs import assemble, progress
from early_exit.runs.metrics import table
from early_exit.storage import files
from experiments import bars, figures
from experiments.papers.measures import one_threshold, oracle_depth, same
from experiments.token_difficulty import samples

RECORDS = flags.DEFINE_string("records", None, "File of records.", required=True)
WORKDIR = flags.DEFINE_string("workdir", None, "Folder of the run that they are of.")
ANSWERS = flags.DEFINE_string("answers", None, "File for its answers; read if it is there.")
TEXTS = flags.DEFINE_integer("texts", 16, "Answers that are judged.", lower_bound=2)
NEW = flags.DEFINE_integer("new_tokens", 48, "Tokens of each, at most.", lower_bound=2)
SPLITS = flags.DEFINE_integer("splits", 10, "Random halves.", lower_bound=2)
PLOT = flags.DEFINE_string("plot", None, "File for the plot of one threshold, as SVG.")

SCORES = ("margin", "max_prob", "entropy", "similarity", "gate")
# Mean depths, as shares of all blocks.
DEPTHS = (0.95, 0.9, 0.8, 0.7, 0.6)
DECODED = DEPTHS[:3]
ONE, EACH = RECIPES = ("one", "each its own")
# Texts that run together.
BATCH = 8


def main(argv):
    del argv
    splits, draws = (2, 20) if bars.QUICK.value else (SPLITS.value, 200)
    records = Records.load(Path(RECORDS.value))
    groups = np.unique(records.groups).size
    print(f"{records.labels.size} positions of {groups} texts, {splits} halvings\n")
    scores = [name for name in SCORES if name in records.scores]
    depth = oracle_depth(records)
    print(f"if each left at the first exit that agrees: all equal, at a depth of {depth:.3f}\n")
    found = np.array(
        [
            _split(records, scores, split, draws)
            for split in progress.counted(range(splits), "finding thresholds", "halvings")
        ]
    )
    spent, mean, low, high = found.mean(axis=0)  # of a figure [D, R, S]
    rows = [
        (DEPTHS[d], RECIPES[r], scores[s], *(x[d, r, s] for x in (spent, mean, low, high)))
        for d, r, s in np.ndindex(mean.shape)
    ]
    header = ("depth", "thresholds", "by", "depth on new", "= full", "from", "to (95 %)")
    print(table(rows, header=header))
    if PLOT.value:
        curves = {
            name: list(zip(spent[:, 0, s], mean[:, 0, s], strict=True))
            for s, name in enumerate(scores)
        }
        drawn = plots.quality_against_cost(curves, "depth ÷ all blocks", "equal to full")
        files.write_text(Path(PLOT.value), drawn)
        print(f"plot in {PLOT.value}")
    decoded = _decoded(records, scores) if WORKDIR.value else []
    softmax, saturation = scores.index("margin"), scores.index("similarity")
    apart = (low[..., softmax] - high[..., saturation]).min(axis=0)  # of a recipe
    bars.conclude(
        {"oracle": depth, "rows": rows, "decoded": decoded},
        [
            bars.Bar(f"margin − similarity, {recipe}, least by intervals", float(gap), 0.0, True)
            for recipe, gap in zip(RECIPES, apart, strict=True)
        ],
    )


def _thresholds(known: Records, recipe: str, name: str) -> list[np.ndarray]:
    """Thresholds [E] for each of `DEPTHS`; the first exit is the least that one can take."""
    depths = known.exit_depths
    limits = [max(share * depths[-1], depths[0]) for share in DEPTHS]
    if recipe == ONE:
        scores = known.score(name)[:-1]
        return [np.full(len(scores), one_threshold(scores, depths, limit)) for limit in limits]
    found = budgets.sweep(known, name, limits, costs="blocks")  # from the lowest budget up
    return [np.asarray(policy.thresholds) for policy in reversed(found)]


def _split(records: Records, scores: list[str], split: int, draws: int) -> np.ndarray:
    """(depth on new texts, quality there, where its interval begins and ends) [4, D, R, S]."""
    known, fresh = records.split(0.5, split)
    agree, depths = same(fresh), fresh.exit_depths / fresh.exit_depths[-1]
    equal = np.zeros((len(DEPTHS), len(RECIPES), len(scores), fresh.labels.size))
    spent = np.zeros(equal.shape[:-1])
    for (r, recipe), (s, name) in itertools.product(enumerate(RECIPES), enumerate(scores)):
        for d, row in enumerate(_thresholds(known, recipe, name)):
            exits = policies.first_exit(fresh.score(name)[:-1], row)
            equal[d, r, s] = agree[exits, np.arange(len(exits))]
            spent[d, r, s] = depths[exits].mean()
    flat = equal.reshape(-1, fresh.labels.size)
    of = figures.intervals(lambda chosen: flat[:, chosen].mean(axis=1), fresh.groups, draws)
    return np.array([spent, *(x.reshape(spent.shape) for x in of)])


def _decoded(records: Records, scores: list[str]) -> list[tuple]:
    """(depth, score, depth and quality by the full model's keys and values, the same in lossy)."""
    tuned = assemble.load_tuned(Path(WORKDIR.value))
    texts, new = (4, 6) if bars.QUICK.value else (TEXTS.value, NEW.value)
    sizes = samples.Sizes(range(1), texts, new, BATCH)
    (said,) = samples.answered(tuned, sizes, ANSWERS.value and Path(ANSWERS.value))
    pairs = [(text.ids[: text.begin], text.ids[text.begin :]) for text in said]
    depths, rows = records.exit_depths / records.exit_depths[-1], []
    asked = list(itertools.product(scores, zip(DECODED, range(len(DECODED)), strict=True)))
    for name, (share, d) in progress.counted(asked, "judging answers", "policies"):
        policy = policies.make(_thresholds(records, ONE, name)[d], name)
        row = [share, name]
        for mode in (None, LOSSY):
            found = scoring.score(
                tuned.model, tuned.params, pairs, policy=policy, mode=mode, batch=BATCH
            )
            # The first token comes out of the prompt's pass.
            exits = np.concatenate([x.exits[1:] for x in found])
            row += [depths[exits].mean(), np.concatenate([x.chosen[1:] for x in found]).mean()]
        rows.append(tuple(row))
    rows.sort(key=lambda row: (-row[0], scores.index(row[1])))
    tokens = sum(len(answer) - 1 for _, answer in pairs)
    print(f"\n{tokens} tokens of the full model's answers, one threshold:")
    columns = ("depth, own keys and values", "= full", "depth, lossy", "= full")
    print(table(rows, header=("depth", "by", *columns)))
    return rows


if __name__ == "__main__":
    bars.run(main)
