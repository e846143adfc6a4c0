"""Pretrained networks with exits: attach, tune, calibrate, and skip the depth that is not needed.

    import early_exit as ee

    model = ee.load("path/to/a/model")                  # or a hub id, a .gguf file, a run's folder
    model = ee.attach(model, (8, 22, 28))               # an exit after each of these blocks
    model = ee.tune(model, texts, steps=500)            # the network stays as it is
    model = ee.calibrate(model, held_out, epsilon=0.95)
    print(ee.generate(model, "Why is the sky blue?").text)
    ee.save(model, "folder")                            # `ee.load` and every command take it

The one idea: what stands here is all that is public; everything else may change. Names are looked
up when they are used, so importing this imports nothing else, no JAX either.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from early_exit.backbones.own import wrap
    from early_exit.calibration.records import Records
    from early_exit.classifying.classify import Classified
    from early_exit.decoding.mode import Mode
    from early_exit.decoding.sampling import Sampling
    from early_exit.exits.heads import ExitConfig
    from early_exit.library import register
    from early_exit.library.answers import Answer, Scored, classify, generate, score, stream
    from early_exit.library.model import Model, attach, frequent_tokens, load, save
    from early_exit.library.work import calibrate, record, tune
    from early_exit.policy import ExitPolicy
    from early_exit.policy import make as make_policy
    from early_exit.storage.programs import keep as keep_programs
    from early_exit.training.recipe import Recipe
    from early_exit.training.schedule import ExitWeights
    from early_exit.training.step import init_state, tune_step, tuning_loss

# Where each name lives: a module, and what it is called there.
_HOMES = {
    "Answer": ("library.answers", "Answer"),
    "Classified": ("classifying.classify", "Classified"),
    "ExitConfig": ("exits.heads", "ExitConfig"),
    "ExitPolicy": ("policy", "ExitPolicy"),
    "ExitWeights": ("training.schedule", "ExitWeights"),
    "Mode": ("decoding.mode", "Mode"),
    "Model": ("library.model", "Model"),
    "Recipe": ("training.recipe", "Recipe"),
    "Records": ("calibration.records", "Records"),
    "Sampling": ("decoding.sampling", "Sampling"),
    "Scored": ("library.answers", "Scored"),
    "attach": ("library.model", "attach"),
    "calibrate": ("library.work", "calibrate"),
    "classify": ("library.answers", "classify"),
    "frequent_tokens": ("library.model", "frequent_tokens"),
    "generate": ("library.answers", "generate"),
    "init_state": ("training.step", "init_state"),
    "keep_programs": ("storage.programs", "keep"),
    "load": ("library.model", "load"),
    "make_policy": ("policy", "make"),
    "record": ("library.work", "record"),
    "register": ("library.register", ""),
    "save": ("library.model", "save"),
    "score": ("library.answers", "score"),
    "stream": ("library.answers", "stream"),
    "tune": ("library.work", "tune"),
    "tune_step": ("training.step", "tune_step"),
    "tuning_loss": ("training.step", "tuning_loss"),
    "wrap": ("backbones.own", "wrap"),
}

__all__ = [
    "Answer",
    "Classified",
    "ExitConfig",
    "ExitPolicy",
    "ExitWeights",
    "Mode",
    "Model",
    "Recipe",
    "Records",
    "Sampling",
    "Scored",
    "attach",
    "calibrate",
    "classify",
    "frequent_tokens",
    "generate",
    "init_state",
    "keep_programs",
    "load",
    "make_policy",
    "record",
    "register",
    "save",
    "score",
    "stream",
    "tune",
    "tune_step",
    "tuning_loss",
    "wrap",
]


def __getattr__(name: str) -> Any:
    if name == "__version__":
        metadata = importlib.import_module("importlib.metadata")
        return metadata.version("early_exit")
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    home, own = _HOMES[name]
    module = importlib.import_module(f"{__name__}.{home}")
    globals()[name] = found = getattr(module, own) if own else module
    return found


def __dir__() -> list[str]:
    return [*__all__, "__version__"]
