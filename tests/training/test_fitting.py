"""`tune.minutes`: a machine is timed, and the run has the steps that there is time for."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import pytest

from configs import tiny
from conftest import SHORT_RUN
from early_exit.runs import assemble, layout
from early_exit.runs.metrics import FILE
from early_exit.settings.overrides import override
from early_exit.settings.read import changed, read
from early_exit.settings.sections import TuneSettings
from early_exit.training import fitting, loop, preemption

MINUTES = {"tune.steps": 40, "tune.minutes": 1.0, "tune.warmup_steps": 3}
SETTINGS = SHORT_RUN | MINUTES
SETTINGS |= {"tune.checkpoint_every": 2, "tune.validate_every": 40, "tune.validation_batches": 1}


@pytest.fixture(scope="module")
def config():
    return read(override(tiny.get_config(), SETTINGS))


def test_steps_are_those_that_there_is_time_for():
    tune = TuneSettings(steps=100, minutes=2, warmup_steps=8)
    assert fitting.steps_for(tune, 1.2) == 100  # exactly
    assert fitting.steps_for(tune, 1.21) == 99
    assert fitting.steps_for(tune, 60) == 9  # one after the warm-up, however slow
    assert fitting.steps_for(tune, 1e-9) == 100
    assert fitting.told(tune, 1.2, 100) == "a step takes 1.2 s here: 100 steps in 2 minutes"
    assert fitting.told(tune, 2.0, 60) == (
        "a step takes 2 s here: 60 steps in 2 minutes, not 100 in 4 minutes (tune.minutes)"
    )


def test_a_machine_is_timed_without_what_compiles_and_the_state_stays():
    clock = iter([10, 13, 20, 21, 30, 35])  # steps of 3, 1 and 5 seconds
    donating = jax.jit(lambda state: ({"x": state["x"] + 1}, {}), donate_argnums=0)
    calls = []

    def step(state):
        calls.append(float(state["x"]))
        return donating(state)

    state = {"x": jnp.float32(0)}
    assert fitting.seconds_of(step, state, lambda: next(clock)) == 2.0  # of 3 and 1
    assert calls == [0, 1, 2] and float(state["x"]) == 0


def timed(monkeypatch, seconds):
    """From now on, so long does a step take; returns the times at which it was asked."""
    asked = []

    def seconds_of(step, state):
        asked.append(jax.tree.leaves(state)[0].shape)
        step(jax.tree.map(jnp.copy, state))  # compiles, as the real one does
        return seconds

    monkeypatch.setattr(fitting, "seconds_of", seconds_of)
    return asked


def test_a_fitted_run_is_the_run_of_so_many_steps(config, tmp_path, monkeypatch):
    """Bit for bit, interrupted or not; it goes on as it began on a machine of another speed."""
    said, asked = [], timed(monkeypatch, 60 / 7.5)
    rows = loop.tune(config, tmp_path / "fitted", tell=said.append)
    (sentence,) = said
    assert "7 steps in 56 seconds, not 40 in 6 minutes" in sentence and len(asked) == 1
    assert layout.load_config(tmp_path / "fitted") == changed(config, {"tune.steps": 7})

    exact = changed(config, {"tune.steps": 7, "tune.minutes": 0})
    assert loop.tune(exact, tmp_path / "exact") == rows
    metrics = (tmp_path / "exact" / FILE).read_text()
    assert (tmp_path / "fitted" / FILE).read_text() == metrics

    batches = []

    def place_batch(run, batch, place=loop.Run.place_batch):
        batches.append(batch)
        if len(batches) == 6:  # one is timed
            raise preemption.Preempted("asked to leave")
        return place(run, batch)

    with monkeypatch.context() as patched, pytest.raises(preemption.Preempted):
        patched.setattr(loop.Run, "place_batch", place_batch)
        loop.tune(config, tmp_path / "interrupted")
    timed(monkeypatch, 1e9)
    assert loop.tune(config, tmp_path / "interrupted") == rows
    assert (tmp_path / "interrupted" / FILE).read_text() == metrics
    # And again, when nothing is left to do.
    assert loop.tune(config, tmp_path / "interrupted") == rows

    # What follows tuning takes the config with which it was asked for.
    tuned = assemble.load_tuned(tmp_path / "fitted", config)
    assert tuned.config.tune.steps == tuned.metadata["step"] == 7
    others = [{"tune.minutes": 2.0}, {"tune.steps": 6}, {"seed": 1}, {"tune.learning_rate": 1.0}]
    for other in others:
        with pytest.raises(ValueError, match="holds a run with other settings"):
            assemble.load_tuned(tmp_path / "fitted", changed(config, other))
        with pytest.raises(ValueError, match="holds a run with other settings"):
            loop.tune(changed(config, other), tmp_path / "fitted")


def test_where_there_is_time_for_all_nothing_is_compiled_anew(config, tmp_path, monkeypatch):
    timed(monkeypatch, 1e-3)
    short = changed(config, {"tune.steps": 4})
    step = []
    fit = loop.Run.fit

    def fitting_run(run, state, tell):
        step.append(run.step)
        found = fit(run, state, tell)
        step.append(run.step)
        return found

    monkeypatch.setattr(loop.Run, "fit", fitting_run)
    loop.tune(short, tmp_path)
    assert step[0] is step[1] and step[0]._cache_size() == 1
    assert layout.load_config(tmp_path) == short


def test_before_the_first_checkpoint_settings_may_still_be_mended(config, tmp_path, monkeypatch):
    timed(monkeypatch, 60 / 7.5)
    layout.save_config(changed(config, {"tune.steps": 5, "seed": 3}), tmp_path)
    loop.tune(config, tmp_path)
    assert layout.load_config(tmp_path).tune.steps == 7


def test_a_run_of_before_had_no_minutes(config, tmp_path, monkeypatch):
    """Its config says nothing of them, and it goes on by the steps that it has."""
    timed(monkeypatch, 60 / 7.5)
    plain = changed(config, {"tune.steps": 4, "tune.minutes": 0})
    loop.tune(plain, tmp_path)
    saved = json.loads((tmp_path / "config.json").read_text())
    del saved["tune"]["minutes"]
    (tmp_path / "config.json").write_text(json.dumps(saved))
    assert layout.load_config(tmp_path) == plain
    with pytest.raises(ValueError, match="tune.minutes: 0.0 → 1.0"):
        loop.tune(config, tmp_path)


def test_a_backbone_that_is_trained_is_timed_on_a_copy(config, tmp_path, monkeypatch):
    timed(monkeypatch, 60 / 5.5)
    jointly = dataclasses.replace(config.tune, train="all")
    loop.tune(dataclasses.replace(config, tune=jointly), tmp_path)
    assert layout.load_config(tmp_path).tune.steps == 5
