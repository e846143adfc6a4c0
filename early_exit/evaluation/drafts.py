"""How good a recurrent exit is: chains of drafts from every position of held-out text."""

import functools
from collections.abc import Iterable

import jax
import jax.numpy as jnp
import numpy as np

from early_exit import consult, precision, sharding
from early_exit.backbones import base
from early_exit.calibration.chains import SCORES, Chains
from early_exit.data.transforms import next_token_targets
from early_exit.decoding.mode import LOSSY
from early_exit.evaluation.exits import said_of, scored
from early_exit.exits import recurrent
from early_exit.exits.multi_exit import MultiExit

# As many drafts as decoding hands on at most, unless told otherwise (`Mode.pending`).
STEPS = LOSSY.pending - 1


@functools.partial(jax.jit, static_argnames=("model", "steps"))
@precision.exact
@sharding.laid_out
def score_batch(params: base.Params, batch: dict, *, model: MultiExit, steps: int) -> dict:
    """Scores and outcomes [K, N] of the chains that begin at each position of a packed batch.

    Args:
      batch: as for `evaluation.exits.score_batch`.

    Returns:
      `scores`, `agrees`, `losses` [K, N], `groups` and `mask` [N]; `mask` is false where a chain
      would leave its document.
    """
    bound, documents_BT = model.bind(params), batch["documents"]
    embedded, context = bound.backbone.stem(batch)
    stops = sorted({*model.exits.recurrent_taps, model.config.depth})
    states = dict(zip(stops, bound.hidden_at_exits(embedded, context, stops), strict=True))
    labels_BT, known_BT = next_token_targets(batch)
    features = bound.backbone.features(states[model.config.depth])
    rule, table = model.config.logit_rule, bound.backbone.output_table()
    full, _, _ = said_of(features, table, None, labels_BT.reshape(-1), rule)
    full_BT = full.prediction.reshape(labels_BT.shape)

    starts_BT = recurrent.starts(documents_BT)
    taps = [states[tap] for tap in model.exits.recurrent_taps]
    chain = bound.recurrent.unrolled(taps, embedded, context, starts_BT, steps)
    index_T = jnp.arange(labels_BT.shape[1])
    mask_BT = index_T[None] > starts_BT
    found = {"scores": {name: [] for name in SCORES}, "agrees": [], "losses": []}
    for step, state in enumerate(chain):

        def begins(x_N, step=step):
            """At the first position of its chain."""
            x_BT = x_N.reshape(labels_BT.shape)
            return jnp.pad(x_BT[:, step:], ((0, 0), (0, step))).reshape(-1)

        table, labels_N = bound.draft_table(), labels_BT.reshape(-1)
        summary, losses, _ = said_of(
            bound.recurrent.features(state), table, bound.token_ids, labels_N, rule
        )
        said = consult.Said.nothing(labels_N.shape).then(summary)
        for name, values in found["scores"].items():
            values.append(begins(consult.score(name, summary, said)))
        agrees_N = (summary.prediction == full_BT.reshape(-1)) & ~summary.declines
        found["agrees"].append(begins(agrees_N))
        found["losses"].append(begins(losses))
        ends = jnp.pad(documents_BT[:, step:], ((0, 0), (0, step))) == documents_BT
        mask_BT &= begins(known_BT).reshape(mask_BT.shape) & ends
    rows_B1 = jnp.arange(len(documents_BT))[:, None]
    groups_BT = batch.get("groups", rows_B1 * documents_BT.shape[1] + documents_BT)
    return {
        "scores": {name: jnp.stack(values) for name, values in found["scores"].items()},
        "agrees": jnp.stack(found["agrees"]),
        "losses": jnp.stack(found["losses"]),
        "groups": groups_BT.reshape(-1),
        "mask": mask_BT.reshape(-1),
    }


def record(
    model: MultiExit,
    params: base.Params,
    batches: Iterable[dict],
    steps: int = STEPS,
    **metadata,
) -> Chains:
    """Chains of so many steps from every position of `batches` that has so many behind it.

    Args:
      metadata: of the chains.

    Raises:
      ValueError: there is none.
    """
    mesh = sharding.mesh_of(params)

    def score(batch: dict) -> dict:
        return score_batch(params, sharding.place_rows(batch, mesh), model=model, steps=steps)

    found = scored(score, batches)
    if not found["groups"].size:
        raise ValueError(
            f"no text to record chains of {steps} drafts on; give more, or longer, held-out text"
        )
    return Chains(**found, metadata=metadata)


def summary(chains: Chains) -> list[dict]:
    """A row per step: loss, agreement, and what chains of so many drafts are worth.

    `tokens` is how many tokens a pass of the full model gives that checks them all: those before
    the first that it does not say, and its own.
    """
    tokens = 1 + np.cumsum(chains.stands.mean(axis=1))
    return [
        {
            "draft": step + 1,
            "loss": float(chains.losses[step].mean()),
            "agreement": float(chains.agrees[step].mean()),
            "tokens": float(tokens[step]),
        }
        for step in range(len(tokens))
    ]
