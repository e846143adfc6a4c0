"""Stated bars: what a study claims, as figures that a command can find wanting."""

import dataclasses
import math
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from absl import app, flags
from absl import logging as absl_logging
from scipy import special

from early_exit.runs.metrics import table
from early_exit.storage import files

CHECK = flags.DEFINE_bool("check", False, "Exit 1 and name the bars that fall short.")
QUICK = flags.DEFINE_bool("quick", False, "A small version: less exact, quick.")
OUT = flags.DEFINE_string("out", None, "File for the figures, as JSON.")


@dataclasses.dataclass(frozen=True)
class Bar:
    """A figure that should be at most (or at least) a limit."""

    name: str
    figure: float
    limit: float
    at_least: bool = False

    @property
    def kept(self) -> bool:
        """NaN keeps no bar."""
        return bool(self.figure >= self.limit if self.at_least else self.figure <= self.limit)


def share_interval(successes: int, trials: int, confidence: float = 0.95) -> tuple[float, float]:
    """(low, high) of a share, such as an accuracy, by how many it was counted on.

    Clopper and Pearson 1934: it holds the true share with at least this probability.
    """
    tail, failures = (1 - confidence) / 2, trials - successes
    low = special.betaincinv(successes, failures + 1, tail) if successes else 0.0
    high = special.betaincinv(successes + 1, failures, 1 - tail) if failures else 1.0
    return float(low), float(high)


def mean_interval(values: Sequence[float], confidence: float = 0.95) -> tuple[float, float]:
    """(mean, half-width of its interval) over a few runs, by Student's t; NaN wide for one run."""
    values = np.asarray(values, np.float64)
    if len(values) < 2:
        return float(values.mean()), math.nan
    t = special.stdtrit(len(values) - 1, (1 + confidence) / 2)
    return float(values.mean()), float(t * values.std(ddof=1) / np.sqrt(len(values)))


def run(main) -> None:
    """Runs an absl main without the libraries' own messages."""
    absl_logging.set_verbosity(absl_logging.WARNING)
    app.run(main)


def conclude(figures: dict, bars: Sequence[Bar]) -> None:
    """Prints the bars, writes the figures if asked, and with --check exits 1 if any falls short."""
    rows = [
        (
            bar.name,
            bar.figure,
            f"{'≥' if bar.at_least else '≤'} {bar.limit:g}",
            "kept" if bar.kept else "FALLS SHORT",
        )
        for bar in bars
    ]
    print("\n" + table(rows, header=("bar", "figure", "limit", "")))
    if OUT.value:
        path = Path(OUT.value)
        path.parent.mkdir(parents=True, exist_ok=True)
        bar_rows = [dataclasses.asdict(bar) | {"kept": bar.kept} for bar in bars]
        files.write_json(path, {"figures": figures, "bars": bar_rows})
        print(f"figures in {path}")
    short = [f"{bar.name}: {bar.figure:.3f}" for bar in bars if not bar.kept]
    if CHECK.value and short:
        sys.exit("fall short: " + "; ".join(short))
