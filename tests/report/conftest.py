import json

import pytest


def decoding_row(
    epsilon, speed, *, name=None, full_speed=50.0, agreement=1.0, depth=30.0, shares=(0, 0, 1, 0)
):
    return {
        "policy": name or ("full model" if epsilon is None else f"epsilon {epsilon:g}"),
        "epsilon": epsilon,
        "confidence": "max_prob",
        "tokens_per_second": speed,
        "speedup": speed / full_speed,
        "agreement": agreement,
        "mean_depth": depth,
        "exit_shares": list(shares),
    }


@pytest.fixture
def evaluation():
    """An evaluation of a 30-block model with two exits, as `launch.evaluate` saves it."""
    return {
        "model": {
            "source": "pip:tiny==1.0#sha256=00",
            "depth": 30,
            "exit_points": [6, 18],
            "head": "mlp",
            "output": "own",
            "classes": 4096,
            "init": "copy",
            "backbone_parameters": 134515008,
            "exit_parameters": 2000000,
        },
        "exits": [
            {"exit": 6, "loss": 3.9, "agreement": 0.31, "correct": 0.28, "coverage": 0.07},
            {"exit": 18, "loss": 3.1, "agreement": 0.44, "correct": 0.37, "coverage": 0.22},
            {"exit": 30, "loss": 2.4, "agreement": 1.0, "correct": 0.51, "coverage": 1.0},
        ],
        "decoding": [
            decoding_row(None, 50.0),
            decoding_row(0.9, 60.0, agreement=0.963, depth=24.5, shares=(0.2, 0.3, 0.5, 0)),
            decoding_row(0.8, 75.0, agreement=0.881, depth=19.0, shares=(0.4, 0.3, 0.3, 0)),
            decoding_row(None, 90.0, name="verified", depth=26.0, shares=(0.1, 0.1, 0.3, 0.5)),
        ],
        "prompts": 8,
        "new_tokens": 64,
        "text": "stdlib (test split)",
        "samples": [
            {
                "prompt": "say ",
                "policy": "epsilon 0.9",
                "pieces": ["one", " two", " three"],
                "depths": [6, 18, 30],
            }
        ],
        "machine": {"device": "cpu", "cores": 2, "jax": "0.10.2"},
    }


@pytest.fixture
def write_run(tmp_path, evaluation):
    """Changes the evaluation with a function and saves it as a run's; returns the folder."""

    def write(change=lambda evaluation: None):
        change(evaluation)
        (tmp_path / "evaluation.json").write_text(json.dumps(evaluation))
        return tmp_path

    return write
