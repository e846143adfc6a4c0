"""The recipe of EE-Tuning (Pan et al. 2024, §3.1) for a large decoder; what its configs share.

Eight exits with norm and feed-forward heads behind a frozen backbone, 1.3 billion tokens. The
backbone is in bfloat16, and its blocks run in a loop. Without a `source` of weights there are only
its shapes: enough to compile everything for a pod, and to see what that costs.
"""

from early_exit.settings.overrides import ConfigDict, parse_arg
from early_exit.settings.read import defaults


def settings(arg: str | None, *, new: dict, tensor: int) -> ConfigDict:
    """Of a run.

    Args:
      arg: the text after the config's name.
      new: the decoder, as in `DecoderConfig`.
      tensor: over how many chips each matrix is split.
    """
    arg = parse_arg(
        arg,
        source="",
        data="stdlib",
        points=eighths(new["depth"]),
        head="mlp",
        loss="cross_entropy",
        train="exits",
        steps=40_000,
        batch_size=16,
        sequence_length=2048,
    )
    return defaults(
        model={
            "source": arg.source,
            "dtype": "bfloat16",
            "new": {} if arg.source else {"family": "decoder"} | new,
            "scan": True,
            "remat": "block" if arg.train == "all" else "none",
        },
        exits={"points": arg.points, "head": arg.head},
        data={
            "source": arg.data,
            "sequence_length": arg.sequence_length,
            "batch_size": arg.batch_size,
        },
        mesh={"tensor": tensor},
        tune={
            "train": arg.train,
            "loss": arg.loss,
            "steps": arg.steps,
            "learning_rate": 1e-4,
            "backbone_rate": 0.03,
            "warmup_steps": min(100, arg.steps - 1),
            "b2": 0.95,
            "checkpoint_every": 1000,
            "validate_every": 1000,
        },
        evaluate={"epsilons": (0.8, 0.9, 0.95), "questions": ("What is a list in Python?",)},
    )


def eighths(depth: int) -> tuple[int, ...]:
    """After every eighth of the blocks, the last of these exits one block before the final one."""
    return (*(depth * k // 8 for k in range(1, 8)), depth - 1)
