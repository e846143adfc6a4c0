"""Do guarantees hold? Calibrated on a random part of real records, judged on the others.

    python -m experiments.calibration.guarantees --records=runs/records/news.npz --check

A promise is broken where the risk of a policy is above α on the other texts (or examples); each
method may break δ of its promises. The risk on the others is a matter of chance, too, so the risk
over all that the part was drawn from is shown beside it.

A promise under which hardly any leave is vacuous: it is named and counts for no bar, and for each
method there is a bar on the share that leaves at its easiest α.

Beside the methods, on the same parts: ε-accuracy, which promises nothing about new data; and two
controls that are wrong on purpose. `best of many` takes the policy that leaves most among all whose
risk on the part is at most α; `tokens as units` is `ltt` told that tokens of one text were
independent. Needs records of many texts or examples, see `experiments.calibration.record`.
"""

from pathlib import Path
from typing import NamedTuple

import numpy as np
from absl import flags

from early_exit import policy as policies
from early_exit.calibration import certify, risk, thresholds
from early_exit.calibration.records import Records
from early_exit.report import plots
from early_exit.runs.metrics import table
from early_exit.storage import files
from experiments import bars

RECORDS = flags.DEFINE_string("records", None, "File of records.", required=True)
CONFIDENCE = flags.DEFINE_string("confidence", "max_prob", "Score to threshold.")
ALPHAS = flags.DEFINE_list("alphas", ["0.05", "0.1", "0.2"], "Targets.")
DELTA = flags.DEFINE_float("delta", 0.1, "Share of promises that may be broken.")
SPLITS = flags.DEFINE_integer("splits", 500, "Random parts.")
SHARE = flags.DEFINE_float("share", 0.3, "Of a part, in texts or examples.")
DESIGN = flags.DEFINE_float("design", 0.3, "Share of a part on which the path is chosen.")
LEAST = flags.DEFINE_float("least", 0.02, "Share that must leave early, or a promise is vacuous.")
PLOT = flags.DEFINE_string("plot", None, "File for the plot, as SVG.")

EPSILON, BEST, TOKENS = "epsilon", "best of many", "tokens as units"


class Row(NamedTuple):
    """What came of a method at a level: shares of promises, risks, and the share that leaves."""

    method: str
    among: str
    alpha: float
    broken: float
    over_all: float
    risk: float
    but_for_delta: float
    leave_early: float


def judged(
    units: risk.Units, row: np.ndarray, among: str, others_U: np.ndarray
) -> tuple[float, float, float]:
    """(risk over all units, risk over the others, share of all positions that leaves)."""
    scores = units.records.score(CONFIDENCE.value)[:-1]
    exits = policies.first_exit(scores, row)
    wrong = units.losses(exits, staying=0.0)
    leaves = np.ones_like(wrong)
    if among == "leavers":
        leaves -= units.losses(exits, staying=1.0) - wrong

    def over(chosen):
        return float(wrong[chosen].sum() / max(leaves[chosen].sum(), 1e-9))

    return over(slice(None)), over(others_U), float(np.mean(exits < len(scores)))


def compared(part: Records, alphas: list[float], split: int):
    """(whose risk, α, method, thresholds) of everything that is compared."""
    confidence = CONFIDENCE.value
    design, tested = part.split(DESIGN.value, split)
    for among in certify.AMONG:
        rows = certify.path(design, confidence, among)
        options = {"delta": DELTA.value, "among": among, "seed": split}
        for alpha in alphas:
            for method in certify.METHODS:
                policy = certify.fit(
                    tested, rows, confidence, method=method, alpha=alpha, **options
                )
                yield among, alpha, method, policy.thresholds
            if among == "all":
                options_here = options | {"method": "ltt", "unit": "position"}
                policy = certify.fit(tested, rows, confidence, alpha=alpha, **options_here)
                yield among, alpha, TOKENS, policy.thresholds
    rows, risks = risks_found(part, 1.5 * max(alphas))
    for alpha in alphas:
        kept = rows[risks <= alpha]
        never = np.full(rows.shape[1], policies.NEVER)
        yield "all", alpha, BEST, kept[-1] if len(kept) else never
        yield (
            "leavers",
            alpha,
            EPSILON,
            thresholds.fit(part, confidence, 1 - alpha).thresholds,
        )


