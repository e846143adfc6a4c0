import jax.numpy as jnp
import numpy as np
import pytest

from conftest import TINY
from early_exit.decoding import cache


@pytest.mark.parametrize("batch", [1, 3])
def test_rows_are_stored_where_each_batch_row_ends(batch):
    store = cache.empty(TINY, (2,), batch, 256, jnp.float32)
    assert list(store) == [*(f"block/{i}" for i in range(6)), "exit/2"]
    rows = np.random.default_rng(0).normal(size=(2, batch, 3, 2, 6)).astype(np.float32)
    starts = np.array([5, 0, 253])[:batch]
    written = cache.write(store, {"block/4": tuple(map(jnp.array, rows))}, jnp.array(starts))
    for part in range(2):
        expected = np.zeros((batch, 2, 256, 6), np.float32)
        for b, start in enumerate(starts):
            expected[b, :, start : start + 3] = rows[part, b].swapaxes(0, 1)
        np.testing.assert_array_equal(written["block/4"][part], expected)
    for name in store.keys() - {"block/4"}:
        assert not np.asarray(written[name][0]).any()


def test_buckets_are_few_and_large_enough():
    buckets = {n: cache.bucket(n) for n in range(1, 8193)}
    assert set(buckets.values()) == {256, 512, 1024, 2048, 4096, 8192}
    assert all(n <= slots < max(2 * n, 257) for n, slots in buckets.items())
