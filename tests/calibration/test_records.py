import dataclasses

import numpy as np
import pytest

from early_exit import confidence
from early_exit.calibration.records import Records

E, N = 2, 5


def records(**changes):
    rng = np.random.default_rng(0)
    scores = {name: rng.random((E, N), np.float32) for name in confidence.NAMES}
    scores["margin"][0, 3] = -np.inf
    fields = {
        "exit_depths": np.array([2, 4, 6]),
        "scores": scores,
        "agrees": rng.random((E, N)) < 0.5,
        "correct": rng.random((E + 1, N)) < 0.5,
        "losses": rng.random((E + 1, N), np.float32),
        "metadata": {"heads": "ab12", "step": 7, "note": None},
    }
    return Records(**fields | changes)


def assert_same(got, want):
    assert got.scores.keys() == want.scores.keys()
    for name, score in want.scores.items():
        np.testing.assert_array_equal(got.scores[name], score)
        assert got.scores[name].dtype == score.dtype
    for field in ("exit_depths", "agrees", "correct", "losses"):
        np.testing.assert_array_equal(getattr(got, field), getattr(want, field))
        assert getattr(got, field).dtype == getattr(want, field).dtype
    assert got.metadata == want.metadata


def test_records_come_back(tmp_path):
    records().save(tmp_path / "records.npz")
    assert_same(Records.load(tmp_path / "records.npz"), records())


def test_some_scores_are_enough(tmp_path):
    only = records(scores={"margin": records().scores["margin"]})
    only.save(tmp_path / "records.npz")
    assert_same(Records.load(tmp_path / "records.npz"), only)


def test_nothing_is_pickled(tmp_path):
    path = tmp_path / "records.npz"
    records().save(path)
    with np.load(path, allow_pickle=False) as file:
        assert all(file[name].dtype != object for name in file.files)
    np.savez(path, metadata=np.array("{}"), exit_depths=np.array([{"a": "pickle"}], object))
    with pytest.raises(ValueError, match="holds no records.*allow_pickle=False"):
        Records.load(path)


@pytest.mark.parametrize("end", [0, 1, 100, -1])
def test_truncated_files(tmp_path, end):
    path = tmp_path / "records.npz"
    records().save(path)
    path.write_bytes(path.read_bytes()[:end])
    with pytest.raises(ValueError, match="records.npz holds no records.*delete it"):
        Records.load(path)


def test_a_missing_array_is_named(tmp_path):
    np.savez(tmp_path / "records.npz", metadata=np.array("{}"))
    with pytest.raises(ValueError, match="holds no records.*exit_depths"):
        Records.load(tmp_path / "records.npz")


def test_a_missing_file_names_the_command(tmp_path):
    with pytest.raises(FileNotFoundError, match="records.npz; write them with `launch.calibrate`"):
        Records.load(tmp_path / "records.npz")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"scores": {"margin": np.zeros((E, N + 1), np.float32)}},
            r"scores 'margin' have the shape \(2, 6\), not \(2, 5\)",
        ),
        (
            {"scores": {"entropy": np.full((E, N), np.nan, np.float32)}},
            "scores 'entropy' hold NaN; the model or its heads are broken",
        ),
        ({"agrees": np.zeros((E, 0), bool)}, "records hold no position; give more"),
    ],
)
def test_bad_arrays(changes, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(records(), **changes)


@pytest.mark.parametrize("field", ["correct", "losses", "exit_depths"])
def test_every_array_must_fit(field):
    short = getattr(records(), field)[:-1]
    with pytest.raises(ValueError, match=f"{field} .*shape"):
        records(**{field: short})


def test_saving_is_whole_or_not_at_all(tmp_path, monkeypatch):
    path = tmp_path / "records.npz"
    records().save(path)
    assert list(tmp_path.iterdir()) == [path]
    before = path.read_bytes()

    def killed(file, **arrays):
        np.savez(file, **arrays | {"agrees": np.zeros(0)})  # something has been written
        raise KeyboardInterrupt

    monkeypatch.setattr(np, "savez_compressed", killed)
    with pytest.raises(KeyboardInterrupt):
        records().save(path)
    assert path.read_bytes() == before
