"""The recipe of EE-Tuning (Pan et al. 2024, §3.1) for a large decoder; the base of its configs.

Eight exits with norm and feed-forward heads behind a frozen backbone, 1.3 billion tokens. The
backbone is in bfloat16, and its blocks run in a loop. Without a `source` of weights there are only
its shapes: enough to compile everything for a pod, and to see what that costs.
"""

from configs import smollm2_135m
from early_exit.settings.overrides import ConfigDict, override, parse_arg


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
    config = override(
        smollm2_135m.get_config(),
        {
            "exits.points": arg.points,
            "exits.head": arg.head,
            "exits.classes": 0,
            "data.source": arg.data,
            "data.sequence_length": arg.sequence_length,
            "data.batch_size": arg.batch_size,
            "mesh.data": -1,
            "mesh.fsdp": 1,
            "mesh.tensor": tensor,
            "tune.train": arg.train,
            "tune.loss": arg.loss,
            "tune.steps": arg.steps,
            "tune.learning_rate": 1e-4,
            "tune.warmup_steps": min(100, arg.steps - 1),
            "tune.checkpoint_every": 1000,
            "tune.validate_every": 1000,
        },
    )
    config.model = {
        "source": arg.source,
        "dtype": "bfloat16",
        "new": {} if arg.source else {"family": "decoder"} | new,
        "scan": True,
        "remat": "block" if arg.train == "all" else "none",
    }
    return config


def eighths(depth: int) -> tuple[int, ...]:
    """After every eighth of the blocks, the last of these exits one block before the final one."""
    return (*(depth * k // 8 for k in range(1, 8)), depth - 1)
