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
