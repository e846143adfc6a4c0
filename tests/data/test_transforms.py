import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from early_exit.data import transforms

SEGMENTS = np.array([[1, 1, 2, 2, 2, 0], [1, 1, 1, 1, 1, 1], [0, 0, 0, 0, 0, 0]], np.int32)
BATCH = {"tokens": np.arange(18, dtype=np.int32).reshape(3, 6), "documents": SEGMENTS}


def test_a_target_is_the_next_token_of_the_same_segment():
    targets, mask = transforms.next_token_targets(BATCH)
    tokens = BATCH["tokens"]
    for row, t in itertools.product(range(3), range(6)):
        has_target = t < 5 and SEGMENTS[row, t] == SEGMENTS[row, t + 1] != 0
        assert mask[row, t] == has_target
        assert targets[row, t] == (tokens[row, t + 1] if has_target else 0)
    assert (targets.dtype, mask.dtype) == (np.int32, bool)


def test_targets_are_the_same_in_numpy_in_jax_and_jitted():
    expected = transforms.next_token_targets(BATCH)
    on_device = jax.tree.map(jnp.asarray, BATCH)
    for function in (transforms.next_token_targets, jax.jit(transforms.next_token_targets)):
        for got, want in zip(function(on_device), expected, strict=True):
            assert isinstance(got, jax.Array) and got.dtype == want.dtype
            np.testing.assert_array_equal(got, want)


@given(st.lists(st.integers(0, 6), min_size=1), st.integers(1, 7))
def test_frequent_tokens_are_sorted_by_count_then_id(tokens, count):
    tokens = np.array(tokens, np.int32)
    rows = [
        {"tokens": row[None], "documents": np.ones((1, 1), np.int32)} for row in tokens[:, None]
    ]
    found = transforms.frequent_tokens(rows, vocab_size=7, count=count)
    expected = sorted(range(7), key=lambda token: (-np.sum(tokens == token), token))[:count]
    assert found.tolist() == expected and found.dtype == np.int32


def test_padding_is_not_a_frequent_token():
    batch = {"tokens": np.array([[3, 0, 0, 0]]), "documents": np.array([[1, 0, 0, 0]])}
    assert transforms.frequent_tokens([batch], 5, 1).tolist() == [3]


def test_frequent_tokens_of_another_vocabulary_are_refused():
    with pytest.raises(ValueError, match="cannot choose 19 tokens from a vocabulary of 18"):
        transforms.frequent_tokens([BATCH], 18, 19)
    with pytest.raises(ValueError, match="token 11 lies outside the vocabulary of 10"):
        transforms.frequent_tokens([BATCH], 10, 3)
