"""Documents → batches in which rows are dealt to documents in turn, for calibration.

The one idea: positions of one document are alike, so what calibration learns depends on how many
documents it sees, not how many tokens. Packed rows show a few long documents whole; here every
document gets one row before any gets a second, and each position says whose it is.
"""

import itertools
from collections.abc import Callable, Iterator, Sequence

import numpy as np

from early_exit.data.stream import ALONE
from early_exit.data.transforms import Batch

Piece = tuple[int, np.ndarray]  # (document, tokens)


def batches(
    documents: Sequence[tuple[str, str]],
    tokenise: Callable[[str], list[int]],
    *,
    end_of_text: int,
    sequence_length: int,
    batch_size: int,
    num_batches: int | None = None,
) -> list[Batch]:
    """The first batches of pieces of documents, always the same ones; the last one is padded.

    Documents come in mixed order, and the pieces of each, cut end to end, too.

    Args:
      num_batches: None for as many as there are pieces for.

    Returns:
      int32 [B, T] `tokens`, `documents` (1; 0 is padding), `positions`, which count from 0 in each
      row, and `groups`, the document's index.

    Raises:
      ValueError: no document with a token to predict, or sizes that make no batches.
    """
    ALONE.check(batch_size)
    if sequence_length < 2:
        raise ValueError(f"sequence_length must be at least 2, not {sequence_length}")
    if num_batches is not None and num_batches < 1:
        raise ValueError(f"num_batches must be positive, or None for all, not {num_batches}")
    rows = None if num_batches is None else num_batches * batch_size
    order = np.random.default_rng(0).permutation(len(documents))
    cut = (_pieces(int(i), documents[i][1], tokenise, end_of_text, sequence_length) for i in order)
    taken = list(itertools.islice(_in_turn(cut), rows))
    if not taken:
        raise ValueError(f"the {len(documents)} documents hold no token to predict; give more text")
    return [
        _batch(taken[start : start + batch_size], batch_size, sequence_length)
        for start in range(0, len(taken), batch_size)
    ]


def _pieces(document: int, text: str, tokenise, end_of_text: int, length: int) -> list[Piece]:
    tokens = np.array([*tokenise(text), end_of_text], np.int32)
    pieces = [tokens[start : start + length] for start in range(0, len(tokens), length)]
    pieces = [(document, piece) for piece in pieces if len(piece) > 1]
    np.random.default_rng(document).shuffle(pieces)
    return pieces


def _in_turn(documents: Iterator[list[Piece]]) -> Iterator[Piece]:
    """The first piece of each, then the second of each, and so on; reads no sooner than needed."""
    waiting = []
    for pieces in documents:
        yield from pieces[:1]
        waiting.append(pieces[1:])
    for pieces in itertools.zip_longest(*waiting):
        yield from (piece for piece in pieces if piece is not None)


def _batch(pieces: Sequence[Piece], batch_size: int, length: int) -> Batch:
    batch = {
        name: np.zeros((batch_size, length), np.int32)
        for name in ("tokens", "documents", "positions", "groups")
    }
    for row, (document, tokens) in enumerate(pieces):
        batch["tokens"][row, : len(tokens)] = tokens
        batch["documents"][row, : len(tokens)] = 1
        batch["positions"][row] = np.arange(length)
        batch["groups"][row] = document
    return batch
