"""How good each exit is: one pass over held-out text, every position scored at every exit."""

import dataclasses
import functools
from collections.abc import Callable, Iterable

import jax
import jax.numpy as jnp
import numpy as np

from early_exit import confidence as confidences
from early_exit import consult, precision, sharding
from early_exit.backbones import base
from early_exit.calibration.records import Records, Softened
from early_exit.calibration.thresholds import coverage_at
from early_exit.cost import multiply_adds
from early_exit.data.transforms import next_token_targets
from early_exit.evaluation import classes
from early_exit.exits.multi_exit import MultiExit

# Positions whose full-vocabulary logits a device holds at a time.
ROWS = 128


@functools.lru_cache(maxsize=16)  # tracing a deep network takes a while
def _costs(model: MultiExit, shapes: tuple | None = None) -> np.ndarray:
    inputs = None if shapes is None else {k: jax.ShapeDtypeStruct(*x) for k, x in shapes}
    return multiply_adds.leaving(model, multiply_adds.backbone(model.config, inputs=inputs))


def costs_of(model: MultiExit, batch: dict) -> np.ndarray:
    """Multiply-adds of leaving at each exit, float64 [E + 1] (`multiply_adds.leaving`).

    Of a token without attention to others, or of one row of a classifier's batch.
    """
    if not model.config.classifies:
        return _costs(model)
    inputs = {k: x for k, x in batch.items() if k not in ("labels", "valid")}
    shapes = tuple((k, ((1, *x.shape[1:]), x.dtype)) for k, x in inputs.items())
    return _costs(model, shapes)


def said_of(
    features: jax.Array,
    table: jax.Array,
    token_ids: jax.Array | None,
    labels_N: jax.Array,
    rule: base.LogitRule,
    soften: bool = False,
    temperature: jax.Array | None = None,
) -> tuple[confidences.Summary, jax.Array, dict[str, jax.Array]]:
    """What a head says at every position: (summary, loss, `confidence.soften` if asked for).

    Logits are made of `ROWS` positions at a time. The predictions are tokens, for the classes of
    heads may differ.

    Args:
      features: [..., D], of N positions.
      table: the head's output matrix [C, D].
      token_ids: what its rows stand for, if it is reduced.
      labels_N: int32, tokens of which the loss is.
      rule: the network's, for logits.
      temperature: of the summary, a scalar; the loss is at temperature 1.
    """
    reduced, classes = token_ids is not None, labels_N
    if reduced:  # where the label is none of them, "none of these"
        order = jnp.argsort(token_ids)
        at = order[jnp.searchsorted(token_ids[order], labels_N).clip(max=len(token_ids) - 1)]
        classes = jnp.where(token_ids[at] == labels_N, at, len(token_ids))

    def one(position, table):
        feature, label_class = position
        values = base.logits(feature, table, rule=rule)
        tempered = values if temperature is None else values / temperature
        summary = confidences.summarize(tempered, has_rest=reduced)
        softer = confidences.soften(values, has_rest=reduced) if soften else {}
        return summary, jax.nn.logsumexp(values) - values[label_class], softer

    flat = features.reshape(-1, features.shape[-1])
    summary, loss, softer = sharding.map_rows(one, (flat, classes), table, ROWS)
    if reduced:
        summary = dataclasses.replace(summary, prediction=token_ids[summary.prediction])
    return summary, loss, jax.tree.map(jnp.transpose, softer)


