import itertools
import json

import numpy as np
import pytest

from early_exit.data import pipeline
from early_exit.data.stream import Rank

END = 255
# Lengths that leave rows cut in every way: whole documents, long ones, empty ones.
LENGTHS = (3, 5, 1, 7, 0, 9, 2, 2, 40, 7, 15, 0, 8)
DOCUMENTS = [(str(i), chr(ord("a") + i) * length) for i, length in enumerate(LENGTHS)]


def tokenise(text):
    return list(text.encode())


def training(documents=DOCUMENTS, **changes):
    options = dict(end_of_text=END, sequence_length=8, batch_size=4, seed=3) | changes
    return pipeline.training_batches(documents, tokenise, **options)


def evaluation(documents=DOCUMENTS, **changes):
    options = dict(end_of_text=END, sequence_length=8, batch_size=4) | changes
    return pipeline.evaluation_batches(documents, tokenise, **options)


def take(batches, count):
    taken = list(itertools.islice(batches, count))
    batches.close()
    return taken


def assert_equal(batches, expected):
    assert len(batches) == len(expected)
    for batch, other in zip(batches, expected, strict=True):
        assert batch.keys() == other.keys()
        for name in batch:
            np.testing.assert_array_equal(batch[name], other[name])


def stream(batches):
    """Tokens in order, padding left out."""
    return np.concatenate([batch["tokens"][batch["documents"] != 0] for batch in batches])


def split_at_end(tokens):
    """The texts in a stream that ends with END."""
    *texts, rest = bytes(tokens.tolist()).split(bytes([END]))
    assert rest == b""
    return [text.decode() for text in texts]


def test_evaluation_holds_every_document_once_and_whole():
    batches = evaluation()
    assert sorted(split_at_end(stream(batches))) == sorted(text for _, text in DOCUMENTS)
    for batch in batches:
        for array in batch.values():
            assert array.shape == (4, 8) and array.dtype == np.int32
    # Only the end of the last batch is padding.
    padding = np.concatenate([batch["documents"].ravel() == 0 for batch in batches])
    assert (np.diff(padding.astype(int)) >= 0).all() and padding.sum() < 4 * 8


def test_training_holds_every_document_once_an_epoch_in_a_new_order():
    epoch = sum(LENGTHS) + len(LENGTHS)
    batches = take(training(), 3 * epoch // 32 + 1)
    tokens = stream(batches)
    epochs = [split_at_end(tokens[i * epoch : (i + 1) * epoch]) for i in range(3)]
    for texts in epochs:
        assert sorted(texts) == sorted(text for _, text in DOCUMENTS)
    assert len({tuple(texts) for texts in epochs}) == 3


def test_documents_and_positions_follow_the_documents():
    for batch in take(training(), 12):
        for row in range(4):
            segment, position = 1, 0
            for t in range(8):
                assert batch["documents"][row, t] == segment
                assert batch["positions"][row, t] == position
                ended = batch["tokens"][row, t] == END
                segment, position = (segment + 1, 0) if ended else (segment, position + 1)


def test_batches_depend_on_the_seed_and_not_on_threads():
    expected = take(training(), 12)
    for num_threads in (0, 1, 5):
        assert_equal(take(training(num_threads=num_threads), 12), expected)
    assert not np.array_equal(stream(take(training(seed=4), 12)), stream(expected))


@pytest.mark.parametrize("make", [lambda **kw: take(training(**kw), 9), evaluation])
def test_the_processes_rows_make_up_the_one_process_batch(make):
    shares = [make(rank=Rank(i, 2)) for i in range(2)]
    joined = [
        {name: np.concatenate([rows[name] for rows in parts]) for name in parts[0]}
        for parts in zip(*shares, strict=True)
    ]
    assert_equal(joined, make())


def test_resume_through_json_is_exact_from_every_step():
    batches, states, taken = training(), [], []
    for _ in range(25):
        states.append(json.dumps(batches.get_state()))
        taken.append(next(batches))
    batches.close()
    for step, state in enumerate(states[:-5]):
        resumed = training()
        resumed.set_state(json.loads(state))
        assert json.loads(json.dumps(resumed.get_state())) == json.loads(state)
        assert_equal(take(resumed, 5), taken[step : step + 5])


def test_a_cap_takes_the_first_batches():
    assert_equal(evaluation(num_batches=2), evaluation()[:2])
    assert_equal(evaluation(num_batches=100), evaluation())


def test_text_shorter_than_a_batch_repeats_in_training_and_is_padded_in_evaluation():
    (batch,) = evaluation([("a", "ab")])
    assert batch["tokens"][0].tolist() == [97, 98, END, 0, 0, 0, 0, 0]
    assert batch["documents"].sum() == 3
    assert split_at_end(stream(take(training([("a", "abc")]), 1))) == ["abc"] * 8


@pytest.mark.parametrize("make", [training, evaluation])
@pytest.mark.parametrize(
    "options, message",
    [
        (dict(documents=[]), "there are no documents"),
        (dict(sequence_length=1), "sequence_length must be at least 2, not 1"),
        (dict(batch_size=0), "batch_size=0 is not a positive multiple"),
        (dict(rank=Rank(0, 3)), "batch_size=4 is not a positive multiple of the 3 processes"),
    ],
)
def test_sizes_that_make_no_batch_are_errors(make, options, message):
    with pytest.raises(ValueError, match=message):
        make(**options)


def test_evaluation_without_a_token_to_predict_is_an_error():
    with pytest.raises(ValueError, match="the 2 documents are too short for one batch"):
        evaluation([("a", ""), ("b", "")])
    with pytest.raises(ValueError, match="num_batches must be positive, or None for all, not 0"):
        evaluation(num_batches=0)


def test_an_error_in_the_text_reaches_the_caller():
    class Broken(list):
        def __getitem__(self, index):
            raise ValueError("book.txt is not UTF-8 text")

    with pytest.raises(ValueError, match="book.txt is not UTF-8 text"):
        take(training(Broken(DOCUMENTS)), 1)
    with pytest.raises(ValueError, match="book.txt is not UTF-8 text"):
        evaluation(Broken(DOCUMENTS))
