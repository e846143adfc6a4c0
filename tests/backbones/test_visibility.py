import jax.numpy as jnp
import numpy as np
import pytest

from early_exit.backbones.visibility import Visibility


def mask(length, **rules):
    return np.asarray(Visibility(**rules).mask(length))


def test_nobody_looks_ahead_or_into_another_document():
    np.testing.assert_array_equal(mask(4, causal=True)[0, 0], np.tri(4, dtype=bool))
    documents = jnp.array([[1, 1, 2, 2], [1, 2, 3, 3]])
    got = mask(4, causal=True, documents=documents)
    assert got.shape == (2, 1, 4, 4)
    assert got[0, 0].astype(int).tolist() == [
        [1, 0, 0, 0],
        [1, 1, 0, 0],
        [0, 0, 1, 0],
        [0, 0, 1, 1],
    ]
    assert got[1, 0].astype(int).tolist() == [
        [1, 0, 0, 0],
        [0, 1, 0, 0],
        [0, 0, 1, 0],
        [0, 0, 1, 1],
    ]
    # Documents that come again, and looking ahead.
    again = mask(3, documents=jnp.array([[1, 0, 1]]))[0, 0].astype(int).tolist()
    assert again == [[1, 0, 1], [0, 1, 0], [1, 0, 1]]


def test_a_window_is_of_the_positions_before():
    got = mask(5, causal=True, window=2)[0, 0].astype(int).tolist()
    assert got == [
        [1, 0, 0, 0, 0],
        [1, 1, 0, 0, 0],
        [0, 1, 1, 0, 0],
        [0, 0, 1, 1, 0],
        [0, 0, 0, 1, 1],
    ]
    got = mask(5, causal=True, window=2, documents=jnp.array([[1, 1, 1, 2, 2]]))[0, 0]
    assert got.astype(int).tolist()[2:] == [[0, 1, 1, 0, 0], [0, 0, 0, 1, 0], [0, 0, 0, 1, 1]]
    np.testing.assert_array_equal(mask(5, causal=True, window=5), mask(5, causal=True))


def test_a_window_goes_both_ways_where_nobody_is_ahead():
    assert mask(4, window=2)[0, 0].astype(int).tolist() == [
        [1, 1, 0, 0],
        [1, 1, 1, 0],
        [0, 1, 1, 1],
        [0, 0, 1, 1],
    ]
    got = mask(4, window=3, real=jnp.array([[True, True, False, True]]))[0, 0]
    assert got.astype(int).tolist() == [[1, 1, 0, 0], [1, 1, 0, 1], [1, 1, 0, 1], [0, 1, 0, 1]]
    assert mask(4, window=4).all()


def test_padding_is_seen_by_nobody():
    real = jnp.array([[True, False, True]])
    # One row for all queries: nothing is as large as all pairs.
    assert mask(3, real=real).tolist() == [[[[True, False, True]]]]
    assert Visibility().mask(3) is None


@pytest.mark.parametrize(
    "rules",
    [
        {},
        {"causal": True},
        {"causal": True, "window": 2},
        {"window": 2},
        {"documents": jnp.array([[0, 0, 1], [0, 1, 1]])},
        {"real": jnp.array([[True, False, True], [True, True, True]])},
    ],
)
def test_longer_rows_look_at_no_more(rules):
    visibility = Visibility(**rules)
    longer = np.broadcast_to(visibility.padded(3, 5).mask(5), (2, 1, 5, 5))
    before = np.ones((3, 3), bool) if not rules else visibility.mask(3)
    np.testing.assert_array_equal(longer[..., :3, :3], np.broadcast_to(before, (2, 1, 3, 3)))
    assert not longer[..., :3, 3:].any()
