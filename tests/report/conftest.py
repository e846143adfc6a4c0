import json

import pytest

from early_exit import policy as policies

POLICY = policies.make([policies.NEVER, 0.875], method="ltt", alpha=0.05)


OWN = "ltt 0.05"
ATTACK = "<script>alert('x')</script>"


def decoding_row(
    policy, mode, speed, *, full_speed=50.0, agreement=1.0, blocks=30.0, shares=(0, 0, 1, 0)
):
    """A row as `tradeoff.compare` gives it, of a policy's name and a mode's."""
    of_epsilon = policy is not None and policy.startswith("epsilon")
    return {
        "policy": policy,
        "mode": mode,
        "epsilon": float(policy.split()[1]) if of_epsilon else None,
        "tokens_per_second": speed,
        "speedup": speed / full_speed,
        "seconds_to_last": 64 / speed + 0.25,
        "agreement": agreement,
        "blocks_per_token": blocks,
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
        "policy": policies.as_json(POLICY),
        "decoding": {
            "chosen": OWN,
            "rows": [
                decoding_row(None, None, 50.0),
                decoding_row(
                    OWN, "lossy", 60.0, agreement=0.963, blocks=24.5, shares=(0.2, 0.3, 0.5, 0)
                ),
                decoding_row(OWN, "deferred", 55.0, agreement=0.971, blocks=26.5),
                decoding_row(OWN, "verified: exits", 51.0, blocks=33.0),
                decoding_row(
                    OWN, "verified: exits + lookup", 85.0, blocks=46.0, shares=(0.1, 0.2, 0.3, 0.4)
                ),
                decoding_row(None, "verified: lookup", 90.0, blocks=40.0, shares=(0, 0, 0.5, 0.5)),
                decoding_row(
                    "epsilon 0.8",
                    "lossy",
                    75.0,
                    agreement=0.881,
                    blocks=19.0,
                    shares=(0.4, 0.3, 0.3, 0),
                ),
            ],
            "confidence": "max_prob",
            "prompts": 8,
            "prompt_tokens": 96,
            "new_tokens": 64,
            "rounds": 3,
        },
        "text": "stdlib (test split)",
        "samples": [
            {
                "prompt": "say ",
                "policy": OWN,
                "mode": "lossy",
                "pieces": ["one", " two", " three"],
                "depths": [6, 18, 30],
            }
        ],
        "explorer": {
            "confidence": "max_prob",
            "depths": [6, 18, 30],
            "costs": [0.25, 0.65, 1.0],
            "epsilons": [0.5, 0.75, 1.0],
            "thresholds": [[0.2, 0.1], [0.6, 0.5], ["never", 0.9]],
            "policy": ["never", 0.875],
            "speed": {"fixed": 0.1, "slope": 0.9, "points": 2},
            "words": {"1": "one", "2": " two", "3": "\n", "4": ""},
            "answers": [
                {
                    "prompt": "say ",
                    "pieces": ["one", " two", "\n", " two", "one"],
                    "said": [[1, 1, 3, 4, 1], [1, 2, 3, 1, 1], [1, 2, 3, 2, 1]],
                    "scores": [
                        [0.99, 0.3, 0.7, None, 0.6],
                        [0.99, 0.875, 0.2, 0.5, 0.95],
                        [0.9, 0.8, 0.7, 0.6, 0.5],
                    ],
                    "exits": [2, 1, 2, 2, 1],
                },
                {
                    "prompt": "again ",
                    "pieces": ["one", " two"],
                    "said": [[1, 1], [1, 2], [1, 2]],
                    "scores": [[0.1, 0.1], [0.2, 0.2], [0.3, 0.3]],
                    "exits": [2, 2],
                },
            ],
        },
        "left_out": None,
        "machine": {"device": "cpu", "cores": 2, "jax": "0.10.2"},
    }


def classifier_row(policy, accuracy, adds, ms, rate, **changes):
    return {
        "policy": policy,
        "accuracy": accuracy,
        "agreement": 0.97,
        "abstained": 0.0,
        "exit_shares": [0.5, 0.3, 0.2],
        "mean_depth": 3.1,
        "multiply_adds": adds,
        "bytes": 1e5,
        "latency": {"mean": ms, "p50": ms, "p95": 2 * ms, "p99": 3 * ms},
        "latency_ratio": ms / 4.0,
        "throughput": {"64": rate},
        "throughput_ratio": {"64": rate / 500},
        "joules": 2e-4,
        "programs": 9,
        **changes,
    }


@pytest.fixture
def classifier_evaluation():
    """An evaluation of a network of six blocks with two exits; nothing is looked into."""
    exits = [(2, 0.8, 0.85), (4, 0.88, 0.94), (6, 0.92, 1.0)]
    return {
        "model": {
            "source": "resnet_cifar (layers 14, width 8)",
            "depth": 6,
            "num_classes": 10,
            "exit_points": [2, 4],
            "head": "grid",
            "output": "own",
            "init": "random",
            "train": "all",
            "backbone_parameters": 40_000,
            "exit_parameters": 9_000,
        },
        "exits": [
            {"exit": depth, "loss": 0.3, "correct": right, "agreement": same, "coverage": 0.7}
            for depth, right, same in exits
        ],
        "parts": [
            {
                "exit": depth,
                "head_multiply_adds": 45_000,
                "head_bytes": 1_000,
                "multiply_adds": 2e6 * depth,
                "bytes": 1e5,
            }
            for depth, *_ in exits
        ],
        "classification": {
            "chosen": "epsilon 0.99",
            "rows": [
                classifier_row("full model", 0.92, 12e6, 4.0, 500.0, exit_shares=[0, 0, 1]),
                classifier_row("epsilon 0.99", 0.917, 5e6, 1.6, 900.0),
                classifier_row("epsilon 0.95", 0.90, 4e6, 1.2, 1200.0),
            ],
            "static": [classifier_row("small", 0.89, 4.5e6, 1.5, 1000.0, exit_shares=[1])],
            "curve": [{"accuracy": a, "multiply_adds": m} for a, m in ((0.8, 3e6), (0.917, 5e6))],
            "oracle": {
                "accuracy": 0.96,
                "mean_depth": 2.5,
                "multiply_adds": 4e6,
                "exit_shares": [0.8, 0.1, 0.1],
                "bytes": 1e5,
            },
            "confidence": "margin",
            "energy": "modelled",
            "singles": 200,
            "rounds": 5,
        },
        "policy": policies.as_json(policies.make([0.5, 0.6], "margin", epsilon=0.99)),
        "examples": {
            "first": [
                {"text": ATTACK, "label": "a", "prediction": "a", "right": True, "depth": 2,
                 "score": 0.99},
            ],
            "last": [
                {"text": "hard", "label": "b", "prediction": "c", "right": False, "depth": 6,
                 "score": 0.4},
            ],
        },
        "explorer": None,
        "data": {"source": "idx:data", "split": "test", "count": 10000},
        "machine": {"device": "cpu", "cores": 2, "jax": "0.10.2"},
    }  # fmt: skip


@pytest.fixture
def write_run(tmp_path, evaluation):
    """Changes the evaluation with a function and saves it as a run's; returns the folder."""

    def write(change=lambda evaluation: None):
        change(evaluation)
        (tmp_path / "evaluation.json").write_text(json.dumps(evaluation))
        return tmp_path

    return write
