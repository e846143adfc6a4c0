"""The settings in a run's folder: what is saved is read, by any reader of JSON."""

import json

import pytest

from configs import tiny
from early_exit.runs import assemble
from early_exit.settings.overrides import override


@pytest.mark.parametrize(
    ("setting", "value"),
    [("tune.learning_rate", float("nan")), ("evaluate.epsilons", (0.9, float("inf")))],
)
def test_settings_that_no_file_can_hold_are_named(tmp_path, setting, value):
    config = override(tiny.get_config(), {setting: value})
    with pytest.raises(ValueError, match=f"settings are finite numbers; mend {setting}$"):
        assemble.save_config(config, tmp_path)
    assert not list(tmp_path.iterdir())


def test_what_is_saved_is_read(tmp_path):
    config = override(tiny.get_config(), {"exits.points": (2,)})
    assemble.save_config(config, tmp_path)
    json.loads((tmp_path / "config.json").read_text(), parse_constant=pytest.fail)
    found = assemble.load_config(tmp_path)
    assert json.loads(found.to_json()) == json.loads(config.to_json())
