"""Measures what the exits are worth: how good each is, and what leaving there saves on the clock.

    python -m launch.evaluate --workdir=runs/smollm2
    python -m launch.evaluate --workdir=runs/fashion --baseline=runs/fashion8,runs/fashion14

A language model's decoding, or a classifier's answers, beside the full model; the baselines are
runs of smaller classifiers without exits. Writes evaluation.json, from which `launch.report` makes
a page.
"""

from pathlib import Path

from absl import flags

from early_exit.evaluation import run, run_classifier
from early_exit.runs import assemble
from early_exit.runs.metrics import table
from launch import common

BASELINE = flags.DEFINE_list(
    "baseline", [], "Folders of runs of networks without exits, to measure beside a classifier."
)


def main(argv):
    common.no_arguments(argv)
    common.own(common.workdir())
    common.tell_devices()
    tuned = assemble.load_tuned(common.workdir(), common.settings())
    if tuned.model.config.classifies:
        results = run_classifier.evaluate(tuned, [Path(folder) for folder in BASELINE.value])
        print("\n\n".join(run_classifier.tables(results)))
        return
    if BASELINE.value:
        raise ValueError("--baseline is for classifiers; this is a language model")
    results = run.evaluate(tuned)
    print("Exits on held-out text, a position being a next token to predict:")
    print(
        table(
            [
                (row["exit"], row["loss"], row["agreement"], row["coverage"])
                for row in results["exits"]
            ],
            header=("exit", "loss", "agreement", "coverage at 95 %"),
        )
    )
    print(f"\nDecoding, batch 1, {results['prompts']} prompts × {results['new_tokens']} tokens:")
    print(
        table(
            [
                (
                    row["policy"],
                    row["tokens_per_second"],
                    row["speedup"],
                    row["agreement"],
                    row["mean_depth"],
                )
                for row in results["decoding"]
            ],
            header=("policy", "tokens/s", "speed-up", "equal to full", "mean depth"),
        )
    )


if __name__ == "__main__":
    common.run(main)
