import itertools
import json
import threading

import numpy as np
import pytest

from early_exit.data import labelled
from early_exit.data.inputs import image_inputs, text_inputs
from early_exit.data.stream import Rank

# Each image has one value of its own, so that cropping does not hide which one it is.
IMAGES = [{"image": np.full((8, 8, 1), 10 + i, np.uint8), "label": i % 3} for i in range(11)]
PIXELS = image_inputs([0], [1 / 255], augment="crop_flip")
TEXTS = [{"text": "x" * i, "label": i} for i in range(1, 7)]


def training(examples=IMAGES, prepare=PIXELS, **changes):
    return labelled.training_batches(examples, prepare, **dict(batch_size=4, seed=3) | changes)


def evaluation(examples=IMAGES, prepare=PIXELS, **changes):
    return labelled.evaluation_batches(examples, prepare, **dict(batch_size=4) | changes)


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


def order(batches):
    """Which example each row is."""
    return [int(round(image.max())) - 10 for batch in batches for image in batch["images"]]


def joined(shares):
    return [
        {name: np.concatenate([rows[name] for rows in parts]) for name in parts[0]}
        for parts in zip(*shares, strict=True)
    ]


def test_training_holds_every_example_once_an_epoch_in_a_new_order():
    batches = take(training(), 11)  # four epochs of eleven
    found = np.array(order(batches)).reshape(4, 11)
    assert (np.sort(found) == np.arange(11)).all()
    assert len(np.unique(found, axis=0)) == 4
    labels = np.concatenate([batch["labels"] for batch in batches])
    assert (labels == found.ravel() % 3).all()
    for batch in batches:
        assert batch["images"].shape == (4, 8, 8, 1) and batch["images"].dtype == np.float32
        assert batch["labels"].dtype == np.int32
        assert batch["valid"].dtype == bool and batch["valid"].all()


def test_the_same_example_is_augmented_anew_each_time():
    batches = take(training(IMAGES[:1]), 10)
    images = np.concatenate([batch["images"] for batch in batches])
    assert len(np.unique(images, axis=0)) > 6  # of nine windows; the image is its own mirror


def test_batches_depend_on_the_seed_and_not_on_threads():
    expected = take(training(), 12)
    for num_threads in (0, 1, 5):
        assert_equal(take(training(num_threads=num_threads), 12), expected)
    assert order(take(training(seed=4), 12)) != order(expected)


@pytest.mark.parametrize(
    "make", [lambda **kw: take(training(**kw), 9), lambda **kw: list(evaluation(**kw))]
)
@pytest.mark.parametrize("count", [2, 4])
def test_the_processes_rows_make_up_the_one_process_batch(make, count):
    shares = [make(rank=Rank(i, count)) for i in range(count)]
    assert_equal(joined(shares), make())


def test_a_process_reads_no_others_rows():
    class Counted(list):
        reads = 0

        def __getitem__(self, index):
            self.reads += 1
            return super().__getitem__(index)

    examples = Counted(IMAGES)
    next(batches := training(examples, rank=Rank(1, 2), num_threads=0))
    batches.close()
    assert examples.reads == 2


def test_resume_through_json_is_exact_from_every_step():
    batches, states, taken = training(), [], []
    for _ in range(12):
        states.append(json.dumps(batches.get_state()))
        taken.append(next(batches))
    batches.close()
    for step, state in enumerate(states[:-3]):
        resumed = training()
        resumed.set_state(json.loads(state))
        assert json.loads(json.dumps(resumed.get_state())) == json.loads(state)
        assert_equal(take(resumed, 3), taken[step : step + 3])


def test_another_number_of_processes_goes_on_where_one_stopped():
    batches = training()
    for _ in range(5):
        next(batches)
    state = batches.get_state()
    expected = take(batches, 3)
    shares = []
    for index in range(2):
        rank = training(rank=Rank(index, 2))
        rank.set_state(state)
        shares.append(take(rank, 3))
    assert_equal(joined(shares), expected)


def test_evaluation_holds_every_example_once_in_order_without_augmentation():
    batches = evaluation()
    assert len(batches) == len(list(batches)) == 3
    assert order(batches) == [*range(11), 10]
    assert np.concatenate([batch["valid"] for batch in batches]).tolist() == [True] * 11 + [False]
    assert np.concatenate([batch["labels"] for batch in batches]).tolist() == [
        *(i % 3 for i in range(11)),
        1,
    ]
    for batch in batches:
        assert (batch["images"] == batch["images"][:, :1, :1]).all()
    assert_equal(list(batches), list(batches))


def test_a_cap_takes_the_first_batches():
    assert_equal(list(evaluation(num_batches=2)), list(evaluation())[:2])
    assert len(evaluation(num_batches=100)) == 3


def test_fewer_examples_than_a_batch():
    (batch,) = evaluation(IMAGES[:1])
    assert batch["valid"].tolist() == [True, False, False, False]
    assert order(take(training(IMAGES[:1]), 2)) == [0] * 8


def test_texts():
    prepare = text_inputs(lambda text: [1] * len(text), sequence_length=4, pad_id=0)
    batches = list(evaluation(TEXTS, prepare))
    assert [batch.keys() for batch in batches] == [{"tokens", "mask", "labels", "valid"}] * 2
    lengths = [batch["mask"].sum(1).tolist() for batch in batches]
    assert lengths == [[1, 2, 3, 4], [4, 4, 4, 4]]
    (batch,) = take(training(TEXTS, prepare, num_threads=0), 1)
    assert (batch["mask"].sum(1) == np.minimum(batch["labels"], 4)).all()


def test_threads_end_when_nobody_waits_for_batches():
    before = set(threading.enumerate())
    for _ in evaluation():
        break
    batches = training()
    next(batches)
    batches.close()
    for thread in set(threading.enumerate()) - before:
        thread.join(timeout=10)
        assert not thread.is_alive()


@pytest.mark.parametrize("make", [training, evaluation])
@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(examples=[]), "there are no examples to make batches from"),
        (dict(batch_size=0), "batch_size=0 is not a positive multiple"),
        (dict(rank=Rank(0, 3)), "batch_size=4 is not a positive multiple of the 3 processes"),
    ],
)
def test_sizes_that_make_no_batch_are_errors(make, options, message):
    with pytest.raises(ValueError, match=message):
        make(**options)
    with pytest.raises(ValueError, match="num_batches must be positive, or None for all, not 0"):
        evaluation(num_batches=0)


def test_an_error_in_an_example_reaches_the_caller():
    class Broken(list):
        def __getitem__(self, index):
            raise ValueError("a.png is not a readable image")

    with pytest.raises(ValueError, match="a.png is not a readable image"):
        take(training(Broken(IMAGES)), 1)
    with pytest.raises(ValueError, match="a.png is not a readable image"):
        list(evaluation(Broken(IMAGES)))
