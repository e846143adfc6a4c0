"""How good each exit is: one pass over held-out text, every position scored at every exit."""

import functools
from collections.abc import Iterable

import jax
import jax.numpy as jnp
import numpy as np

from early_exit import confidence as confidences
from early_exit.backbones import base
from early_exit.calibration.records import Records
from early_exit.calibration.thresholds import coverage_at
from early_exit.data.transforms import next_token_targets
from early_exit.exits.multi_exit import MultiExit

# Positions whose full-vocabulary logits exist at a time.
ROWS = 128


@functools.partial(jax.jit, static_argnames="model")
def score_batch(params: base.Params, batch: dict, *, model: MultiExit) -> dict:
    """Every exit's scores and outcomes on a packed batch.

    Args:
      batch: `tokens`, `segments`, `positions`, int32 [B, T].

    Returns:
      scores {name: [E, N]}, prediction [E + 1, N], loss [E + 1, N], labels [N], mask [N] with
      N = B·T; `mask` is false where the next token is not known.
    """
    bound = model.bind(params)
    hidden, context = bound.backbone.stem(batch)
    at_exits = list(bound.hidden_at_exits(hidden, context, model.exit_depths.tolist()))
    labels_BT, mask_BT = next_token_targets(batch)
    labels = labels_BT.reshape(-1)

    def statistics(features, table, token_ids):
        """Per position: summary, predicted token and loss, logits made `ROWS` at a time."""
        reduced = token_ids is not None
        classes = labels
        if reduced:
            count = len(token_ids)
            inverse = jnp.full(model.config.vocab_size, count).at[token_ids].set(jnp.arange(count))
            classes = inverse[labels]

        def one(position):
            feature, label_class = position
            values = base.logits(feature, table)
            summary = confidences.summarize(values, has_rest=reduced)
            return summary, jax.nn.logsumexp(values) - values[label_class]

        flat = features.reshape(-1, features.shape[-1])
        summary, loss = jax.lax.map(one, (flat, classes), batch_size=ROWS)
        token = token_ids[summary.prediction] if reduced else summary.prediction
        return summary, token, loss

    tokens, losses = [], []
    scores = {name: [] for name in confidences.NAMES if name != "gate" or model.exits.gate}
    predicted, agreeing = jnp.full_like(labels, -1), jnp.zeros_like(labels)
    for head, table, before, after in zip(
        bound.heads, bound.exit_tables(), (hidden, *at_exits), at_exits, strict=False
    ):
        features, _ = head.features(after, context)
        summary, token, loss = statistics(features, table, bound.token_ids)
        tokens.append(token)
        losses.append(loss)
        agreeing = confidences.agreeing(summary, predicted, agreeing)
        predicted = confidences.said(summary)
        for name in confidences.FROM_LOGITS:
            scores[name].append(confidences.from_logits(name, summary, agreeing))
        scores["similarity"].append(confidences.similarity(before, after).reshape(-1))
        if model.exits.gate:
            scores["gate"].append(head.gate_score(after).reshape(-1))
    _, token, loss = statistics(
        bound.backbone.features(at_exits[-1]), bound.backbone.output_table(), None
    )
    return {
        "scores": {name: jnp.stack(values) for name, values in scores.items()},
        "prediction": jnp.stack([*tokens, token]),
        "loss": jnp.stack([*losses, loss]),
        "labels": labels,
        "mask": mask_BT.reshape(-1) > 0,
    }


def record(model: MultiExit, params: base.Params, batches: Iterable[dict], **metadata) -> Records:
    """Runs the model over `batches` and keeps every position with a known next token."""
    parts = []
    for batch in batches:
        out = jax.device_get(score_batch(params, batch, model=model))
        keep = out.pop("mask")
        parts.append(jax.tree.map(lambda x, keep=keep: x[..., keep], out))
    if not parts:
        raise ValueError("no batch to record; give more held-out text")
    whole = jax.tree.map(lambda *xs: np.concatenate(xs, axis=-1), *parts)
    return Records(
        exit_depths=model.exit_depths,
        scores=whole["scores"],
        agrees=whole["prediction"][:-1] == whole["prediction"][-1],
        correct=whole["prediction"] == whole["labels"],
        losses=whole["loss"],
        metadata=metadata,
    )


def summary(records: Records, accuracy: float = 0.95) -> list[dict]:
    """A row per exit, the final one last: depth, loss, agreement, accuracy, coverage.

    Coverage is the largest share of positions that could leave there, by `max_prob`, with at
    least this `accuracy` of agreement; the final exit covers all.
    """
    rows = []
    for e, depth in enumerate(records.exit_depths):
        final = e == len(records.exit_depths) - 1
        rows.append(
            {
                "exit": int(depth),
                "loss": float(records.losses[e].mean()),
                "agreement": 1.0 if final else float(records.agrees[e].mean()),
                "correct": float(records.correct[e].mean()),
                "coverage": 1.0
                if final
                else coverage_at(records.scores["max_prob"][e], records.agrees[e], accuracy),
            }
        )
    return rows
