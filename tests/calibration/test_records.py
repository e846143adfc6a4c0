import dataclasses

import numpy as np
import pytest
import synthetic

from early_exit import confidence
from early_exit.calibration.records import Records, Softened

E, N = 2, 5


def records(**changes):
    rng = np.random.default_rng(0)
    scores = {name: rng.random((E + 1, N), np.float32) for name in confidence.NAMES}
    scores["margin"][0, 3] = -np.inf
    fields = {
        "exit_depths": np.array([2, 4, 6]),
        "costs": np.array([1.5, 3, 4]),
        "scores": scores,
        "predictions": np.array([[0, 1, 2, 0, 1], [0, 1, 1, 1, 1], [0, 0, 1, 2, 1]], np.int32),
        "labels": np.array([0, 1, 1, 1, 0], np.int32),
        "losses": rng.random((E + 1, N), np.float32),
        "groups": np.array([0, 0, 0, 4, 4], np.int32),
        "softened": Softened(
            np.array([0.5, 1.0]),
            rng.random((2, E + 1, N), np.float32),
            rng.random((E + 1, N), np.float32),
        ),
        "metadata": {"heads": "ab12", "step": 7, "note": None},
    }
    return Records(**fields | changes)


def assert_same(got, want):
    assert got.scores.keys() == want.scores.keys()
    for name, score in want.scores.items():
        np.testing.assert_array_equal(got.scores[name], score)
        assert got.scores[name].dtype == score.dtype
    for field in ("exit_depths", "costs", "predictions", "labels", "losses", "groups"):
        np.testing.assert_array_equal(getattr(got, field), getattr(want, field))
        assert getattr(got, field).dtype == getattr(want, field).dtype
    assert got.metadata == want.metadata
    assert (got.softened is None) == (want.softened is None)
    if want.softened:
        for array, wanted in zip(*(vars(r.softened).values() for r in (got, want)), strict=True):
            np.testing.assert_array_equal(array, wanted)


def test_records_without_temperatures_come_back(tmp_path):
    plain = records(softened=None)
    plain.save(tmp_path / "records.npz")
    assert_same(Records.load(tmp_path / "records.npz"), plain)


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
            {"scores": {"margin": np.zeros((E, N), np.float32)}},
            r"scores 'margin' have the shape \(2, 5\), not \(3, 5\)",
        ),
        (
            {"scores": {"entropy": np.full((E + 1, N), np.nan, np.float32)}},
            "scores 'entropy' hold NaN; the model or its heads are broken",
        ),
        ({"predictions": np.zeros((E + 1, 0), np.int32)}, "records hold no position; give more"),
        (
            {"softened": Softened(np.ones(3), *[np.zeros((2, E + 1, N))] * 2)},
            r"softened log-normalizers have the shape \(2, 3, 5\), not \(3, 3, 5\)",
        ),
    ],
)
def test_bad_arrays(changes, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(records(), **changes)


def test_outcomes_follow_from_predictions():
    assert records().agrees.tolist() == [
        [True, False, False, False, True],
        [True, False, True, False, True],
    ]
    assert records().correct.tolist() == [
        [True, True, False, False, False],
        [True, True, True, True, False],
        [True, False, True, False, False],
    ]


def test_nothing_is_correct_about_an_unknown_label():
    unlabelled = records(labels=np.array([0, -1, 1, -1, 0], np.int32))
    assert unlabelled.agrees.any()
    with pytest.raises(ValueError, match="2 of 5 positions have no label.*calibrate for agreement"):
        _ = unlabelled.correct


@pytest.mark.parametrize("chosen", [np.array([3, 0]), np.array([True, False, False, True, False])])
def test_a_part_of_the_records(chosen):
    part = records().take(chosen)
    at = np.arange(N)[chosen]
    for n, position in enumerate(at):
        for field in ("predictions", "labels", "losses", "groups", "agrees", "correct"):
            want = getattr(records(), field)[..., position]
            np.testing.assert_array_equal(getattr(part, field)[..., n], want)
        for name, score in records().scores.items():
            np.testing.assert_array_equal(part.scores[name][:, n], score[:, position])
        for name in ("log_normalizers", "second"):
            kept, whole = getattr(part.softened, name), getattr(records().softened, name)
            np.testing.assert_array_equal(kept[..., n], whole[..., position])
    assert part.metadata == records().metadata
    np.testing.assert_array_equal(part.costs, records().costs)


@pytest.mark.parametrize("share", [0.2, 0.5, 0.71])
def test_a_split_parts_groups(share):
    groups = np.random.default_rng(1).integers(0, 40, 300).astype(np.int32) * 3
    whole = synthetic.records(300, groups=groups, labels=np.arange(300, dtype=np.int32))
    first, second = whole.split(share, seed=0)
    assert not set(first.groups.tolist()) & set(second.groups.tolist())
    assert sorted([*first.labels.tolist(), *second.labels.tolist()]) == list(range(300))
    assert len(set(first.groups.tolist())) == round(share * len(set(groups.tolist())))
    assert whole.split(share, seed=0)[0].labels.tolist() == first.labels.tolist()
    assert whole.split(share, seed=1)[0].labels.tolist() != first.labels.tolist()


@pytest.mark.parametrize("share", [0.0, 0.1, 0.9, 1.0])
def test_a_split_leaves_no_part_empty(share):
    with pytest.raises(ValueError, match=f"share of {share:g} of 2 groups leaves one part of the"):
        records().split(share, seed=0)


def test_an_unknown_confidence_is_refused_with_the_known_ones():
    with pytest.raises(ValueError, match="unknown confidence 'vibes'; the records have max_prob"):
        records().score("vibes")


@pytest.mark.parametrize("field", ["costs", "labels", "groups", "losses", "exit_depths"])
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
        np.savez(file, **arrays | {"labels": np.zeros(0)})  # something has been written
        raise KeyboardInterrupt

    monkeypatch.setattr(np, "savez_compressed", killed)
    with pytest.raises(KeyboardInterrupt):
        records().save(path)
    assert path.read_bytes() == before
