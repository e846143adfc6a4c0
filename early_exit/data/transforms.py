"""Small functions of packed batches: made by hand, what to predict, which tokens are frequent."""

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

Batch = dict[str, Any]


def one_a_row(
    texts: Sequence[Sequence[int] | np.ndarray], length: int, rows: int | None = None
) -> Batch:
    """Texts as a batch, each alone in a row: `tokens`, `documents`, `positions`, int32 [B, length].

    Args:
      texts: token ids, at most `length` of each.
      rows: of the batch, those behind the texts being padding; as many as texts by default.
    """
    tokens = np.zeros((len(texts) if rows is None else rows, length), np.int32)
    documents = np.zeros_like(tokens)
    for row, text in enumerate(texts):
        tokens[row, : len(text)] = text
        documents[row, : len(text)] = 1
    positions = np.broadcast_to(np.arange(length, dtype=np.int32), tokens.shape).copy()
    return {"tokens": tokens, "documents": documents, "positions": positions}


def next_token_targets(batch: Batch) -> tuple[Any, Any]:
    """Targets int32 [B, T] and a mask bool [B, T] of the positions that have one.

    The target of position t is the token at t + 1 of the same row. The last position of a row,
    a position whose next token belongs to another segment, and padding (segment 0) have none;
    their targets are 0. Works on numpy and jax arrays, inside jit too.
    """
    tokens, documents = batch["tokens"], batch["documents"]
    xp = tokens.__array_namespace__()
    last = xp.zeros_like(tokens[:, :1])
    following = xp.concatenate([documents[:, 1:], last], axis=1)
    mask = (documents == following) & (documents != 0)
    targets = xp.concatenate([tokens[:, 1:], last], axis=1)
    return xp.where(mask, targets, 0), mask


def frequent_tokens(batches: Iterable[Batch], vocab_size: int, count: int) -> np.ndarray:
    """The `count` most frequent tokens, int32 [count], most frequent first, ties by id.

    Padding is not counted. `batches` must end: take a slice of a training pipeline.

    Raises:
      ValueError: `count` above `vocab_size`, or a token outside the vocabulary.
    """
    if not 0 < count <= vocab_size:
        raise ValueError(f"cannot choose {count} tokens from a vocabulary of {vocab_size}")
    totals = np.zeros(vocab_size, np.int64)
    for batch in batches:
        tokens = np.asarray(batch["tokens"])[np.asarray(batch["documents"]) != 0]
        found = np.bincount(tokens, minlength=vocab_size)
        if len(found) > vocab_size:
            raise ValueError(
                f"token {len(found) - 1} lies outside the vocabulary of {vocab_size}: "
                "the text was tokenised for another model"
            )
        totals += found
    return np.argsort(-totals, kind="stable")[:count].astype(np.int32)
