import json

import numpy as np
import pytest

from early_exit import policy as policies
from early_exit.calibration import drift


def answers(count, seed, shares=(0.5, 0.2, 0.3), sureness=3.0):
    rng = np.random.default_rng(seed)
    return rng.choice(3, count, p=shares), rng.beta(sureness, 1, count).astype(np.float32)


def policy_of(exits, top):
    return policies.make([0.5, 0.5], drift=drift.histogram(exits, top, 3))


def test_the_index_is_that_of_credit_scoring():
    kept = {
        "edges": [[0.5], [0.5], []],
        "shares": [[0.3, 0.2], [0.1, 0.1], [0.3]],
        "positions": 10**9,
    }
    exits = np.repeat([0, 0, 1, 1, 2], [100_000, 300_000, 150_000, 50_000, 400_000])
    top = np.repeat([0.4, 0.5, 0.1, 0.9, 0.2], [100_000, 300_000, 150_000, 50_000, 400_000])
    pairs = [(0.3, 0.1), (0.2, 0.3), (0.1, 0.15), (0.1, 0.05), (0.3, 0.4)]
    expected = sum((now - was) * np.log(now / was) for was, now in pairs)
    assert drift.stability(kept, exits, top) == pytest.approx(expected, abs=1e-4)


def test_bins_hold_equal_shares_of_each_exit():
    exits, top = answers(5_000, 0)
    kept = drift.histogram(exits, top, 3)
    for e, shares in enumerate(kept["shares"]):
        assert len(shares) == drift.BINS
        np.testing.assert_allclose(shares, np.mean(exits == e) / drift.BINS, atol=1e-3)
    assert sum(map(sum, kept["shares"])) == pytest.approx(1)


@pytest.mark.parametrize("count", [drift.FEWEST, 5_000])
def test_chance_alone_makes_no_drift(count):
    policy = policy_of(*answers(2_000, 0))
    found = [
        drift.stability(policy.provenance["drift"], *answers(count, seed)) for seed in range(60)
    ]
    assert abs(np.mean(found)) < 0.01 and max(found) < drift.LIMIT / 2
    assert drift.warning(policy, *answers(count, 1)) is None


@pytest.mark.parametrize("changes", [{"shares": (0.2, 0.2, 0.6)}, {"sureness": 1.0}])
def test_other_exits_or_other_sureness_are_told(changes):
    policy = policy_of(*answers(2_000, 0))
    message = drift.warning(policy, *answers(1_000, 1, **changes))
    assert "unlike what the policy was calibrated on" in message
    assert "in calibration 50%" in message or "in calibration 49%" in message


def test_few_answers_tell_nothing():
    policy = policy_of(*answers(2_000, 0))
    assert drift.warning(policy, *answers(drift.FEWEST - 1, 1, shares=(0, 0, 1))) is None
    assert drift.warning(policies.make([0.5, 0.5]), *answers(2_000, 0)) is None


def test_exits_never_taken_ties_and_heads_that_decline():
    exits = np.repeat([0, 2], [300, 700])
    top = np.repeat([-np.inf, 0.7, 1.0], [100, 200, 700]).astype(np.float32)
    kept = drift.histogram(exits, top, 3)
    assert sum(kept["shares"][0]) == pytest.approx(0.3) and sum(kept["shares"][1]) == 0
    assert abs(drift.stability(kept, exits, top)) < 0.05
    assert drift.stability(kept, np.full(1_000, 1), np.full(1_000, 0.7)) > 1
    json.dumps(kept)
