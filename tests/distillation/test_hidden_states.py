"""Rows of cached states, without a model: what goes in comes out, and every pass sees every row."""

import json

import ml_dtypes
import numpy as np
import pytest

from early_exit.data import shards
from early_exit.data.stream import Rank
from early_exit.distillation import hidden_states

POINTS, LENGTH, WIDTH, K = (2, 4), 6, 5, 3


def row(number):
    rng = np.random.default_rng(number)
    hidden = {
        hidden_states.hidden_name(point): rng.normal(size=(LENGTH, WIDTH)).astype(
            ml_dtypes.bfloat16
        )
        for point in POINTS
    }
    return hidden | {
        "tokens": np.full(LENGTH, number, np.int32),
        "documents": np.ones(LENGTH, np.int32),
        "positions": np.arange(LENGTH, dtype=np.int32),
        "teacher_ids": rng.integers(0, 2**16, (LENGTH, K)).astype(np.uint16),
        "teacher_log_probs": rng.normal(size=(LENGTH, K)).astype(np.float16),
    }


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    folder = tmp_path_factory.mktemp("states")
    shards.begin(folder, {})
    for shard in range(2):
        shards.write(folder, shard, (hidden_states.pack(row(4 * shard + i)) for i in range(4)), {})
    return shards.Store(folder)


def batches(store, count, state=None, **changes):
    """The numbers of the rows in the next batches, and the state after them."""
    stream = hidden_states.training_batches(store, POINTS, **{"batch_size": 4, "seed": 0} | changes)
    if state is not None:
        stream.set_state(state)
    found = [next(stream)["tokens"][:, 0].tolist() for _ in range(count)]
    state = json.loads(json.dumps(stream.get_state()))
    stream.close()
    return found, state


def test_a_row_comes_back_bit_for_bit():
    given = row(7)
    found = hidden_states.unpack(hidden_states.pack(given), POINTS)
    assert found.keys() == given.keys()
    for name, array in given.items():
        assert found[name].dtype == array.dtype
        np.testing.assert_array_equal(found[name], array)
    some = hidden_states.unpack(hidden_states.pack(given), (4,))
    assert given.keys() - some.keys() == {"hidden_2"}


def test_a_batch_holds_whole_rows(store):
    stream = hidden_states.training_batches(store, (2,), batch_size=3, seed=1)
    batch = next(stream)
    stream.close()
    for i, number in enumerate(batch["tokens"][:, 0]):
        for name in batch:
            np.testing.assert_array_equal(batch[name][i], row(number)[name])
    assert "hidden_4" not in batch


def test_each_pass_has_every_row_in_an_order_of_its_own(store):
    found, _ = batches(store, 6)
    passes = [found[2 * i] + found[2 * i + 1] for i in range(3)]
    assert all(sorted(rows) == list(range(8)) for rows in passes)
    assert len({tuple(rows) for rows in passes}) == 3
    assert batches(store, 6, seed=1)[0] != found


def test_it_goes_on_where_it_was(store):
    whole, _ = batches(store, 7)
    first, state = batches(store, 3)
    rest, _ = batches(store, 4, state)
    assert first + rest == whole


def test_processes_share_each_batch(store):
    whole, state = batches(store, 3)
    parts = [batches(store, 3, rank=Rank(i, 2)) for i in range(2)]
    assert [a + b for a, b in zip(*(rows for rows, _ in parts), strict=True)] == whole
    assert [s for _, s in parts] == [state, state]
    with pytest.raises(ValueError, match="batch_size=3 is not a positive multiple of the 2"):
        hidden_states.training_batches(store, POINTS, batch_size=3, seed=0, rank=Rank(0, 2))
