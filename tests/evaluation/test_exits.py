import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest

from conftest import build
from early_exit.backbones import base
from early_exit.evaluation import exits


def packed(seed=0):
    """Two rows: one document, then two documents and padding."""
    tokens = np.random.default_rng(seed).integers(0, 61, (2, 12)).astype(np.int32)
    segments = np.array([[1] * 12, [1] * 5 + [2] * 4 + [0] * 3], np.int32)
    positions = np.array([range(12), [*range(5), *range(4), 0, 0, 0]], np.int32)
    return {"tokens": tokens, "segments": segments, "positions": positions}


def softmax(x):
    e = np.exp(x.astype(np.float64) - x.max())
    return e / e.sum()


@pytest.mark.parametrize("head", [{}, {"head": "layer", "classes": 20}], ids=["all", "reduced"])
def test_records_equal_a_position_by_position_count(head):
    model, params = build(**head)
    batch = packed()
    records = exits.record(model, params, [batch], origin="here")
    bound = model.bind(params)
    hidden, context = bound.backbone.stem({k: jnp.asarray(v) for k, v in batch.items()})
    states = [hidden, *bound.hidden_at_exits(hidden, context, (2, 4, 6))]
    final = np.asarray(bound.backbone.readout(states[-1]))
    ids = np.arange(61) if bound.token_ids is None else np.asarray(bound.token_ids)

    # Every position whose next token is of the same document, row by row.
    where = [(0, t) for t in range(11)] + [(1, t) for t in (0, 1, 2, 3, 5, 6, 7)]
    assert records.agrees.shape == (2, len(where))
    for e, (head, table) in enumerate(zip(bound.heads, bound.exit_tables(), strict=True)):
        logits = np.asarray(base.logits(head.features(states[e + 1], context)[0], table))
        for n, (b, t) in enumerate(where):
            probs, label = softmax(logits[b, t]), batch["tokens"][b, t + 1]
            best = ids[probs[: len(ids)].argmax()]
            position = ids.tolist().index(label) if label in ids else len(ids)
            assert records.agrees[e, n] == (best == final[b, t].argmax())
            assert records.correct[e, n] == (best == label)
            np.testing.assert_allclose(records.losses[e, n], -np.log(probs[position]), atol=1e-4)
            declines = probs.argmax() == len(ids)
            expected = -np.inf if declines else probs[: len(ids)].max()
            np.testing.assert_allclose(records.scores["max_prob"][e, n], expected, atol=1e-5)
            before, after = np.asarray(states[e])[b, t], np.asarray(states[e + 1])[b, t]
            cosine = before @ after / np.linalg.norm(before) / np.linalg.norm(after)
            np.testing.assert_allclose(records.scores["similarity"][e, n], cosine, atol=1e-5)
    for n, (b, t) in enumerate(where):
        label = batch["tokens"][b, t + 1]
        loss = -np.log(softmax(final[b, t])[label])
        np.testing.assert_allclose(records.losses[2, n], loss, atol=1e-4)
        assert records.correct[2, n] == (final[b, t].argmax() == label)
    assert records.metadata == {"origin": "here"}


def test_batches_are_joined_in_order(tiny):
    model, params = tiny
    first, second = packed(1), packed(2)
    both = exits.record(model, params, [first, second])
    parts = [exits.record(model, params, [batch]) for batch in (first, second)]
    np.testing.assert_array_equal(both.losses, np.concatenate([p.losses for p in parts], axis=1))
    np.testing.assert_array_equal(both.agrees, np.concatenate([p.agrees for p in parts], axis=1))


def test_no_batch_is_an_error(tiny):
    with pytest.raises(ValueError, match="no batch to record; give more held-out text"):
        exits.record(*tiny, [])


def test_summary_has_a_row_per_exit_and_counts_shares(tiny):
    records = exits.record(*tiny, [packed()])
    agrees = np.zeros_like(records.agrees)
    agrees[0, :9] = True
    scores = records.scores | {"max_prob": np.tile(np.linspace(1, 0, 18, dtype="f"), (2, 1))}
    rows = exits.summary(dataclasses.replace(records, agrees=agrees, scores=scores))
    assert [row["exit"] for row in rows] == [2, 4, 6]
    assert [row["agreement"] for row in rows] == [0.5, 0.0, 1.0]
    assert [row["coverage"] for row in rows] == [0.5, 0.0, 1.0]
    np.testing.assert_allclose([row["loss"] for row in rows], records.losses.mean(1), rtol=1e-6)
