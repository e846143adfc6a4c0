"""Documents → packed batches of tokens, by Grain.

    shuffle → tokenise, in threads → join end to end → cut into rows → batch → this process's rows

The one idea: every process walks the same stream of batches and keeps its own rows. A batch then
depends on the seed and the step alone, not on how many processes or threads made it, and one
small JSON state, the same in all processes, resumes any of them.

A batch holds int32 [B, T] arrays: `tokens`; `documents`, which number the documents in a row from
1 (0 is padding); `positions`, which count from 0 in each segment. A document cut at the end of a
row goes on in the next row as a new segment.
"""

import functools
import itertools
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import numpy as np

from early_exit.data.stream import ALONE, BATCHES_AHEAD, Rank, TrainingBatches
from early_exit.data.transforms import Batch, next_token_targets

if TYPE_CHECKING:
    import grain

Documents = Sequence[tuple[str, str]]  # (name, text)
Tokenise = Callable[[str], list[int]]

# Documents tokenised ahead of the one asked for.
_DOCUMENTS_AHEAD = 64


def training_batches(
    documents: Documents,
    tokenise: Tokenise,
    *,
    end_of_text: int,
    sequence_length: int,
    batch_size: int,
    seed: int,
    num_threads: int = 2,
    rank: Rank = ALONE,
) -> TrainingBatches:
    """Batches without end.

    Args:
      documents: (name, text) pairs.
      tokenise: text → token ids; called from `num_threads` threads.
      end_of_text: id appended to each document.
      sequence_length: T, tokens in a row.
      batch_size: rows over all processes together.
      rank: whose rows to return.

    Raises:
      ValueError: no documents, or sizes that make no batches.
    """
    import grain  # not at the top: most commands need it late or never

    _check(documents, sequence_length, batch_size, rank)
    dataset = grain.MapDataset.source(documents).seed(seed).shuffle().repeat()
    dataset = _rows(dataset, tokenise, end_of_text, sequence_length, num_threads)
    dataset = dataset.batch(batch_size).map(rank.rows)
    return TrainingBatches(
        grain.experimental.ThreadPrefetchIterDataset(dataset, prefetch_buffer_size=BATCHES_AHEAD)
    )


def evaluation_batches(
    documents: Documents,
    tokenise: Tokenise,
    *,
    end_of_text: int,
    sequence_length: int,
    batch_size: int,
    num_batches: int | None = None,
    num_threads: int = 2,
    rank: Rank = ALONE,
) -> list[Batch]:
    """Every document once, or as many as the first `num_batches` batches hold.

    The order is always the same, and mixed, so that a few batches are a fair sample. The last
    batch is padded to full size. Arguments as for `training_batches`.

    Raises:
      ValueError: no documents, sizes that make no batches, or text without a token to predict.
    """
    import grain

    _check(documents, sequence_length, batch_size, rank)
    if num_batches is not None and num_batches < 1:
        raise ValueError(f"num_batches must be positive, or None for all, not {num_batches}")
    dataset = grain.MapDataset.source(documents).seed(0).shuffle()
    dataset = _rows(dataset, tokenise, end_of_text, sequence_length, num_threads)
    pad = functools.partial(grain.experimental.batch_and_pad, batch_size=batch_size)
    iterator = iter(dataset.batch(batch_size, batch_fn=pad))
    batches = list(itertools.islice(iterator, num_batches))
    iterator.close()
    if not any(next_token_targets(batch)[1].any() for batch in batches):
        raise ValueError(
            f"the {len(documents)} documents are too short for one batch: they hold no token to "
            "predict; give more text"
        )
    return [rank.rows(batch) for batch in batches]


def _check(documents: Documents, sequence_length: int, batch_size: int, rank: Rank):
    if not len(documents):
        raise ValueError("there are no documents to make batches from")
    if sequence_length < 2:
        raise ValueError(f"sequence_length must be at least 2, not {sequence_length}")
    rank.check(batch_size)


def _rows(dataset, tokenise, end_of_text, sequence_length, num_threads) -> "grain.IterDataset":
    import grain

    def tokens(document: tuple[str, str]) -> Batch:
        _, text = document
        return {"tokens": np.array([*tokenise(text), end_of_text], np.int32)}

    def renamed(row: Batch) -> Batch:
        return {
            "tokens": row["tokens"],
            "documents": row["tokens_segment_ids"],
            "positions": row["tokens_positions"],
        }

    # The threads work ahead and hand over in order, so their number changes nothing but time.
    dataset = dataset.map(tokens).to_iter_dataset(
        grain.ReadOptions(num_threads=num_threads, prefetch_buffer_size=_DOCUMENTS_AHEAD)
    )
    return grain.experimental.ConcatThenSplitIterDataset(
        dataset, length_struct={"tokens": sequence_length}
    ).map(renamed)
