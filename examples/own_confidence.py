"""A confidence of one's own: how far the best token's log-probability is above the runner-up's.

python examples/own_confidence.py tests/fixtures/tiny_chat
"""

import sys

import jax

import early_exit as ee


def log_odds(said) -> jax.Array:
    """What a head says (`early_exit.confidence.Summary`) → float32, larger where it is surer.

    Probabilities near 1 are all alike; in logarithms they are told apart.
    """
    return said.top - said.second


ee.register.confidence("log_odds", log_odds)


def main(source):
    model = ee.attach(ee.load(source), ee.ExitConfig((2, 4), head="norm"))
    texts = [ee.__doc__] * 8
    model = ee.tune(model, texts, steps=20, batch_size=2, sequence_length=64)
    records = ee.record(model, texts, batch_size=2, sequence_length=64)
    for name in ("max_prob", "log_odds"):
        stated = ee.calibrate(model, records, epsilon=0.8, confidence=name).policy.provenance
        print(
            f"{name}: {stated['coverage']:.1%} leave early, mean depth {stated['mean_depth']:.2f}"
        )


if __name__ == "__main__":
    main(sys.argv[1])
