"""Measures what the exits are worth: how good each is, and what leaving there saves on the clock.

    python -m launch.evaluate --workdir=runs/smollm2
    python -m launch.evaluate --workdir=runs/fashion --baseline=runs/fashion8,runs/fashion14

A language model's decoding, in every mode, or a classifier's answers: the run's own policy, and one
for each of evaluate.epsilons, beside the full model. The baselines are runs of smaller classifiers
without exits. Writes evaluation.json, from which `launch.report` makes a page.
"""

from absl import flags

from early_exit.evaluation import run_classifier, run_decoder
from early_exit.storage import buckets
from launch import common, on_mesh

BASELINE = flags.DEFINE_list(
    "baseline", [], "Folders of runs of networks without exits, to measure beside a classifier."
)

flags.adopt_module_key_flags(on_mesh)  # what --help lists


def main(argv):
    on_mesh.begin(argv)
    common.own(common.workdir())
    common.tell_devices()
    tuned = on_mesh.load_tuned()
    if tuned.model.config.classifies:
        results = run_classifier.evaluate(
            tuned, [buckets.place(folder) for folder in BASELINE.value]
        )
        print("\n\n".join(run_classifier.tables(results)))
        return
    if BASELINE.value:
        raise ValueError("--baseline is for classifiers; this is a language model")
    print("\n\n".join(run_decoder.tables(run_decoder.evaluate(tuned))))


if __name__ == "__main__":
    common.run(main)
