"""The border: what a config file or a saved run may say, and what it becomes."""

import dataclasses
import importlib
import json
import math
from pathlib import Path

import numpy as np
import pytest
from absl import flags
from ml_collections import config_flags

from configs import smollm2_135m, tiny
from early_exit.settings import read
from early_exit.settings.fields import SettingsError
from early_exit.settings.overrides import override
from early_exit.settings.sections import TuneSettings

LEAST = {"model": {"source": "weights"}, "data": {"source": "texts"}}
FIXTURES = Path(__file__).parents[1] / "fixtures"
SAVED = [
    json.loads(line)
    for line in (FIXTURES / "saved_configs.jsonl").read_text(encoding="utf-8").splitlines()
]


def given(**sections):
    """The least that a run needs, and this."""
    return LEAST | {
        name: LEAST.get(name, {}) | value if isinstance(value, dict) else value
        for name, value in sections.items()
    }


def problems(**sections):
    with pytest.raises(SettingsError) as caught:
        read.read(given(**sections))
    return caught.value.problems


def test_what_is_left_out_has_its_default():
    settings = read.read(LEAST)
    assert settings.tune == TuneSettings() and settings.seed == 0
    assert settings.model.source == "weights"


@pytest.mark.parametrize("case", SAVED, ids=lambda case: case["config"])
def test_configs_and_runs_saved_before_settings_had_types_agree(case):
    """These runs were saved key by key, with only what they used."""
    name, _, arg = case["config"].partition(":")
    config = importlib.import_module(f"configs.{name}").get_config(arg or None)
    assert read.read_saved(json.dumps(case["saved"])) == read.read(config)


@pytest.mark.parametrize("case", SAVED, ids=lambda case: case["config"])
def test_saved_settings_come_back(case):
    settings = read.read(case["saved"])
    again = read.read_saved(json.dumps(read.as_dict(settings)))
    assert again == settings
    assert isinstance(again.exits.points, tuple) and isinstance(again.tune.learning_rate, float)


def test_renamed_settings_of_saved_runs_keep_their_value():
    saved = given(tune={"states": "folder", "steps": 7})
    settings = read.read_saved(json.dumps(saved))
    assert (settings.tune.hidden_states, settings.tune.steps) == ("folder", 7)
    (problem,) = problems(tune={"states": "folder"})  # in a config file it is a mistake
    assert "there is no setting 'tune.states'" in problem


@pytest.mark.parametrize("text", ["[1]", "null", "3"])
def test_saved_settings_are_sections(text):
    with pytest.raises(ValueError, match="object of sections"):
        read.read_saved(text)


@pytest.mark.parametrize(
    ("sections", "wrong", "meant"),
    [
        ({"tune": {"curiculum": "gradual"}}, "tune.curiculum", "tune.curriculum"),
        ({"tune": {"by_confidance": True}}, "tune.by_confidance", "tune.by_confidence"),
        ({"exits": {"cascaded": True}}, "exits.cascaded", "exits.cascade"),
        ({"calibrate": {"alhpa": 0.2}}, "calibrate.alhpa", "calibrate.alpha"),
        ({"evaluate": {"epsilon": ()}}, "evaluate.epsilon", "evaluate.epsilons"),
        ({"mesh": {"tensors": 2}}, "mesh.tensors", "mesh.tensor"),
        ({"sed": 1}, "sed", "seed"),
        ({"tuen": {"steps": 3}}, "tuen.steps", "tune.steps"),
        ({"model": {"learning_rate": 3}}, "model.learning_rate", "tune.learning_rate"),
    ],
)
def test_unknown_names_are_refused_with_the_nearest(sections, wrong, meant):
    assert problems(**sections) == (f"there is no setting {wrong!r}; did you mean {meant!r}?",)
    with pytest.raises(SettingsError, match=f"no setting {wrong!r}"):
        read.defaults(**given(**sections))


