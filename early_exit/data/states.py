"""Cached hidden states: what a frozen backbone made of a text, as rows to tune exits on.

The one idea: to a head, a row is its tokens, the hidden states where the head stands, and what the
full model would have said. All three stay the same however often heads are tuned, so they are
stored once, and batches of rows are drawn from them like examples: shuffled anew at each pass.

A row holds, for T tokens, `tokens`, `segments` and `positions`, int32 [T]; for each exit point
`hidden_<point>`, bfloat16 [T, D]; and the full model's K most probable next tokens, `teacher_ids`,
uint16 or int32 [T, K], the most probable first, and `teacher_log_probs`, float16 [T, K].
"""

from collections.abc import Sequence

import grain
import ml_dtypes
import numpy as np
from safetensors import numpy as safetensors

from early_exit.data.shards import Store
from early_exit.data.stream import WHOLE, Share, TrainingBatches, read_ahead
from early_exit.data.transforms import Batch

# Beside the hidden states.
ALWAYS = ("tokens", "segments", "positions", "teacher_ids", "teacher_log_probs")


def hidden_name(point: int) -> str:
    return f"hidden_{point}"


def pack(row: Batch) -> bytes:
    """A row as a record: a safetensors file with the bits of bfloat16 as uint16."""
    bits = {
        name: array.view(np.uint16) if array.dtype == ml_dtypes.bfloat16 else array
        for name, array in row.items()
    }
    return safetensors.save({name: np.ascontiguousarray(array) for name, array in bits.items()})


def unpack(record: bytes, points: Sequence[int]) -> Batch:
    """The row of a record, with the hidden states at some of its exit points."""
    arrays = safetensors.load(record)
    row = {name: arrays[name] for name in ALWAYS}
    for point in points:
        row[hidden_name(point)] = arrays[hidden_name(point)].view(ml_dtypes.bfloat16)
    return row


def training_batches(
    store: Store,
    points: Sequence[int],
    *,
    batch_size: int,
    seed: int,
    num_threads: int = 2,
    share: Share = WHOLE,
) -> TrainingBatches:
    """Batches without end; each pass over the rows has an order of its own.

    Args:
      points: whose hidden states a batch holds.
      batch_size: B, rows over all processes together.
      share: whose rows to return.

    Raises:
      ValueError: sizes that make no batches; later, a damaged record.
    """
    share.check(batch_size)

    def read(indices: Batch) -> Batch:
        rows = [unpack(store[index], points) for index in indices["rows"]]
        return {name: np.stack([row[name] for row in rows]) for name in rows[0]}

    dataset = grain.MapDataset.range(len(store)).seed(seed).shuffle().repeat().batch(batch_size)
    dataset = dataset.map(lambda indices: {"rows": indices})
    dataset = dataset.map(share.rows).map(read)
    return TrainingBatches(dataset.to_iter_dataset(read_ahead(num_threads)))
