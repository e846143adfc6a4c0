"""What the last version has left with its users is read by this one, and means the same.

A promise of CHANGELOG.md. The files were written by the version that their folder is named after.
"""

import json
import pathlib
import shutil

import numpy as np
import pytest

from early_exit.calibration.thresholds import fit
from early_exit.evaluation import drafts, exits, run
from early_exit.runs import assemble, checkpoint, layout
from early_exit.training import loop
from tests.fixtures.make_saved import answers

ROOT = pathlib.Path(__file__).parents[2]
VERSIONS = sorted((ROOT / "tests/fixtures").glob("saved_*/"))


@pytest.fixture(params=VERSIONS, ids=lambda folder: folder.name)
def saved(request, tmp_path, monkeypatch):
    """A copy of a version's files."""
    monkeypatch.chdir(ROOT)  # its settings name sources in here
    return pathlib.Path(shutil.copytree(request.param, tmp_path / "saved"))


@pytest.mark.long
def test_a_run_and_its_exits_alone_answer_as_they_did(saved):
    expected = json.loads((saved / "expected.json").read_text())
    for folder in ("run", "exported"):
        assert answers(assemble.load_tuned(saved / folder)) == expected["answers"], folder


def test_records_are_read_and_not_made_anew(saved, monkeypatch):
    tuned = assemble.load_tuned(saved / "run")

    def made_anew(*_, **__):
        raise AssertionError("the records that are there were not taken")

    monkeypatch.setattr(exits, "record", made_anew)
    monkeypatch.setattr(drafts, "record", made_anew)
    thresholds = fit(run.records_of(tuned), "max_prob", 0.5).thresholds
    expected = json.loads((saved / "expected.json").read_text())["thresholds"]
    np.testing.assert_allclose(thresholds, expected, rtol=1e-6)
    assert run.chains_of(tuned).stands.size


def test_a_finished_run_has_nothing_left_to_do(saved):
    config = layout.load_config(saved / "run")
    before = checkpoint.latest_step(saved / "run" / layout.CHECKPOINTS)
    assert before == config.tune.steps
    rows = loop.tune(config, saved / "run")
    last = [
        json.loads(line)
        for line in (saved / "run/metrics.jsonl").read_text().splitlines()
        if "validation/loss/exit_2" in line
    ][-1]
    assert rows[0]["loss"] == pytest.approx(last["validation/loss/exit_2"], rel=1e-5)