@functools.partial(jax.jit, static_argnames=("model", "soften"))
@precision.exact
@sharding.laid_out
def score_batch(
    params: base.Params, batch: dict, *, model: MultiExit, soften: bool = False
) -> dict:
    """Every exit's scores and outcomes on a packed batch.

    Args:
      batch: `tokens`, `documents`, `positions`, int32 [B, T], and `groups`, if positions of
        different segments belong together.
      soften: whether to return `softened` too (`confidence.soften`).

    Returns:
      scores {name: [E + 1, N]}, predictions [E + 1, N], losses [E + 1, N], labels [N], groups [N],
      mask [N] with N = B·T; `mask` is false where the next token is not known.
    """
    bound = model.bind(params)
    hidden, context = bound.backbone.stem(batch)
    at_exits = list(bound.hidden_at_exits(hidden, context, model.exit_depths.tolist()))
    labels_BT, mask_BT = next_token_targets(batch)
    labels = labels_BT.reshape(-1)

    documents_BT = batch["documents"]
    rows_B1 = jnp.arange(len(documents_BT))[:, None]
    groups_BT = batch.get("groups", rows_B1 * documents_BT.shape[1] + documents_BT)

    tables = (*bound.exit_tables(), bound.backbone.output_table())
    tokens, losses, softened = [], [], []
    scores = {name: [] for name in model.confidences}
    said = consult.Said.nothing(labels.shape)
    for e, (before, after) in enumerate(zip((hidden, *at_exits), at_exits, strict=False)):
        final = e == len(bound.heads)
        if final:
            features, ids = bound.backbone.features(after), None
        else:
            features, ids = bound.heads[e].features(after, context)[0], bound.token_ids
        summary, loss, softer = said_of(
            features, tables[e], ids, labels, model.config.logit_rule, soften
        )
        tokens.append(summary.prediction)
        losses.append(loss)
        softened.append(softer)
        said = said.then(summary)
        for name, values in scores.items():
            if name not in confidences.FROM_HIDDEN:
                values.append(consult.score(name, summary, said))
            else:
                by_hidden = consult.hidden_score(name, bound, e, before, after)
                values.append(by_hidden.reshape(-1))
    return {
        "scores": {name: jnp.stack(values) for name, values in scores.items()},
        "predictions": jnp.stack(tokens),
        "losses": jnp.stack(losses),
        "softened": jax.tree.map(lambda *xs: jnp.stack(xs, axis=-2), *softened),
        "labels": labels,
        "groups": groups_BT.reshape(-1),
        "mask": mask_BT.reshape(-1) > 0,
    }


def groups_of(model: MultiExit, batches: Iterable[dict]) -> np.ndarray:
    """The text or example of every position that `record` would keep, int [N], no model run."""
    found, groups = [], 0
    for batch in batches:
        if model.config.classifies:
            here = np.arange(len(batch["labels"]))
            kept = here[np.asarray(batch["valid"])]
        else:
            documents = np.asarray(batch["documents"])
            rows = np.arange(len(documents))[:, None] * documents.shape[1]
            here = np.asarray(batch["groups"]) if "groups" in batch else rows + documents
            kept = here[np.asarray(next_token_targets(batch)[1])]
        numbered = "groups" in batch
        found.append(kept if numbered else kept + groups)
        groups = groups if numbered else groups + here.max() + 1
    return np.concatenate(found)


def scored(score: Callable[[dict], dict], batches: Iterable[dict]) -> dict:
    """What `score` says of all batches, as numpy arrays [..., N]: what its `mask` keeps, in a row.

    Groups that are numbered within a batch are numbered on.

    Raises:
      ValueError: no batch.
    """
    parts, groups = [], 0
    for batch in batches:
        out = sharding.fetch(score(batch))
        if "groups" not in batch:
            out["groups"] = out["groups"] + groups
            groups = out["groups"].max() + 1
        keep = out.pop("mask")
        parts.append(jax.tree.map(lambda x, keep=keep: x[..., keep], out))
    if not parts:
        raise ValueError("no batch to record; give more held-out text")
    return jax.tree.map(lambda *xs: np.concatenate(xs, axis=-1), *parts)


def record(
    model: MultiExit,
    params: base.Params,
    batches: Iterable[dict],
    *,
    soften: bool = False,
    **metadata,
) -> Records:
    """Runs the model over `batches` and keeps every position with a known next token.

    Of a classifier, every example (see `classes.score_batch`).

    Args:
      soften: whether to keep what temperatures are fitted on, which takes longer.
      metadata: of the records.
    """
    score = classes.score_batch if model.config.classifies else score_batch
    mesh, last = sharding.mesh_of(params), {}

    def of(batch: dict) -> dict:
        last.update(batch)
        return score(params, sharding.place_rows(batch, mesh), model=model, soften=soften)

    whole = scored(of, batches)
    softened = whole.pop("softened")
    return Records(
        exit_depths=model.exit_depths,
        costs=costs_of(model, last),
        softened=Softened(np.array(confidences.TEMPERATURES), **softened) if soften else None,
        metadata=metadata,
        **whole,
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
