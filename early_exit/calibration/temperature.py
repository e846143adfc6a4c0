"""One temperature for each head, so that a score of 0.9 is right nine times in ten.

Guo et al. 2017 ("On Calibration of Modern Neural Networks"): logits / T with the T of the lowest
cross-entropy. It changes no prediction.

The one idea: records hold the normalisers at a row of temperatures, from which losses and scores at
each of them follow exactly; so the best of that row is found, and used, without the model.

A better calibrated score need not route better: thresholds of each head's own make up for most of
what a temperature does to it. So look at what a policy does, not at the calibration error alone.
"""

import dataclasses

import numpy as np

from early_exit import confidence as confidences
from early_exit.calibration.records import Records

BINS = 15


def fit(records: Records) -> np.ndarray:
    """The temperature of the lowest mean cross-entropy at each exit, float64 [E + 1].

    Raises:
      ValueError: records without what it takes, or without labels.
    """
    kept = _softened(records)
    if (records.labels < 0).any():
        raise ValueError("temperatures are fitted to labels, and some positions have none")
    at_one = kept.log_normalizers[np.flatnonzero(kept.temperatures == 1)[0]]
    below = records.losses - at_one  # how far the label's logit is below the prediction's
    losses = [
        (below / temperature + normalizers).mean(axis=-1, dtype=np.float64)
        for temperature, normalizers in zip(kept.temperatures, kept.log_normalizers, strict=True)
    ]
    return kept.temperatures[np.argmin(losses, axis=0)]


def apply(records: Records, temperatures: np.ndarray) -> Records:
    """The records that the model would leave with logits divided by these, of those recorded.

    `max_prob` and `margin` change, what does not depend on the sharpness of logits stays, and what
    cannot be told (`untold`) goes.

    Raises:
      ValueError: records without what it takes, or a temperature that they do not have.
    """
    kept = _softened(records)
    at = [np.flatnonzero(kept.temperatures == temperature) for temperature in temperatures]
    if not all(map(len, at)):
        known = ", ".join(f"{temperature:g}" for temperature in kept.temperatures)
        raise ValueError(f"the records have the temperatures {known}, not all of {temperatures}")
    exits = np.arange(len(at))
    normalizers = kept.log_normalizers[np.concatenate(at), exits]
    top = np.exp(-normalizers)
    second = np.exp(-kept.second / np.float32(temperatures)[:, None] - normalizers)
    declines = records.score("max_prob") == -np.inf
    changed = {
        "max_prob": np.where(declines, -np.inf, top).astype(np.float32),
        "margin": np.where(declines, -np.inf, top - second).astype(np.float32),
    }
    scores = {name: score for name, score in records.scores.items() if name not in untold()}
    return dataclasses.replace(records, scores=scores | changed, softened=None)


def untold() -> set[str]:
    """Scores that cannot be told at another temperature from what records keep."""
    return {"entropy", *confidences.registered()}


def calibration_error(records: Records) -> list[float]:
    """Expected calibration error of `max_prob` at each exit, the final one last.

    Over `BINS` bins of equal width, the mean distance between how sure an exit is and how often it
    is right; where it predicts at all. NaN where it never does.
    """
    found = []
    for score, correct in zip(records.score("max_prob"), records.correct, strict=True):
        score, correct = score[score > -np.inf], correct[score > -np.inf]
        bins = np.minimum((score * BINS).astype(int), BINS - 1)
        gaps = np.bincount(bins, score.astype(np.float64) - correct, BINS)
        found.append(float(np.abs(gaps).sum() / len(score)) if len(score) else float("nan"))
    return found


def _softened(records: Records):
    if records.softened is None:
        raise ValueError("the records lack what temperatures are fitted on; record with soften")
    return records.softened
