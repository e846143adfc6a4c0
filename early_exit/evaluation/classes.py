"""Every exit of a classifier, scored on one batch of labelled examples."""

import functools

import jax
import jax.numpy as jnp

from early_exit import confidence as confidences
from early_exit import consult, precision, sharding
from early_exit.backbones import base
from early_exit.exits.multi_exit import MultiExit


@functools.partial(jax.jit, static_argnames=("model", "soften"))
@precision.exact
@sharding.laid_out
def score_batch(
    params: base.Params, batch: dict, *, model: MultiExit, soften: bool = False
) -> dict:
    """Every exit's scores and outcomes on a batch of examples, each run to the end.

    Args:
      batch: what the stem takes, `labels` int32 [B] and `valid` bool [B].
      soften: whether to return `softened` too (`confidence.soften`).

    Returns:
      scores {name: [E + 1, B]}, predictions [E + 1, B], losses [E + 1, B], labels [B], groups [B],
      mask [B], true where a row is an example.
    """
    bound = model.bind(params)
    hidden, context = bound.backbone.stem(batch)
    labels = batch["labels"]
    scores = {name: [] for name in model.confidences}
    logits, predictions, losses, softened = [], [], [], []
    said = consult.Said.nothing(labels.shape)
    states = bound.hidden_at_exits(hidden, context, model.exit_depths.tolist())
    for e, hidden in enumerate(states):
        if e < len(bound.heads):
            logits.append(bound.exit_logits(e, hidden, context, logits))
            answer = bound.answer(logits)
        else:
            answer = bound.backbone.readout(hidden, context)
        summary, said = consult.hear(answer, said, e)
        for name, values in scores.items():
            if name not in confidences.FROM_HIDDEN:
                values.append(consult.score(name, summary, said))
            else:
                values.append(consult.hidden_score(name, bound, e, hidden, hidden, context))
        predictions.append(summary.prediction)
        of_label = jnp.take_along_axis(answer, labels[:, None], axis=-1)[:, 0]
        losses.append(jax.nn.logsumexp(answer, axis=-1) - of_label)
        softened.append(confidences.soften(answer) if soften else {})
    return {
        "scores": {name: jnp.stack(values) for name, values in scores.items()},
        "predictions": jnp.stack(predictions),
        "losses": jnp.stack(losses),
        "softened": jax.tree.map(lambda *xs: jnp.stack(xs, axis=-2), *softened),
        "labels": labels,
        "groups": jnp.arange(len(labels)),
        "mask": batch["valid"],
    }