@pytest.mark.parametrize("section", [3, None, "steps=3", [1]])
def test_a_section_is_a_dict(section):
    (problem,) = problems(tune=section)
    assert problem.startswith(f"tune={section!r} is not a section")


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("model.dtype", "int32"),
        ("model.dtype", "float99"),
        ("model.dtype", "float64"),
        ("model.remat", "blocks"),
        ("exits.points", (0, 3)),
        ("exits.classes", -1),
        ("data.batch_size", 0),
        ("data.sequence_length", 1),
        ("data.frequency_batches", 0),
        ("data.std", (0.0,)),
        ("data.std", (math.nan,)),
        ("data.mean", (math.inf,)),
        ("data.augment", "flip"),
        ("mesh.fsdp", -2),
        ("mesh.slices", 0),
        ("tune.steps", 0),
        ("tune.steps", 2**31),
        ("tune.checkpoint_every", 0),
        ("tune.validate_every", 0),
        ("tune.keep_checkpoints", 0),
        ("tune.validation_batches", 0),
        ("tune.curriculum_period", 0),
        ("tune.accumulate", 0),
        ("tune.clip_norm", 0.0),
        ("tune.clip_norm", math.inf),
        ("tune.learning_rate", 0.0),
        ("tune.learning_rate", -1.0),
        ("tune.learning_rate", math.nan),
        ("tune.learning_rate", 10**400),
        ("tune.backbone_rate", -0.1),
        ("tune.warmup_steps", -1),
        ("tune.final_fraction", 2.0),
        ("tune.b1", 1.0),
        ("tune.b2", 1.5),
        ("tune.weight_decay", -0.1),
        ("tune.layer_dropout", 1.0),
        ("tune.optimizer", "adam"),
        ("tune.weights", (-1.0, 1.0)),
        ("calibrate.epsilon", math.nan),
        ("calibrate.budget", -math.inf),
        ("calibrate.delta", 0.0),
        ("calibrate.batches", 0),
        ("evaluate.sizes", (64, 0)),
        ("evaluate.epsilons", (0.9, 1.1)),
        # other types
        ("exits.points", 3),
        ("exits.points", (2.0, 4.0)),
        ("exits.points", ("2:4",)),
        ("exits.gate", 1),
        ("exits.head", None),
        ("tune.steps", True),
        ("tune.steps", 12.0),
        ("tune.learning_rate", "fast"),
        ("tune.weights", "0.1"),
        ("tune.by_confidence", "false"),
        ("calibrate.budget", "10"),
        ("model.new", [("layers", 3)]),
        ("model.changes", {"eps": math.nan}),
        ("model.changes", {"eps": object()}),
    ],
)
def test_values_that_make_no_run_are_refused_by_name(name, value):
    section, _, key = name.partition(".")
    (problem,) = problems(**{section: {key: value}})
    assert problem.removeprefix("each of ").startswith(f"{name}=")


@pytest.mark.parametrize("seed", [-1, 2**32, 1.5, True, "0", math.nan])
def test_seeds(seed):
    (problem,) = problems(seed=seed)
    assert problem.startswith(f"seed={seed!r}")


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        ({"model": {"source": ""}}, "model.source, where weights are, or model.new"),
        ({"model": {"new": {"family": "decoder"}}}, "and not both"),
        ({"data": {"source": ""}}, "names no data"),
        ({"data": {"mean": (0.1, 0.2), "std": (0.5,)}}, "one number each"),
        ({"data": {"image_size": (8,)}}, r"\(height, width\)"),
        ({"mesh": {"data": 0}}, "mesh.data=0 leaves no device"),
        ({"mesh": {"fsdp": -1}}, "only one of"),
        ({"exits": {"points": (4, 2)}}, "must rise"),
        ({"exits": {"points": (2, 2)}}, "must rise"),
        ({"tune": {"warmup_steps": 5, "steps": 5}}, "must be below tune.steps=5"),
        ({"tune": {"weights": (0.0, 0.0)}}, "nothing is learned"),
        ({"tune": {"weight_steps": 3}}, "belong together"),
        ({"tune": {"layer_dropout": 0.1}}, "tune.train=all"),
        ({"tune": {"hidden_states": "folder", "train": "all"}}, "changes the backbone"),
        ({"tune": {"weights": (1.0,)}}, "tune.weights has 1 values for 0 exits"),
        ({"tune": {"accumulate": 3}}, "accumulate=3 parts cannot share the 8 rows"),
    ],
)
def test_settings_that_contradict_each_other(sections, message):
    with pytest.raises(SettingsError, match=message):
        read.read(given(**sections))


