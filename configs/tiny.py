"""A random Llama of six small blocks: every command in seconds, to try them or to test them.

    python -m launch.tune --config=configs/tiny.py --workdir=runs/tiny
    python -m launch.sweep --config=configs/tiny.py --workdir=runs/tiny_sweep

Run from the root of the repository: the weights are a fixture of the tests.
"""

from configs import smollm2_135m
from early_exit.settings.overrides import ConfigDict, over, override, parse_arg, prod


def get_config(arg: str | None = None) -> ConfigDict:
    arg = parse_arg(
        arg, head="mlp", points=(2, 4), output="own", classes=128, gate=False, init="copy"
    )
    settings = {f"exits.{name}": value for name, value in arg.items()}
    return override(
        smollm2_135m.get_config(),
        settings
        | {
            "model.source": "tests/fixtures/tiny_chat",
            "data.sequence_length": 64,
            "data.batch_size": 4,
            "data.frequency_batches": 4,
            "tune.steps": 12,
            "tune.learning_rate": 3e-3,
            "tune.warmup_steps": 2,
            "tune.checkpoint_every": 4,
            "tune.validate_every": 6,
            "tune.validation_batches": 4,
            "calibrate.epsilon": 0.7,
            "calibrate.batches": 4,
            "evaluate.epsilons": (0.5, 0.7, 0.9),
            "evaluate.prompts": 2,
            "evaluate.prompt_tokens": 24,
            "evaluate.new_tokens": 16,
            "evaluate.rounds": 1,
            "evaluate.sample_tokens": 16,
        },
    )


def sweep(add) -> None:
    """Two places for the exits, at two learning rates."""
    points = over("exits.points", ((2, 4), (1, 3, 5)))
    for run in prod(points, over("tune.learning_rate", (1e-3, 3e-3))):
        add(**run)
