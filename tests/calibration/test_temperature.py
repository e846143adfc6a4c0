import dataclasses

import jax
import numpy as np
import pytest

from early_exit import confidence
from early_exit.calibration import temperature
from early_exit.calibration.records import Records, Softened

N, CLASSES = 4_000, 5


def softmax(x):
    e = np.exp(x - x.max(axis=-1, keepdims=True))
    return e / e.sum(axis=-1, keepdims=True)


@pytest.fixture(scope="module")
def made():
    """(logits [3, N, C], records) of exits that are over-, under-confident and well calibrated."""
    rng = np.random.default_rng(0)
    true = rng.normal(size=(N, CLASSES)) * 2
    labels = np.array([rng.choice(CLASSES, p=p) for p in softmax(true)])
    logits = np.stack([true * 2, true * 0.5, true]).astype(np.float32)
    summary = confidence.summarize(jax.numpy.asarray(logits))
    scores = {
        name: np.asarray(confidence.from_logits(name, summary, summary.prediction * 0))
        for name in confidence.FROM_LOGITS
    }
    probs = softmax(logits.astype(np.float64))
    return logits, Records(
        exit_depths=np.array([1, 2, 3]),
        costs=np.array([1.0, 2.0, 3.0]),
        scores=scores,
        predictions=logits.argmax(-1).astype(np.int32),
        labels=labels.astype(np.int32),
        losses=-np.log(probs[:, np.arange(N), labels]).astype(np.float32),
        groups=np.arange(N, dtype=np.int32),
        softened=Softened(
            np.array(confidence.TEMPERATURES),
            **jax.tree.map(np.asarray, confidence.soften(jax.numpy.asarray(logits))),
        ),
    )


def test_temperatures_undo_what_made_the_logits_too_sharp_or_too_flat(made):
    assert temperature.fit(made[1]).tolist() == [2.0, 0.5, 1.0]


def test_the_fitted_temperature_has_the_lowest_loss(made):
    """Against cross-entropies computed from the logits themselves, on labels of another kind."""
    logits, records = made
    labels = np.random.default_rng(1).integers(0, CLASSES, N)
    labels = np.where(np.random.default_rng(2).random(N) < 0.5, labels, records.labels)
    losses = [
        [
            -np.log(softmax(row.astype(np.float64) / t))[np.arange(N), labels].mean()
            for row in logits
        ]
        for t in confidence.TEMPERATURES
    ]
    probs = softmax(logits.astype(np.float64))
    own = -np.log(probs[:, np.arange(N), labels]).astype(np.float32)
    other = dataclasses.replace(records, labels=labels.astype(np.int32), losses=own)
    best = np.array(confidence.TEMPERATURES)[np.argmin(losses, axis=0)]
    np.testing.assert_array_equal(temperature.fit(other), best)
    assert (best > temperature.fit(records)).all()


def test_scores_are_those_of_divided_logits(made):
    logits, records = made
    temperatures = np.array([2.0, 1.0, 2**0.25])
    changed = temperature.apply(records, temperatures)
    divided = np.sort(softmax(logits.astype(np.float64) / temperatures[:, None, None]), axis=-1)
    np.testing.assert_allclose(changed.scores["max_prob"], divided[..., -1], atol=1e-5)
    margin = divided[..., -1] - divided[..., -2]
    np.testing.assert_allclose(changed.scores["margin"], margin, atol=1e-5)
    assert "entropy" not in changed.scores and changed.scores["margin"].dtype == np.float32
    np.testing.assert_array_equal(changed.scores["patience"], records.scores["patience"])
    np.testing.assert_array_equal(changed.predictions, records.predictions)


def test_heads_that_decline_go_on_declining(made):
    records = made[1]
    scores = {name: score.copy() for name, score in records.scores.items()}
    for name in ("max_prob", "margin"):
        scores[name][0, :7] = -np.inf
    changed = temperature.apply(dataclasses.replace(records, scores=scores), np.array([2.0, 1, 1]))
    for name in ("max_prob", "margin"):
        assert (changed.scores[name][0, :7] == -np.inf).all()
        assert np.isfinite(changed.scores[name][0, 7:]).all()


def test_calibration_improves_and_is_measured_as_defined(made):
    records = made[1]
    before = temperature.calibration_error(records)
    expected = []
    for score, right in zip(records.scores["max_prob"], records.correct, strict=True):
        total = 0.0
        for low in np.arange(temperature.BINS) / temperature.BINS:
            inside = (score >= low) & (score < low + 1 / temperature.BINS)
            if inside.any():
                total += inside.mean() * abs(score[inside].mean() - right[inside].mean())
        expected.append(total)
    np.testing.assert_allclose(before, expected, atol=1e-3)
    after = temperature.calibration_error(temperature.apply(records, temperature.fit(records)))
    assert before[0] > 0.1 and before[1] > 0.1
    assert max(after) < 0.03


def test_the_error_of_an_exit_that_never_predicts_is_unknown(made):
    score = made[1].scores["max_prob"].copy()
    score[1] = -np.inf
    silent = dataclasses.replace(made[1], scores={"max_prob": score})
    assert [np.isnan(error) for error in temperature.calibration_error(silent)] == [
        False,
        True,
        False,
    ]


@pytest.mark.parametrize("function", [temperature.fit, lambda r: temperature.apply(r, np.ones(3))])
def test_records_must_hold_what_it_takes(made, function):
    with pytest.raises(ValueError, match="records lack what temperatures are fitted on; record"):
        function(dataclasses.replace(made[1], softened=None))


def test_bad_input(made):
    with pytest.raises(ValueError, match="fitted to labels, and some positions have none"):
        temperature.fit(dataclasses.replace(made[1], labels=np.full(N, -1, np.int32)))
    with pytest.raises(ValueError, match="the records have the temperatures .*, not all of"):
        temperature.apply(made[1], np.array([1.0, 1.0, 1.1]))
