"""SmolLM2-135M trained on with LayerSkip's recipe (Elhoushi et al. 2024).

    python -m launch.tune --config=configs/smollm2_layerskip.py --workdir=runs/layerskip

Exits after every block share the model's output matrix, and each has a norm of its own. The
backbone is trained with them: deep blocks are often left out, and an exit in eight takes its turn
at each step. `curriculum=gradual` lets them join one by one, from the last, until half of the run.
"""

from configs import smollm2_135m
from early_exit.settings.overrides import ConfigDict, override, parse_arg
from early_exit.training.schedule import layerskip_weights

DEPTH = 30


def get_config(arg: str | None = None) -> ConfigDict:
    arg = parse_arg(
        arg,
        points=tuple(range(1, DEPTH)),
        curriculum="rotational",
        layer_dropout=0.1,
        exit_scale=0.2,
        runlocal=False,
    )
    config = smollm2_135m.get_config("runlocal" if arg.runlocal else None)
    exits = max(len(arg.points), 1)
    gradual = max(config.tune.steps // (2 * exits), 1)
    return override(
        config,
        {
            "exits.points": arg.points,
            "exits.head": "norm",
            "exits.output": "shared",
            "exits.classes": 0,
            "tune.train": "all",
            "tune.loss": "cross_entropy",
            "tune.weights": layerskip_weights(arg.points, DEPTH, arg.exit_scale),
            "tune.curriculum": arg.curriculum,
            "tune.curriculum_period": gradual if arg.curriculum == "gradual" else 8,
            "tune.layer_dropout": arg.layer_dropout,
            "tune.learning_rate": 3e-4,
            "tune.backbone_rate": 0.1,
            "model.scan": True,
            "model.remat": "block",
        },
    )
