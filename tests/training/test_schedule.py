import numpy as np
import pytest

from early_exit.training.schedule import ExitWeights, drop_rates, layerskip_weights


def over(weights: ExitWeights, steps: int) -> np.ndarray:
    return np.stack([weights(np.int32(step)) for step in range(steps)])


def test_weights_stay_unless_they_are_to_move():
    np.testing.assert_array_equal(over(ExitWeights((0.5, 2.0)), 3), [[0.5, 2.0]] * 3)


@pytest.mark.parametrize("path", ["linear", "cosine"])
def test_weights_move_from_start_to_end_and_stay_there(path):
    up = over(ExitWeights((0.5, 2.0), start=(0.0, 3.0), steps=8, path=path), 12)
    np.testing.assert_allclose(up[0], [0, 3])
    np.testing.assert_allclose(up[4], [0.25, 2.5], atol=1e-6)  # half-way, both are
    np.testing.assert_allclose(up[8:], [[0.5, 2.0]] * 4, atol=1e-6)
    assert (np.diff(up[:9, 0]) > 0).all() and (np.diff(up[:9, 1]) < 0).all()
    first, middle = up[1, 0] - up[0, 0], up[4, 0] - up[3, 0]
    assert np.isclose(first, middle) if path == "linear" else first < middle / 2


def test_a_rotation_gives_every_exit_its_turn():
    weights = ExitWeights((1.0,) * 7, curriculum="rotational", period=3)
    table = over(weights, 6)
    np.testing.assert_array_equal(table[:3].sum(0), np.ones(7))
    np.testing.assert_array_equal(table[:3], table[3:])
    assert set(table.sum(1)) == {2, 3}
    assert sorted(sum(weights.groups, ())) == list(range(7))
    for row in table:  # a group is computed together
        assert all(len({row[e] for e in group}) == 1 for group in weights.groups)


def test_a_gradual_curriculum_begins_with_the_last_exit():
    weights = ExitWeights((1.0, 2.0, 3.0), curriculum="gradual", period=2)
    expected = [[0, 0, 3], [0, 0, 3], [0, 2, 3], [0, 2, 3], [1, 2, 3], [1, 2, 3]]
    np.testing.assert_array_equal(over(weights, 6), expected)
    assert weights.groups == ((0,), (1,), (2,))


def test_layerskip_weights_are_those_of_the_paper():
    """Against sums written out, for six blocks."""
    scale, depth = 0.2, 6
    whole = [scale * sum(range(block + 1)) for block in range(depth - 1)]
    whole.append(depth - 1 + scale * sum(range(depth - 1)))
    expected = [whole[0] / whole[5], whole[1] / whole[5], whole[4] / whole[5]]
    np.testing.assert_allclose(layerskip_weights((1, 2, 5), depth, scale), expected)


def test_drop_rates_rise_to_the_last_block():
    rates = drop_rates(30, 0.1)
    assert rates[0] == 0 and np.isclose(rates[-1], 0.1)
    assert (np.diff(rates) > 0).all() and (np.diff(rates, 2) > 0).all()
    np.testing.assert_array_equal(drop_rates(1, 0.1), [0])
    with pytest.raises(ValueError, match=r"tune.layer_dropout must lie in \[0, 1\), not 1.0"):
        drop_rates(4, 1.0)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"start": (0.0,), "steps": 5}, "tune.start_weights has 1 values for 2 exits; give one"),
        ({"start": (0.0, 0.0)}, "tune.start_weights and tune.weight_steps belong together"),
        ({"steps": 5}, "tune.start_weights and tune.weight_steps belong together"),
        ({"path": "square"}, "unknown tune.weight_path 'square'; choose one of linear, cosine"),
        ({"curriculum": "no"}, "unknown tune.curriculum 'no'; choose one of all, rotational"),
        ({"period": 0}, "tune.curriculum_period must be at least 1, not 0"),
    ],
)
def test_bad_settings(settings, message):
    with pytest.raises(ValueError, match=message):
        ExitWeights((1.0, 1.0), **settings)
