"""The recipe of EE-Tuning (Pan et al. 2024, §3.1) for a large decoder; the base of its configs.

Eight exits with norm and feed-forward heads behind a frozen backbone, 1.3 billion tokens. The
backbone is in bfloat16, and its blocks run in a loop. Without a `source` of weights there are only
its shapes: enough to compile everything for a pod, and to see what that costs.
"""

from early_exit.config import ConfigDict, parse_arg


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
        data="",
        points=eighths(new["depth"]),
        head="mlp",
        loss="cross_entropy",
        train="exits",
        steps=40_000,
        batch_size=16,
        sequence_length=2048,
    )
    return ConfigDict(
        {
            "seed": 0,
            "model": {
                "source": arg.source,
                "dtype": "bfloat16",
                "new": {} if arg.source else {"family": "decoder"} | new,
                "scan": True,
                "remat": "block" if arg.train == "all" else "none",
            },
            "exits": {
                "points": arg.points,
                "head": arg.head,
                "output": "own",
                "classes": 0,
                "gate": False,
                "init": "copy",
            },
            "data": {
                "source": arg.data,
                "sequence_length": arg.sequence_length,
                "batch_size": arg.batch_size,
                "frequency_batches": 64,
            },
            "mesh": {"data": -1, "fsdp": 1, "tensor": tensor},
            "tune": {
                "train": arg.train,
                "loss": arg.loss,
                "weights": (),
                "steps": arg.steps,
                "optimizer": "adamw",
                "learning_rate": 1e-4,
                "backbone_rate": 0.1,
                "warmup_steps": min(100, arg.steps - 1),
                "final_fraction": 0.1,
                "b1": 0.9,
                "b2": 0.95,
                "weight_decay": 0.01,
                "clip_norm": 1.0,
                "checkpoint_every": 1000,
                "keep_checkpoints": 2,
                "validate_every": 1000,
                "validation_batches": 8,
            },
            "calibrate": {"confidence": "max_prob", "epsilon": 0.95, "batches": 32},
        }
    )


def eighths(depth: int) -> tuple[int, ...]:
    """After every eighth of the blocks, the last of these exits one block before the final one."""
    return (*(depth * k // 8 for k in range(1, 8)), depth - 1)
