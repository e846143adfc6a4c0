import numpy as np
import pytest

from early_exit.data import excerpts

END = 0


def tokenise(text):
    return [int(word) for word in text.split()]


def document(index, length):
    """Tokens that tell whose they are, and where they stand."""
    return str(index), " ".join(str(1000 * (index + 1) + i) for i in range(length))


DOCUMENTS = [document(i, length) for i, length in enumerate([9, 30, 3, 11, 0])]


def batches(documents=DOCUMENTS, **changes):
    options = {"end_of_text": END, "sequence_length": 5, "batch_size": 3}
    return excerpts.batches(documents, tokenise, **options | changes)


def rows(found):
    """(document, tokens) of every row that is not padding."""
    for batch in found:
        for tokens, documents, groups in zip(
            batch["tokens"], batch["documents"], batch["groups"], strict=True
        ):
            if documents.any():
                (group,) = set(groups.tolist())
                yield group, tokens[documents == 1].tolist()


def test_all_tokens_come_once_with_their_document():
    found = {group: [] for group in range(4)}
    for group, tokens in rows(batches()):
        found[group] += tokens
    for group, tokens in found.items():
        text = [*tokenise(DOCUMENTS[group][1]), END]
        # A last piece of one token has no next token, and is left out.
        assert sorted(tokens) == sorted(text[:-1] if len(text) % 5 == 1 else text)


def test_every_document_has_a_row_before_any_has_two():
    order = [group for group, _ in rows(batches())]
    assert sorted(order[:4]) == [0, 1, 2, 3]
    counts = {0: 0, 1: 0, 2: 0, 3: 0}
    sizes = {group: order.count(group) for group in counts}
    for group in order:
        counts[group] += 1
        assert all(n >= min(counts[group] - 1, sizes[g]) for g, n in counts.items())


def test_pieces_are_whole_stretches_in_mixed_order():
    pieces = [tokens for group, tokens in rows(batches()) if group == 1]
    starts = [tokens[0] - 2000 for tokens in pieces]
    assert sorted(starts) == list(range(0, 30, 5)) and starts != sorted(starts)
    assert all(np.diff(tokens).tolist() == [1] * 4 for tokens in pieces)


def test_fewer_batches_are_the_first_of_more():
    whole, first = batches(), batches(num_batches=1)
    assert len(first) == 1
    for name in ("tokens", "documents", "positions", "groups"):
        np.testing.assert_array_equal(first[0][name], whole[0][name])
        assert whole[-1][name].shape == (3, 5) and whole[-1][name].dtype == np.int32
    assert whole[0]["positions"][0].tolist() == [0, 1, 2, 3, 4]
    for one, other in zip(batches(), batches(), strict=True):
        np.testing.assert_array_equal(one["tokens"], other["tokens"])


def test_only_as_many_documents_are_read_as_there_are_rows():
    read = []

    class Lazy(list):
        def __getitem__(self, index):
            read.append(index)
            return super().__getitem__(index)

    batches(Lazy([document(i, 20) for i in range(50)]), num_batches=2)
    assert len(read) <= 7


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"documents": [document(0, 0)]}, "the 1 documents hold no token to predict; give more"),
        ({"documents": []}, "the 0 documents hold no token to predict; give more text"),
        ({"sequence_length": 1}, "sequence_length must be at least 2, not 1"),
        ({"batch_size": 0}, "batch_size=0 is not a positive multiple"),
        ({"num_batches": 0}, "num_batches must be positive, or None for all, not 0"),
    ],
)
def test_bad_input(changes, message):
    with pytest.raises(ValueError, match=message):
        batches(**changes)
