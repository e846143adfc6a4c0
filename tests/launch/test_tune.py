"""What only `launch.tune` takes: steps to trace, and a place that keeps checkpoints."""

import gzip
import json

import pytest
from etils import epath

from configs import tiny
from conftest import SHORT_RUN
from early_exit.runs import assemble, lock
from early_exit.runs.metrics import read_metrics
from early_exit.settings.overrides import override
from early_exit.settings.read import read
from early_exit.training import loop
from launch import tune

SETTINGS = SHORT_RUN | {
    "tune.steps": 8,
    "tune.warmup_steps": 1,
    "tune.checkpoint_every": 4,
    "tune.validate_every": 8,
    "tune.validation_batches": 1,
}


def steps_in_trace(folder):
    """Of the annotations in the trace, per step how many times."""
    (path,) = (folder / "tensorboard").rglob("*.trace.json.gz")
    events = json.loads(gzip.decompress(path.read_bytes()))["traceEvents"]
    return sorted(int(e["args"]["step_num"]) for e in events if e.get("name") == "tune")


def test_the_steps_asked_for_are_traced_and_no_others(tmp_path):
    """Here across a checkpoint; the run is what it would be without."""
    config = read(override(tiny.get_config(), SETTINGS))
    rows = loop.tune(config, tmp_path / "traced", profile=(3, 5))
    assert steps_in_trace(tmp_path / "traced") == [3, 4, 5]
    assert loop.tune(config, tmp_path / "plain") == rows
    assert read_metrics(tmp_path / "traced") == read_metrics(tmp_path / "plain")
    assert not list((tmp_path / "plain").rglob("*.trace.json.gz"))

    # All is run, and nothing left to trace.
    with pytest.raises(ValueError, match="8:8, do not rise, or are not .* run: none are left"):
        loop.tune(config, tmp_path / "plain", profile=(8, 8))


@pytest.mark.parametrize("steps", [(0, 3), (5, 4), (7, 9), (9, 12)])
def test_steps_that_are_not_run_are_refused_before_anything_is_loaded(tmp_path, monkeypatch, steps):
    monkeypatch.setattr(assemble, "load_backbone", None)
    config = read(override(tiny.get_config(), SETTINGS))
    with pytest.raises(ValueError, match=rf"{steps[0]}:{steps[1]}, do not rise.*: 1 to 8"):
        loop.tune(config, tmp_path / "run", profile=steps)
    assert not (tmp_path / "run").exists()


def test_a_bucket_that_keeps_no_checkpoints_is_refused_before_it_is_asked(monkeypatch):
    """Without a network, credentials, or the library for such buckets."""
    monkeypatch.setattr(lock, "held", pytest.fail)
    config = read(override(tiny.get_config(), SETTINGS))
    with pytest.raises(ValueError, match="Orbax writes them to disks and to gs:// only"):
        loop.tune(config, epath.Path("s3://bucket/run"))


def test_the_flag():
    assert tune.steps_of(None) is None
    assert tune.steps_of("10:12") == (10, 12)
    for text in ("10", "10:", ":12", "a:b", "1:2:3", "-1:2", "1.5:2", ""):
        with pytest.raises(ValueError, match=f"--profile={text} is not START:STOP"):
            tune.steps_of(text)
