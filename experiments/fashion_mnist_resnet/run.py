"""Do easy images stop early, in seconds? A ResNet with five exits on Fashion-MNIST.

    python -m experiments.fashion_mnist_resnet.run --runs=runs/fashion --check
    python -m experiments.fashion_mnist_resnet.run --runs=runs/fashion --check --layers=32
    python -m experiments.fashion_mnist_resnet.run --data=idx:FOLDER --layers=32 --quick

Trains in that folder what is not there yet. `plain74`, `plain32`, `plain14` and `plain8` are
networks without exits. All go on for some epochs at a lower rate: the first with exits, as
`tandem74`, and all without, as `full74` and so on, which it is compared with. Then a few minutes of
measuring. The policy is chosen on the calibration split; everything is measured on the test split.
"""

from pathlib import Path

import numpy as np
from absl import flags

from configs import fashion_mnist_resnet
from early_exit.settings.read import read
from experiments import bars, classifiers

RUNS = flags.DEFINE_string("runs", None, "Folder of the runs.")
DATA = flags.DEFINE_string("data", fashion_mnist_resnet.DATA, "Where Fashion-MNIST is.")

# Where a network of so many layers gets exits: closer together where an early one skips most.
EXITS = {"74": "1:4:9:16:25", "32": "1:3:6:9:12"}
LAYERS = flags.DEFINE_enum("layers", "74", list(EXITS), "Of the network that gets exits.")
STATIC = (8, 14, 32, 74)

# The policy is chosen to lose half of what it may: the calibration split is but a sample.
POINTS, CHOSEN_POINTS = 0.5, 0.25


def main(argv):
    del argv
    quick = bars.QUICK.value
    folder = Path(RUNS.value or ("runs/fashion_quick" if quick else "runs/fashion"))
    first, more = (1, 1) if quick else (8, 4)

    def trained(name, arg, **tune):
        config = fashion_mnist_resnet.get_config(f"data={DATA.value},{arg}")
        config.tune.update(tune)
        return classifiers.trained(read(config), folder / name)

    def without_exits(layers):
        trained(f"plain{layers}", f"layers={layers},points=,epochs={first}")
        source = f"source={folder}/plain{layers}"
        # These go on at a quarter of their first rate, those with exits at half of it.
        return trained(f"full{layers}", f"{source},points=,epochs={more}", backbone_rate=0.25)

    largest = LAYERS.value
    static = [without_exits(layers) for layers in STATIC if layers <= int(largest)]
    source = f"source={folder}/plain{largest}"
    tandem = trained(f"tandem{largest}", f"{source},points={EXITS[largest]},epochs={more}")
    policy = classifiers.chosen(tandem, CHOSEN_POINTS, classifiers.by_budget)
    results = classifiers.measured(tandem, policy, static, classifiers.by_budget)

    of = results["classification"]
    (full, _), (*smaller, same) = of["rows"], of["static"]
    curve = sorted([*of["curve"], full], key=lambda row: row["multiply_adds"])
    adds, accuracies = ([row[name] for row in curve] for name in ("multiply_adds", "accuracy"))

    def above(row):
        there = np.interp(row["multiply_adds"], adds, accuracies)
        return float(100 * (there - row["accuracy"]))

    lost = 100 * (same["accuracy"] - full["accuracy"])
    bars.conclude(
        {name: results[name] for name in ("exits", "parts", "classification", "machine")},
        [
            bars.Bar("points below the same network without exits", lost, 0.3),
            *classifiers.policy_bars(results, points=POINTS, latency=0.5, size=256, throughput=1.7),
            *(
                bars.Bar(f"points above {row['policy']}, at its cost", above(row), 0, at_least=True)
                for row in smaller
            ),
        ],
    )


if __name__ == "__main__":
    bars.run(main)
