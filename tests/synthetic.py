"""Records of a made-up model: each input has a difficulty, each exit a skill, scores are noisy."""

import numpy as np

from early_exit.calibration.records import Records


def records(positions, exits=3, seed=0, **changes):
    """Labels are 1; an exit is right (answers 1) with a chance that its score estimates."""
    rng = np.random.default_rng(seed)
    skill = np.linspace(0.3, 2.5, exits + 1)[:, None]
    ease = skill - rng.normal(size=positions) + 0.3 * rng.normal(size=(exits + 1, positions))
    right = rng.random(ease.shape) < 1 / (1 + np.exp(-2 * ease))
    score = 1 / (1 + np.exp(-2 * ease - rng.normal(size=ease.shape)))
    fields = {
        "exit_depths": np.arange(1, exits + 2) * 2,
        "costs": np.arange(1, exits + 2) * 1e6,
        "scores": {"max_prob": score.astype(np.float32)},
        "predictions": right.astype(np.int32),
        "labels": np.ones(positions, np.int32),
        "losses": np.zeros((exits + 1, positions), np.float32),
        "groups": np.arange(positions, dtype=np.int32),
        "metadata": {"heads": "ab12"},
    }
    return Records(**fields | changes)
