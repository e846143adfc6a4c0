"""Labelled examples → batches for a classifier, by Grain.

    shuffle → batch of indices → random numbers → this process's rows → read, in threads → prepare

The one idea: what travels through the pipeline is indices and random numbers, made for the whole
batch by its number; only the rows of this process are read. A batch then depends on the seed and
the step alone, not on how many processes or threads made it.

A batch holds what `inputs` made (`images`, or `tokens` and `mask`), `labels`, int32 [B], and
`valid`, bool [B], false for rows that only fill the batch.
"""

from collections.abc import Callable, Sequence

import numpy as np

from early_exit.data.inputs import CHANCES, Prepare
from early_exit.data.parts import Example
from early_exit.data.stream import ALONE, EvaluationBatches, Rank, TrainingBatches, read_ahead
from early_exit.data.transforms import Batch


def training_batches(
    examples: Sequence[Example],
    prepare: Prepare,
    *,
    batch_size: int,
    seed: int,
    num_threads: int = 2,
    rank: Rank = ALONE,
) -> TrainingBatches:
    """Batches without end; a new order and new random numbers at each pass over the examples.

    Args:
      prepare: of `early_exit.data.inputs`; called from `num_threads` threads.
      batch_size: B, rows over all processes together.
      rank: whose rows to return.

    Raises:
      ValueError: no examples, or sizes that make no batches.
    """
    import grain  # not at the top: most commands need it late or never

    _check(examples, batch_size, rank)

    def chosen(indices: np.ndarray, random: np.random.Generator) -> Batch:
        return {
            "indices": indices,
            "valid": np.ones(batch_size, bool),
            "chances": random.random((batch_size, CHANCES)),
        }

    dataset = grain.MapDataset.range(len(examples)).seed(seed).shuffle().repeat().batch(batch_size)
    dataset = dataset.random_map(chosen).map(rank.rows)
    dataset = dataset.map(_reader(examples, prepare))
    return TrainingBatches(dataset.to_iter_dataset(read_ahead(num_threads)))


def evaluation_batches(
    examples: Sequence[Example],
    prepare: Prepare,
    *,
    batch_size: int,
    num_batches: int | None = None,
    num_threads: int = 2,
    rank: Rank = ALONE,
) -> EvaluationBatches:
    """Every example once and in order, or as many as the first `num_batches` batches hold.

    Nothing is augmented. The last batch is filled with copies of the last example, whose `valid`
    is false. Arguments as for `training_batches`.

    Raises:
      ValueError: no examples, or sizes that make no batches.
    """
    import grain

    _check(examples, batch_size, rank)
    if num_batches is not None and num_batches < 1:
        raise ValueError(f"num_batches must be positive, or None for all, not {num_batches}")

    def chosen(number: int) -> Batch:
        places = np.arange(number * batch_size, (number + 1) * batch_size)
        last = len(examples) - 1
        return {"indices": np.minimum(places, last), "valid": places <= last}

    batches = -(-len(examples) // batch_size)
    dataset = grain.MapDataset.range(min(batches, num_batches or batches)).map(chosen)
    dataset = dataset.map(rank.rows)
    return EvaluationBatches(dataset.map(_reader(examples, prepare)), read_ahead(num_threads))


def _check(examples: Sequence[Example], batch_size: int, rank: Rank) -> None:
    if not len(examples):
        raise ValueError("there are no examples to make batches from")
    rank.check(batch_size)


def _reader(examples: Sequence[Example], prepare: Prepare) -> Callable[[Batch], Batch]:
    def read(chosen: Batch) -> Batch:
        rows = [examples[index] for index in chosen["indices"]]
        labels = np.array([row["label"] for row in rows], np.int32)
        batch = prepare(rows, chosen.get("chances"))
        return batch | {"labels": labels, "valid": chosen["valid"]}

    return read
