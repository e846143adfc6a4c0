"""Measures what the exits are worth: agreement per exit, and decoding speed beside the full model.

    python -m launch.evaluate --workdir=runs/smollm2

Writes evaluation.json, from which `launch.report` makes a page.
"""

from early_exit import assemble
from early_exit.evaluation import run
from early_exit.metrics import table
from launch import common


def main(argv):
    common.no_arguments(argv)
    results = run.evaluate(assemble.load_tuned(common.workdir(), common.CONFIG.value))
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