def risks_found(records: Records, most: float) -> tuple[np.ndarray, np.ndarray]:
    """(rows of thresholds, their risks on the records), from the first to one above `most`."""
    scores = records.score(CONFIDENCE.value)[:-1]
    units = risk.units(records, "disagreement", "group")
    rows, found = certify.path(records, CONFIDENCE.value), []
    rows = rows[np.append(True, (rows[1:] != rows[:-1]).any(axis=1))]
    for row in rows:
        found.append(units.losses(policies.first_exit(scores, row)).mean())
        if found[-1] > most:
            break
    return rows[: len(found)], np.array(found)


def main(argv):
    del argv
    splits = 20 if bars.QUICK.value else SPLITS.value
    records = Records.load(Path(RECORDS.value))
    units, names = risk.units(records, "disagreement", "group"), np.unique(records.groups)
    alphas = [float(alpha) for alpha in ALPHAS.value]
    found: dict[tuple, list] = {}
    for split in range(splits):
        part, others = records.split(SHARE.value, split)
        others_U = np.isin(names, others.groups)
        for among, alpha, method, row in compared(part, alphas, split):
            figures = judged(units, np.asarray(row), among, others_U)
            found.setdefault((among, alpha, method), []).append(figures)
    print(
        f"{records.labels.size} positions of {len(names)} texts or examples, {splits} parts of "
        f"{SHARE.value:.0%}"
    )
    rows, broken = [], {}
    for (among, alpha, method), figures in sorted(found.items()):
        risks, on_others, leaving = np.array(figures).T
        broken[among, alpha, method] = float(np.mean(on_others > alpha))
        shares = broken[among, alpha, method], float(np.mean(risks > alpha))
        reached = risks.mean(), np.quantile(risks, 1 - DELTA.value), leaving.mean()
        rows.append(Row(method, among, alpha, *shares, *map(float, reached)))
    header = ("method", "among", "α", "broken", "over all", "risk", "but for δ", "leave early")
    print(table(rows, header=header))
    if PLOT.value:
        achieved = {
            method: [
                (row.alpha, row.risk, row.but_for_delta)
                for row in rows
                if (row.method, row.among) == (method, "all")
            ]
            for method in (*certify.METHODS, BEST)
        }
        files.write_text(Path(PLOT.value), plots.target_against_achieved(achieved))
        print(f"plot in {PLOT.value}")

    # A promise that nobody makes use of cannot be broken.
    leaving = {(row.method, row.among, row.alpha): row.leave_early for row in rows}
    vacuous = sorted(key for key, share in leaving.items() if share < LEAST.value)
    if vacuous:
        print(f"\nvacuous, for fewer than {LEAST.value:.0%} leave early:")
        print("; ".join(f"{method}, {among}, α = {alpha:g}" for method, among, alpha in vacuous))

    # By chance, the share of broken promises is further above δ in one case in a thousand.
    limit = DELTA.value + 3.1 * float(np.sqrt(DELTA.value * (1 - DELTA.value) / splits))
    kept = []
    for among in certify.AMONG:
        for method in certify.METHODS:
            name = f"{method}, {among}"
            used = [alpha for alpha in alphas if (method, among, alpha) not in vacuous]
            most = max(leaving[method, among, alpha] for alpha in alphas)
            kept.append(bars.Bar(f"{name}: leave early at the easiest α", most, LEAST.value, True))
            if used:
                worst = max(broken[among, alpha, method] for alpha in used)
                told = f"{name}: promises broken, at worst of {len(used)} α"
                kept.append(bars.Bar(told, worst, limit))
    controls = [max(broken["all", alpha, BEST] for alpha in alphas)]
    bars.conclude(
        {
            "broken": [[*key, share] for key, share in broken.items()],
            "leave early": [[*key, share] for key, share in leaving.items()],
        },
        [*kept, bars.Bar(f"{BEST} (control): promises broken", controls[0], 2 * DELTA.value, True)],
    )


if __name__ == "__main__":
    bars.run(main)
