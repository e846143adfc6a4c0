"""A small ResNet on scikit-learn's digits: all that a classifier goes through, in a minute.

    python -m launch.tune --config=configs/digits_resnet.py --workdir=runs/digits
    python -m launch.tune --config=configs/digits_resnet.py:train=exits,source=runs/digits \
        --workdir=runs/digits_frozen

The first trains exits jointly with the network; the second tunes new ones behind it.
"""

from configs import fashion_mnist_resnet
from early_exit.settings.overrides import ConfigDict, override, parse_arg


def get_config(arg: str | None = None) -> ConfigDict:
    arg = parse_arg(
        arg,
        train="all",
        source="",
        points=(1, 2),
        head="mlp",
        loss="cross_entropy",
        gate=False,
        cascade=False,
        ensemble=False,
        layers=8,
        width=8,
    )
    settings = {name: value for name, value in arg.items() if name not in ("layers", "width")}
    config = fashion_mnist_resnet.settings(**settings, layers=arg.layers, width=arg.width)
    return override(
        config,
        {
            "data.source": "digits",
            "data.mean": (0.3,),
            "data.std": (0.38,),
            "data.augment": "crop",
            "data.batch_size": 64,
            "tune.steps": 240,
            "tune.warmup_steps": 20,
            "tune.checkpoint_every": 60,
            "tune.validate_every": 120,
            "tune.validation_batches": 3,
            "calibrate.batches": 3,
            "evaluate.epsilons": (0.95, 0.98),
            "evaluate.rounds": 2,
            "evaluate.singles": 40,
            "evaluate.rows": 128,
            "evaluate.sizes": (64,),
        },
    )
