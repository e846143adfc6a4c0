"""Do easy articles stop early, in seconds? MiniLM with an exit after every block, on BBC News.

    python -m experiments.news_minilm.run --runs=runs/news --check
    python -m experiments.news_minilm.run --quick

Trains in that folder what is not there yet: `tandem`, MiniLM and its exits together. Then a few
minutes of measuring. The policy is chosen on the calibration split; everything is measured on the
test split.
"""

from pathlib import Path

from absl import flags

from configs import news_minilm
from early_exit.settings.read import read
from experiments import bars, classifiers

RUNS = flags.DEFINE_string("runs", None, "Folder of the runs.")

# The policy is chosen to lose half of what it may: the calibration split is but a sample.
POINTS, CHOSEN_POINTS = 1.0, 0.5


def main(argv):
    del argv
    quick = bars.QUICK.value
    folder = Path(RUNS.value or ("runs/news_quick" if quick else "runs/news"))
    config = read(news_minilm.get_config("runlocal" if quick else None))
    tandem = classifiers.trained(config, folder / "tandem")
    results = classifiers.measured(tandem, classifiers.chosen(tandem, CHOSEN_POINTS))
    bars.conclude(
        {name: results[name] for name in ("exits", "parts", "classification", "machine")},
        classifiers.policy_bars(results, points=POINTS, latency=0.6, size=64, throughput=1.5),
    )


if __name__ == "__main__":
    bars.run(main)