def test_everything_wrong_is_told_at_once():
    found = problems(
        seed=-1,
        tune={"clip_norm": 0, "curiculum": "all", "steps": 0},
        data={"batch_size": 0, "source": "texts"},
        model={"dtype": "float99"},
    )
    names = (
        "seed",
        "tune.clip_norm",
        "'tune.curiculum'",
        "tune.steps",
        "data.batch",
        "model.dtype",
    )
    assert len(found) == len(names)
    assert all(any(name in problem for problem in found) for name in names)


@pytest.mark.parametrize(
    ("sections", "value"),
    [
        ({"tune": {"learning_rate": 1}}, 1.0),
        ({"tune": {"weights": [1, 2]}, "exits": {"points": [2, 4]}}, (1.0, 2.0)),
        ({"tune": {"steps": np.int64(5)}}, 5),
        ({"tune": {"learning_rate": np.float32(0.5)}}, 0.5),
        ({"calibrate": {"budget": 3}}, 3.0),
        ({"model": {"new": {"depths": [3, 4]}, "source": ""}}, {"depths": (3, 4)}),
    ],
)
def test_numbers_and_lists_become_what_is_declared(sections, value):
    section, (name, _) = next((s, next(iter(x.items()))) for s, x in sections.items())
    found = getattr(getattr(read.read(given(**sections)), section), name)
    assert (found, type(found)) == (value, type(value))
    json.dumps(found)


def test_zeros_that_mean_nothing_or_never_are_taken():
    zeros = {"warmup_steps": 0, "weight_steps": 0, "layer_dropout": 0.0, "weight_decay": 0.0}
    zeros |= {"final_fraction": 0.0, "backbone_rate": 0.0, "b1": 0.0}
    read.read(given(tune=zeros, exits={"classes": 0}, evaluate={"examples": 0}))


def test_no_settings_exist_that_make_no_run():
    """Also where one is made from another."""
    settings = read.read(LEAST)
    with pytest.raises(SettingsError, match="tune.clip_norm"):
        dataclasses.replace(settings.tune, clip_norm=0.0)
    with pytest.raises(SettingsError, match="tune.weights has 2 values for 0 exits"):
        dataclasses.replace(settings, tune=TuneSettings(weights=(1.0, 1.0)))


def test_settings_are_changed_by_their_dotted_names():
    settings = read.read(LEAST)
    changed = read.changed(settings, {"tune.steps": 5, "exits.points": [2], "seed": 3})
    assert (changed.tune.steps, changed.exits.points, changed.seed) == (5, (2,), 3)
    assert settings == read.read(LEAST)
    for name, nearest in (("tune.stepz", "tune.steps"), ("tuen.steps", "tune.steps")):
        with pytest.raises(SettingsError, match=f"no setting '{name}'; did you mean '{nearest}'"):
            read.changed(settings, {name: 5})


def test_a_config_has_every_setting():
    config = read.defaults(**LEAST)
    settings = read.read(LEAST)
    assert config.to_dict() == read.as_dict(settings)
    assert read.read(config) == settings


@pytest.mark.filterwarnings("ignore:the load_module:DeprecationWarning")  # ml_collections' own
@pytest.mark.parametrize("module", [smollm2_135m, tiny])
def test_flags_reach_every_kind_of_setting(module, monkeypatch):
    """Those without a value, too, of a config that is made from another one."""
    argv = ["program", f"--config={module.__file__}", "--config.calibrate.budget=7"]
    argv += ["--config.exits.points=(3,5)", "--config.exits.gate", "--config.tune.steps=9"]
    argv += ["--config.model.changes={'norm_eps': 0.1}", "--config.data.mean=(0.5,)"]
    monkeypatch.setattr("sys.argv", argv)
    values = flags.FlagValues()
    config_flags.DEFINE_config_file("config", flag_values=values)
    values(argv)
    settings = read.read(values.config)
    assert (settings.calibrate.budget, settings.exits.points) == (7.0, (3, 5))
    assert settings.exits.gate and settings.tune.steps == 9
    assert settings.model.changes == {"norm_eps": 0.1} and settings.data.mean == (0.5,)


def test_sweeps_reach_a_setting_without_a_value():
    config = override(override(tiny.get_config(), {"calibrate.budget": 3}), {"tune.steps": 2000})
    assert read.read(config).calibrate.budget == 3.0
    with pytest.raises(TypeError):
        override(tiny.get_config(), {"calibrate.budget": "much"})
