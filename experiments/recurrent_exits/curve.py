"""How good a recurrent exit becomes with the tokens that it is tuned on: curves of several runs.

    python -m experiments.recurrent_exits.curve --run=runs/recurrent --run=runs/one_tap

Reads what the runs' validations have said. Behind each curve stands a power law, 1 − agreement =
a · tokens^(−b), fitted to the validations after the warm-up, and what it says for 64 million tokens
(those of the best published head of this kind): an extrapolation, no measurement.
"""

from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
from absl import flags

from early_exit.runs import layout
from early_exit.runs.metrics import read_metrics, table
from experiments import bars

RUNS = flags.DEFINE_multi_string("run", None, "Folders of runs.", required=True)
PLOT = flags.DEFINE_string("plot", None, "File for the plot, as SVG or PNG.")

FAR = 64_000_000


def main(argv):
    del argv
    rows, far, curves = [], [], {}
    for folder in map(Path, RUNS.value):
        tokens, agreement, gained = curve(folder)
        curves[folder.name] = tokens, agreement
        for i, seen in enumerate(tokens):
            steps = [float(agreement[i, step]) for step in (0, 1, 2, 6)]
            rows.append((folder.name, f"{seen / 1e6:.2f}", *steps, float(gained[i])))
        if len(tokens) > 2:
            a, b = power_law(tokens, 1 - agreement[:, 0])
            far.append((folder.name, a, b, 1 - a * FAR**-b))
    steps = [f"draft {step}" for step in (1, 2, 3, 7)]
    print(table(rows, header=("run", "M tokens", *steps, "tokens a pass of 8")))
    print("\n" + table(far, header=("run", "a", "b", f"draft 1 at {FAR // 10**6}M")))
    if PLOT.value:
        _plot(curves, Path(PLOT.value))
    best = max(row[2] for row in rows)
    bars.conclude(
        {"rows": rows, "extrapolated": far},
        [bars.Bar("agreement of the first draft, best run", best, 0.6, True)],
    )


def curve(folder: Path) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Of a run's validations: tokens seen [n], agreement [n, K], tokens a pass of all K [n]."""
    settings = layout.load_config(folder)
    per_step = settings.data.batch_size * settings.data.sequence_length
    found: dict[int, dict[int, tuple[float, float]]] = {}
    for row in read_metrics(folder):
        for name, draft in row.items():
            if name.startswith("validation/draft/"):
                said = (row[f"validation/{of}/draft_{draft}"] for of in ("agreement", "tokens"))
                found.setdefault(row["step"], {})[int(draft)] = tuple(said)
    if not found:
        raise ValueError(f"{folder} has no validation of a recurrent exit")
    steps = sorted(found)
    said = np.array([[found[step][k] for k in sorted(found[step])] for step in steps])
    return np.array(steps) * per_step, said[:, :, 0], said[:, -1, 1]


def power_law(x: np.ndarray, y: np.ndarray) -> tuple[float, float]:
    """(a, b) of y = a · x^(−b), by least squares of the logarithms."""
    slope, start = np.polyfit(np.log(x), np.log(y), 1)
    return float(np.exp(start)), float(-slope)


def _plot(curves: dict, path: Path) -> None:
    figure, axes = plt.subplots(figsize=(6, 3.4), layout="constrained")
    for name, (tokens, agreement) in curves.items():
        axes.plot(tokens, agreement[:, 0], marker="o", markersize=3, label=f"{name}, draft 1")
        axes.plot(tokens, agreement[:, -1], linestyle=":", label=f"{name}, draft 7")
    axes.set_xscale("log")
    axes.set_xlabel("tokens seen in tuning")
    axes.set_ylabel("agreement with the full model")
    axes.legend(fontsize=7, frameon=False)
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path)
    print(f"plot in {path}")


if __name__ == "__main__":
    bars.run(main)
