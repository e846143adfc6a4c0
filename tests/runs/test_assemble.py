"""What a run's folder says about it: settings of any age, and a network drawn in any way."""

import json

import jax
import numpy as np
import pytest

from configs import digits_resnet, tiny
from early_exit.runs import assemble, layout
from early_exit.settings import read
from early_exit.settings.overrides import override
from early_exit.training import loop

SHORT = {"tune.steps": 2, "tune.warmup_steps": 1, "tune.validation_batches": 1}


def saved(folder, change):
    """A folder with the settings of a run, as a version before this one may have left them."""
    config = read.as_dict(read.read(tiny.get_config()))
    change(config)
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def test_settings_of_earlier_versions_are_read(tmp_path):
    def earlier(config):
        del config["tune"]["curriculum"], config["exits"]["cascade"], config["data"]["augment"]
        del config["tune"]["hidden_states"]
        config["tune"]["states"] = "a/folder"

    found = layout.load_config(saved(tmp_path, earlier))
    wanted = read.changed(read.read(tiny.get_config()), {"tune.hidden_states": "a/folder"})
    assert found == wanted


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: c["tune"].update(warp=1), "no setting 'tune.warp'; did you mean"),
        (lambda c: c["tune"].update(clip_norm=0.0), r"tune.clip_norm=0.0 must be above 0"),
        (lambda c: c.update(tune=[1]), r"tune=\[1\] is not a section"),
        (lambda c: c.pop("model"), "give either model.source"),
    ],
)
def test_settings_of_no_version_are_refused_with_the_file_and_a_mend(tmp_path, change, message):
    with pytest.raises(ValueError, match=message) as error:
        layout.load_config(saved(tmp_path, change))
    said = str(error.value)
    assert said.startswith(str(tmp_path / "config.json"))
    assert "Correct them in that file, or use the version of early_exit that wrote it" in said


def test_damaged_settings_name_their_file(tmp_path):
    (tmp_path / "config.json").write_text('{"seed": 0, ')
    with pytest.raises(ValueError, match=r"config\.json holds settings that"):
        layout.load_config(tmp_path)


def test_settings_are_saved_section_by_section(tmp_path):
    config = read.read(tiny.get_config())
    layout.save_config(config, tmp_path)
    text = (tmp_path / "config.json").read_text()
    text = json.loads(text, parse_constant=pytest.fail)
    assert text["tune"]["steps"] == 12 and text["exits"]["points"] == [2, 4] and text["seed"] == 0
    assert layout.load_config(tmp_path) == config


def test_a_network_that_was_drawn_otherwise_is_the_checkpoints(tmp_path, monkeypatch):
    """A run that trains its network needs nothing of how that was first drawn."""
    config = read.read(override(digits_resnet.get_config("width=4,points=1"), SHORT))
    with monkeypatch.context() as earlier:
        earlier.setattr(assemble, "stream", lambda seed, name: jax.random.key(seed))
        loop.tune(config, tmp_path)
        there = assemble.load_tuned(tmp_path)
        first, _ = assemble.load_backbone(config)
    here = assemble.load_tuned(tmp_path)
    now, _ = assemble.load_backbone(config)
    kernels = [x["blocks"]["0"]["units"]["0"]["conv"]["kernel"] for x in (first.params, now.params)]
    assert (np.asarray(kernels[0]) != kernels[1]).any()
    assert here.metadata == there.metadata
    assert [row["exit"] for row in loop.tune(config, tmp_path)] == [1, 3]  # goes on where it was
