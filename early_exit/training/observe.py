"""What the losses of exits are made of: the backbone run, or what a cache has of it.

The one idea: heads begin where the backbone has stopped. Whether it ran just now, behind
`stop_gradient` or to be trained, or long ago into a cache, the losses need not know.
"""

import jax
import jax.numpy as jnp

from early_exit import losses
from early_exit.backbones import base
from early_exit.data.transforms import next_token_targets
from early_exit.distillation.hidden_states import hidden_name
from early_exit.exits import recurrent
from early_exit.exits.multi_exit import MultiExit
from early_exit.training import schedule
from early_exit.training.recipe import Recipe


def observe(
    params: base.Params,
    batch: dict,
    *,
    model: MultiExit,
    recipe: Recipe,
    kept: jax.Array | None = None,
) -> dict:
    """Runs the backbone and keeps what the losses are made of.

    It runs as far as they need it: to the last exit, or to its end where the final distribution is
    the teacher or is trained.

    Args:
      params: the model's; `exits` are not used.
      batch: `tokens`, `documents`, `positions`, int32 [B, T]; for a classifier what its stem takes,
        `labels` int32 [B] and `valid` bool [B]. From a cache of hidden states
        (`distillation.hidden_states`) it brings what the backbone made of it; no block is run
        then, and none is needed among `params`.
      kept: bool [L, B], the blocks that each row runs; None for all. For a backbone that is
        trained.

    Returns:
      `hidden`, per exit; `taps` and `embedded`, of a recurrent exit, if there is one; `starts`,
      where the document of each position begins, int32 [B, T]; `context`, for heads that attend;
      `last`, the hidden states after the
      last block, if it was run, or `teacher`, the final distribution's top-K [B, T, K] from cached
      states; `labels` int32 and `mask` bool, [B, T] or [B]; `moments`, of the batch, for running
      statistics that are trained.
    """
    if "teacher_ids" in batch:
        return _recall(params, batch, model=model, recipe=recipe)
    backbone = model.bind({name: x for name, x in params.items() if name != "exits"}).backbone
    points = {*model.exits.observed}
    if recipe.runs_all_blocks:
        points.add(model.config.depth)
    trained = recipe.train == "all"
    moments, states, start = {}, {}, 0
    if trained:
        hidden, context, moments = backbone.stem_training(batch)
    else:
        hidden, context = backbone.stem(batch)
    embedded = hidden
    for stop in sorted(points):
        if trained:
            hidden, new = backbone.run_blocks_training(hidden, start, stop, context, kept)
            moments |= new
        else:
            hidden = backbone.run_blocks(hidden, start, stop, context)
        states[stop] = hidden
        start = stop
    labels, mask = targets(batch, model)
    observed = {"context": context, "labels": labels, "mask": mask, "moments": moments}
    if recipe.runs_all_blocks:
        observed["last"] = states[model.config.depth]
    return observed | _at_heads(model, states, embedded, batch)


def _at_heads(model: MultiExit, states: dict[int, jax.Array], embedded: jax.Array, batch: dict):
    """What heads read, of the hidden states by block."""
    kept = {"hidden": [states[point] for point in model.exits.points]}
    if model.exits.recurrent_taps:
        taps = [states[tap] for tap in model.exits.recurrent_taps]
        kept |= {"taps": taps, "embedded": embedded, "starts": recurrent.starts(batch["documents"])}
    return kept


def _recall(params: base.Params, batch: dict, *, model: MultiExit, recipe: Recipe) -> dict:
    backbone = model.bind({name: x for name, x in params.items() if name != "exits"}).backbone
    labels, mask = next_token_targets(batch)
    ids, log_probs = batch["teacher_ids"], batch["teacher_log_probs"]
    embedded, context = backbone.stem(batch)
    states = {p: batch[hidden_name(p)].astype(recipe.dtype) for p in model.exits.observed}
    return _at_heads(model, states, embedded, batch) | {
        "context": context,
        "teacher": losses.TopK(ids.astype(jnp.int32), log_probs.astype(jnp.float32)),
        "labels": labels,
        "mask": mask,
        "moments": {},
    }


def targets(batch: dict, model: MultiExit) -> tuple[jax.Array, jax.Array]:
    """What is to be predicted: labels int32 and whether they count, bool; [B, T], or [B]."""
    if model.config.classifies:
        return batch["labels"], batch["valid"]
    return next_token_targets(batch)


def kept_blocks(key: jax.Array, batch: dict, *, model: MultiExit, recipe: Recipe) -> jax.Array:
    """Which blocks each row runs, bool [L, B]."""
    depth, rows = model.config.depth, len(jax.tree.leaves(batch)[0])
    rates = jnp.array(schedule.drop_rates(depth, recipe.layer_dropout))
    return jax.random.bernoulli(key, 1 - rates[:, None], (depth, rows))
