"""A run compiles its step once and its validation once, begun anew or resumed."""

import shutil

import pytest

from configs import tiny
from early_exit.evaluation import exits
from early_exit.runs.layout import CHECKPOINTS
from early_exit.settings.overrides import override
from early_exit.settings.read import changed, read
from early_exit.training import loop

CONFIG = read(
    override(
        tiny.get_config(),
        {
            "exits.head": "embedding",
            "exits.classes": 77,  # a model that no other test has scored
            "exits.points": (3,),
            "data.sequence_length": 16,
            "data.batch_size": 2,
            "tune.steps": 4,
            "tune.checkpoint_every": 2,
            "tune.validate_every": 2,
            "tune.validation_batches": 3,
        },
    )
)


def compiled(folder, monkeypatch):
    """(programs of the step, of the validation) that a run adds to those there are."""
    runs, init = [], loop.Run.__init__

    def kept(run, *args):
        init(run, *args)
        runs.append(run)

    before = exits.score_batch._cache_size()
    with monkeypatch.context() as patch:
        patch.setattr(loop.Run, "__init__", kept)
        loop.tune(CONFIG, folder)
    return runs[0].step._cache_size(), exits.score_batch._cache_size() - before


def test_a_run_compiles_once_and_so_does_one_that_goes_on(tmp_path, monkeypatch):
    assert compiled(tmp_path, monkeypatch) == (1, 1)
    shutil.rmtree(tmp_path / CHECKPOINTS / "4")
    assert compiled(tmp_path, monkeypatch) == (1, 0)


def test_batches_that_are_not_alike_end_the_run(tmp_path, monkeypatch):
    place, met = loop.Run.place_batch, []

    def place_batch(run, batch):
        met.append(batch)
        if len(met) == 3:
            batch = {name: x[:, :-1] for name, x in batch.items()}
        return place(run, batch)

    monkeypatch.setattr(loop.Run, "place_batch", place_batch)
    config = changed(CONFIG, {"tune.validate_every": 99})
    message = "by step 4 the tuning step has been compiled 2 times: batches, or the state, changed"
    with pytest.raises(RuntimeError, match=message):
        loop.tune(config, tmp_path)
