"""SmolLM2-135M-Instruct with a recurrent exit, to be tuned on the model's own answers.

    python -m launch.distill --config=configs/smollm2_recurrent.py --made=data/answers \\
        --temperature=0 --tokens=500_000
    python -m launch.cache --config=configs/smollm2_recurrent.py --hidden_states=states/answers
    python -m launch.tune --config=configs/smollm2_recurrent.py \\
        --config.tune.hidden_states=states/answers --workdir=runs/recurrent

What answers the questions of others (`experiments/recurrent_exits`) goes in as
`--config.data.source=made:FOLDER,FOLDER`. `taps` and `blocks` choose another kind of head.
"""

from configs import smollm2_135m
from early_exit.settings.overrides import ConfigDict, override, parse_arg


def get_config(arg: str | None = None) -> ConfigDict:
    arg = parse_arg(arg, taps=(8, 18, 28), blocks=1, points=(), data="data/answers", steps=1000)
    return override(
        smollm2_135m.get_config(),
        {
            "exits.points": arg.points,
            "exits.recurrent_taps": arg.taps,
            "exits.recurrent_blocks": arg.blocks,
            "data.source": f"made:{arg.data}",
            "data.batch_size": 4,
            "data.sequence_length": 512,
            "tune.steps": arg.steps,
            "tune.learning_rate": 1.5e-3,
            "tune.warmup_steps": min(50, arg.steps - 1),
            "tune.checkpoint_every": 100,
            "tune.validate_every": 250,
        },
    )
