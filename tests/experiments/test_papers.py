"""What papers' tables are made of, against slower ways to the same."""

import numpy as np
import pytest

from early_exit import policy as policies
from early_exit.calibration.records import Records
from experiments.papers import measures


@pytest.fixture
def records():
    rng = np.random.default_rng(0)
    scores = rng.integers(0, 12, (4, 80)).astype(np.float32) / 12
    scores[:3, :10] = -np.inf
    return Records(
        exit_depths=np.array([2, 3, 7, 10]),
        costs=np.array([2.0, 3.0, 7.0, 10.0]),
        scores={"max_prob": scores},
        predictions=rng.integers(0, 3, (4, 80)),
        labels=np.zeros(80, int),
        losses=np.zeros((4, 80)),
        groups=np.arange(80),
    )


@pytest.mark.parametrize("limit", [2, 2.5, 4, 7, 9.9, 10])
def test_one_threshold_spends_what_it_may(records, limit):
    """No higher one would be within the limit."""
    scores = records.score("max_prob")[:-1]

    def spent(threshold):
        exits = [next((e for e in range(3) if s[e] >= threshold), 3) for s in scores.T]
        return records.costs[exits].mean()

    found = measures.one_threshold(scores, records.costs, limit)
    assert spent(found) <= limit
    higher = [x for x in (*np.unique(scores), np.inf) if x > found]
    assert all(spent(x) > limit for x in higher)
    assert (found == np.inf) == (limit == 10)


def test_where_even_the_lowest_costs_more_it_is_the_lowest(records):
    scores = records.score("max_prob")[:-1]
    assert measures.one_threshold(scores, records.costs, 1.0) == -np.inf
    own = scores[:, 10:]
    assert measures.one_threshold(own, records.costs, 1.0) == own.min()


def test_those_who_leave_are_judged_where_they_leave(records):
    exits = policies.first_exit(records.score("max_prob")[:-1], [0.8, 0.7, 0.5])
    left = [i for i in range(80) if exits[i] < 3]
    agree = [records.predictions[exits[i], i] == records.predictions[3, i] for i in left]
    depth = np.mean([[2, 3, 7, 10][e] for e in exits]) / 10
    expected = (np.mean(agree), len(left) / 80, depth)
    assert measures.of_leavers(records, exits) == pytest.approx(expected)
    agree, leave, depth = measures.of_leavers(records, np.full(80, 3))
    assert np.isnan(agree) and (leave, depth) == (0, 1)


def test_the_oracle_leaves_at_the_first_that_agrees(records):
    said = records.predictions
    depths = [
        next(d for e, d in enumerate([2, 3, 7, 10]) if said[e, i] == said[3, i]) for i in range(80)
    ]
    assert measures.oracle_depth(records) == pytest.approx(np.mean(depths) / 10)
