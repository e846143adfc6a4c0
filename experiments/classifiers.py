"""What the studies of classifiers share: runs trained once, a policy, and the bars on it.

The one idea: training takes long and is done only where it is missing; what is measured is measured
anew, in minutes, as often as wanted.
"""

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
from absl import flags

from early_exit.calibration import budget, methods
from early_exit.calibration.records import Records
from early_exit.evaluation import run, run_classifier
from early_exit.evaluation.classifiers import by_epsilon
from early_exit.policy import ExitPolicy
from early_exit.report import plots
from early_exit.runs import assemble, checkpoint, layout
from early_exit.runs.assemble import Tuned
from early_exit.runs.metrics import table
from early_exit.settings.read import changed
from early_exit.settings.sections import Settings
from early_exit.storage import files
from early_exit.training.loop import tune
from experiments import bars

ROUNDS = flags.DEFINE_integer("rounds", None, "Rounds of timing; the config's if absent.")
PLOT = flags.DEFINE_string("plot", None, "File for the plot of accuracy against cost, as SVG.")

CHOSEN = "chosen"
STEP = 0.25  # blocks, from budget to budget

# Policies by growing cost, fitted on records for a confidence.
Family = Callable[[Records, str], Iterator[ExitPolicy]]


def trained(config: Settings, folder: Path) -> Tuned:
    """The run in that folder, trained to its end first if it is not."""
    if checkpoint.latest_step(folder / layout.CHECKPOINTS) != config.tune.steps:
        print(f"training {folder}: {config.tune.steps} steps", flush=True)
        tune(config, folder)
    return assemble.load_tuned(folder, config)


def by_budget(records: Records, confidence: str) -> Iterator[ExitPolicy]:
    """The most accurate policies for a mean number of blocks, the cheapest first."""
    first, *_, last = records.exit_depths
    for blocks in np.arange(first, last + STEP, STEP):
        yield budget.fit(records, confidence, blocks, costs="blocks", against="label")


def chosen(tuned: Tuned, points: float, family: Family = by_epsilon) -> ExitPolicy:
    """The first of the policies that is at most so many points less accurate than the full model.

    They are fitted and chosen on the calibration split: what is measured afterwards has not been
    looked at.
    """
    records, confidence = run.records_of(tuned), tuned.config.calibrate.confidence
    for policy in family(records, confidence):
        exits = policy.exit_index(records.score(confidence), records.exit_depths)
        right = records.correct[exits, np.arange(len(exits))]
        lost = 100 * (records.correct[-1].mean() - right.mean())
        found = f"{methods.described(policy)}, {lost:.2f} points lost on the calibration split"
        if lost <= points:
            break
    print(f"chosen: {found}\n")
    return policy


def measured(
    tuned: Tuned,
    policy: ExitPolicy,
    baselines: Sequence[Tuned] = (),
    family: Family = by_epsilon,
) -> dict:
    """`run_classifier.measure` of the policy, printed and, where that is asked for, plotted.

    Args:
      family: what the curve goes through.
    """
    if ROUNDS.value or bars.QUICK.value:
        config = changed(tuned.config, {"evaluate.rounds": ROUNDS.value or 1})
        tuned = dataclasses.replace(tuned, config=config)
    curve = family(run.records_of(tuned), policy.confidence)
    results = run_classifier.measure(tuned, {CHOSEN: policy}, baselines, curve)
    print("\n\n".join(run_classifier.tables(results)))
    print("\n" + _intervals(results))
    if PLOT.value:
        of = results["classification"]
        plot = plots.accuracy_against_cost(of["rows"], of["static"], of["curve"])
        files.write_text(Path(PLOT.value), plot + "\n")
        print(f"\nplot in {PLOT.value}")
    return results


def _intervals(results: dict) -> str:
    """How well so many examples tell each accuracy; of one seed and one split."""
    of, count = results["classification"], results["data"]["count"]
    rows = [
        (
            row["policy"],
            row["accuracy"],
            *bars.share_interval(round(row["accuracy"] * count), count),
        )
        for row in (*of["rows"], *of["static"])
    ]
    header = ("policy", f"accuracy on {count}", "from", "to (95 %)")
    return table(rows, header=header)


def policy_bars(
    results: dict, *, points: float, latency: float, size: int, throughput: float
) -> list[bars.Bar]:
    """That the chosen policy loses few points of accuracy, and what it must gain for them."""
    full, row = results["classification"]["rows"]
    lost = 100 * (full["accuracy"] - row["accuracy"])
    gained = row["throughput_ratio"][str(size)]
    return [
        bars.Bar("points below the full model", lost, points),
        bars.Bar("mean latency at batch 1 ÷ full", row["latency_ratio"], latency),
        bars.Bar(f"throughput at batch {size} ÷ full", gained, throughput, at_least=True),
    ]
