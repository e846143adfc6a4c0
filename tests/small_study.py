"""Runs a study on small networks in place of its own, so that it is over in seconds.

    python tests/small_study.py FOLDER experiments.decoding_speed.depth --quick

FOLDER holds the decoder (`stand_ins.deep_chat`). What a study says of it means nothing; that it
runs to its end does, prints its bars and writes its figures.
"""

import importlib
import pathlib
import sys

import stand_ins

from configs import fashion_mnist_resnet, news_minilm, smollm2_135m, smollm2_recurrent
from early_exit.settings.overrides import override
from experiments import bars

# What would ask more of the small decoder than it has.
CONSTANTS = {
    "experiments.decoding_speed.depth": {"LIMITS": {2: 1.0, 4: 1.0, 6: 1.0}},
    "experiments.decoding_speed.lengths": {"FILLED": (64, 128, 256), "ALLOCATED": 512},
}
POINTS = "points=2:4:7,classes=128"


def shrink(study: str, decoder: str) -> None:
    """Puts small networks, and runs of two steps, where the configs have large ones."""
    of_decoder, of_images = smollm2_135m.get_config, fashion_mnist_resnet.get_config
    of_chains = smollm2_recurrent.get_config
    smollm2_135m.SOURCE = decoder
    smollm2_135m.get_config = lambda arg=None: override(
        of_decoder(",".join(filter(None, (arg, POINTS)))),
        {"data.sequence_length": 32, "data.batch_size": 2, "data.frequency_batches": 2},
    )
    smollm2_recurrent.get_config = lambda arg=None: override(
        of_chains(",".join(filter(None, (arg, "taps=2:4:7")))),
        {"data.sequence_length": 32, "data.batch_size": 2},
    )
    fashion_mnist_resnet.get_config = lambda arg: override(
        of_images(arg),
        {"tune.steps": 2, "tune.warmup_steps": 1, "tune.validation_batches": 1}
        | {"data.batch_size": 16, "evaluate.singles": 4, "evaluate.rows": 256},
    )
    if study == "experiments.news_minilm.run":
        topics = stand_ins.topics(pathlib.Path("topics"), 400, runlocal=True)
        news_minilm.get_config = lambda arg=None: override(
            topics, {"evaluate.singles": 4, "evaluate.rows": 64}
        )


if __name__ == "__main__":
    decoder, study, *flags = sys.argv[1:]
    shrink(study, decoder)
    sys.argv[:] = [study, *flags]
    module = importlib.import_module(study)
    for name, value in CONSTANTS.get(study, {}).items():
        setattr(module, name, value)
    bars.run(module.main)
