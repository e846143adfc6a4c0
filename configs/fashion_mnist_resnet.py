"""A CIFAR-style ResNet with exits on Fashion-MNIST (Xiao et al. 2017), trained from scratch.

    python -m launch.tune --config=configs/fashion_mnist_resnet.py:points= --workdir=runs/plain
    python -m launch.tune --config=configs/fashion_mnist_resnet.py:source=runs/plain,epochs=4 \
        --workdir=runs/fashion

The first trains a ResNet-32 without exits, the second goes on with it and five exits jointly:
with exits from the first step on, a network so narrow ends lower (`experiments`). `layers=14`
makes a smaller one, `train=exits,source=runs/…` tunes exits behind a network and leaves it as it
is. The data comes through TensorFlow Datasets (`tfds:fashion_mnist`) or, as `data=idx:FOLDER`, from
the original files; Debian has them in the package dataset-fashion-mnist.
"""

from early_exit.settings.overrides import ConfigDict, over, parse_arg
from early_exit.settings.read import defaults

DATA = "tfds:fashion_mnist"


def get_config(arg: str | None = None) -> ConfigDict:
    arg = parse_arg(
        arg,
        data=DATA,
        train="all",
        source="",
        layers=32,
        width=8,
        points=(1, 3, 6, 9, 12),
        head="grid",
        loss="cross_entropy",
        gate=False,
        cascade=False,
        ensemble=False,
        epochs=8,
        runlocal=False,
    )
    own = ("data", "runlocal")
    config = settings(**{name: value for name, value in arg.items() if name not in own})
    config.data.source = arg.data
    if arg.runlocal:
        config.tune.steps, config.tune.warmup_steps = 4, 1
    return config


def settings(
    *, train, source, layers, width, points, head, loss, gate, cascade, ensemble, epochs=8
) -> ConfigDict:
    """Of a run on images; `configs/digits_resnet.py` has its own data and lengths."""
    batch_size = 128
    steps = epochs * 54_000 // batch_size  # 90 % of the 60,000 are for training
    new = {
        "family": "resnet_cifar",
        "layers": layers,
        "width": width,
        "channels": 1,
        "num_classes": 10,
    }
    return defaults(
        model={"source": source, "new": {} if source else new},
        exits={
            "points": points,
            "head": head,
            "gate": gate,
            "cascade": cascade,
            "ensemble": ensemble,
            "init": "random",
        },
        data={
            "source": DATA,
            "mean": (0.286,),
            "std": (0.353,),
            "augment": "crop_flip",
            "batch_size": batch_size,
        },
        tune={
            "train": train,
            "loss": loss,
            # Half the final exit's: it is the one to keep. Heads learn as fast in any case, for
            # AdamW takes no notice of scale.
            "weights": (0.5,) * len(points),
            "steps": steps,
            "learning_rate": 4e-3,
            "backbone_rate": 0.5 if source else 1.0,
            "warmup_steps": min(200, steps - 1),
            "final_fraction": 0.002,
            "weight_decay": 0.05,
            "clip_norm": 5.0,
            "checkpoint_every": 420,
            "validate_every": 840,
            "validation_batches": 20,
        },
        calibrate={"epsilon": 0.99, "batches": 25},
        evaluate={
            "batches": 79,  # of the test split: all of it
            "epsilons": (0.97, 0.98, 0.99, 0.995),
            "rounds": 5,
            "singles": 200,
            "rows": 2048,
            "sizes": (64, 256),
            "examples": 12,
        },
    )


def sweep(add) -> None:
    """The smaller networks that early exits are compared with, each without exits."""
    for run in over("model.new.layers", (8, 14, 20, 26, 32)):
        add(**run, **{"exits.points": (), "tune.weights": ()})
