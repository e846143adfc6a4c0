"""The list of settings: complete, explained, and the same as what the rooms offer."""

import dataclasses

import pytest

from early_exit import confidence
from early_exit.backbones.decoder import REMAT, DecoderConfig
from early_exit.backbones.encoder import EncoderConfig
from early_exit.backbones.resnet import ResNetConfig
from early_exit.calibration import certify, methods, risk
from early_exit.data.inputs import AUGMENTS
from early_exit.exits import heads, init
from early_exit.settings.fields import rules
from early_exit.settings.listing import listing
from early_exit.settings.read import SECTIONS
from early_exit.training import recipe, schedule

HEADS = {
    kind for config in (DecoderConfig, EncoderConfig, ResNetConfig) for kind in config.head_kinds
}


@pytest.mark.parametrize(
    ("name", "offered"),
    [
        ("model.remat", REMAT),
        ("exits.head", HEADS),
        ("exits.output", heads.OUTPUTS),
        ("exits.init", init.INITS),
        ("data.augment", AUGMENTS),
        ("tune.train", recipe.TRAINED),
        ("tune.loss", recipe.LOSSES),
        ("tune.weight_path", schedule.PATHS),
        ("tune.curriculum", schedule.CURRICULA),
        ("calibrate.method", methods.NAMES),
        ("calibrate.confidence", confidence.NAMES),
        ("calibrate.risk", risk.RISKS),
        ("calibrate.among", certify.AMONG),
        ("calibrate.unit", risk.UNITS),
    ],
)
def test_choices_are_what_the_rooms_offer(name, offered):
    section, _, key = name.partition(".")
    assert set(rules(SECTIONS[section])[key].choices) == set(offered)


@pytest.mark.parametrize("kind", SECTIONS.values())
def test_every_setting_is_explained_in_one_sentence(kind):
    for name, rule in rules(kind).items():
        assert rule.says[0].isupper() or rule.says.startswith("epsilon"), name
        assert rule.says.endswith(".") and len(rule.says) < 200, name


def test_every_setting_has_a_rule():
    for section, kind in SECTIONS.items():
        names = {field.name for field in dataclasses.fields(kind)}
        assert names - rules(kind).keys() == (SECTIONS.keys() - {""} if not section else set())


@pytest.mark.parametrize("width", [80, 100, 160])
def test_the_list_has_every_setting_with_all_that_there_is_to_know(width):
    text = listing(width)
    lines = text.split("\n")
    assert max(map(len, lines)) <= width
    flat = " ".join(text.split())
    for section, kind in SECTIONS.items():
        assert f"{section or 'at the top'}: {kind.__doc__}" in lines
        for name, rule in rules(kind).items():
            (line,) = (x for x in lines if x.split()[:1] == [f"{kind.prefix}{name}"])
            assert line.startswith(f"  {kind.prefix}{name} ")
            assert " ".join(rule.says.split()) in flat and rule.allowed in flat
    # Defaults and ranges stand in columns.
    steps, clip = (
        next(x for x in lines if x.startswith(f"  tune.{name} ")) for name in ("steps", "clip_norm")
    )
    assert steps.index("1000") == clip.index("1.0") and steps.index("an int") == clip.index("a num")
