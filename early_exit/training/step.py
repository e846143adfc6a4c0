"""One tuning step: a pure function of (state, frozen parameters, batch).

The one idea: what is trained is an argument of the differentiated function, and nothing else is.
Tuning exits alone (`train="exits"`), the backbone has no gradient, no optimizer state and no saved
activation, and is never donated or returned. Trained jointly (`train="all"`) it learns from its own
labels and from what the exits ask of it.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax

from early_exit import losses, sharding
from early_exit.backbones import base
from early_exit.exits.multi_exit import Bound, MultiExit
from early_exit.streams import stream
from early_exit.training.observe import kept_blocks, observe, targets
from early_exit.training.recipe import LOSSES, Recipe

# {"params": those that are trained, "opt_state": the optimizer's over them, "step": int32 scalar}
TuneState = dict[str, Any]


def computing(params: base.Params, recipe: Recipe) -> base.Params:
    """Trained parameters, float32, in the type that the network computes in."""
    return jax.tree.map(lambda x: x.astype(recipe.dtype), params)


def init_state(params: base.Params, optimizer: optax.GradientTransformation) -> TuneState:
    """The state before the first step.

    Args:
      params: those that are trained, float32: `{"exits": …}`, and `backbone` if it is.
      optimizer: whose state it gets.

    Example:
      >>> state = ee.init_state({"exits": tuned.heads}, optax.sgd(0.1))
      >>> int(state["step"])
      0
    """
    return {"params": params, "opt_state": optimizer.init(params), "step": jnp.int32(0)}


def heads_loss(
    exits: base.Params,
    rest: base.Params,
    observed: dict,
    *,
    model: MultiExit,
    recipe: Recipe,
    step: jax.Array,
) -> tuple[jax.Array, jax.Array]:
    """The recipe's loss of the heads on what `observe` kept: (scalar, per head).

    First per exit, [E]; then per step of a recurrent exit. Gates and ensembles learn beside the
    heads; what they learn from does not learn from them. The loss of an exit that has no weight at
    this step is NaN: it is not computed, unless it is a classifier's, whose heads cost little and
    may build on each other.

    Args:
      rest: the model's parameters but for the exits.
      step: int32 scalar, from 0.
    """
    bound = model.bind({**rest, "exits": exits})
    steps = tuple(range(len(bound.heads), len(bound.heads) + len(recipe.draft_weights)))
    weights = jnp.concatenate([recipe.weights(step), jnp.array(recipe.draft_weights)])
    mask = observed["mask"].reshape(-1)
    together = (tuple(range(len(bound.heads))),)
    groups = together if model.config.classifies else recipe.weights.groups
    if len(groups) == 1:
        groups = ((*groups[0], *steps),)
    elif steps:
        groups = (*groups, steps)

    def computed(group):
        losses_of = _class_losses if model.config.classifies else _token_losses
        per_example, beside, right = losses_of(bound, observed, recipe, group)
        masks = jnp.stack([mask & _drafted_from(observed, e - len(bound.heads)) for e in group])
        per_exit = _mean(per_example, masks)
        loss = jnp.dot(weights[jnp.array(group)], per_exit)
        if beside is not None:
            loss += _mean(beside, jnp.broadcast_to(mask[None], beside.shape)).sum()
        if gated := [e for e in group if e < len(bound.heads) and model.exits.gate]:
            gates = [
                bound.heads[e].gate_logit(observed["hidden"][e], observed["context"]).reshape(-1)
                for e in gated
            ]
            loss += losses.gate_losses(jnp.stack(gates), right, mask).sum()
        return loss, per_exit

    def left_out(group):
        return jnp.float32(0), jnp.full(len(group), jnp.nan)

    if len(groups) == 1:
        return computed(*groups)
    loss, per_exit = jnp.float32(0), jnp.zeros(len(weights))
    for group in groups:
        here = jnp.array(group)
        some, found = jax.lax.cond(
            weights[here].any(),
            functools.partial(computed, group),
            functools.partial(left_out, group),
        )
        loss, per_exit = loss + some, per_exit.at[here].set(found)
    return loss, per_exit


def _drafted_from(observed: dict, step: int) -> jax.Array:
    """bool [N], positions whose document began early enough for a chain's step (from 0)."""
    if step < 0:  # an exit
        return jnp.ones(observed["mask"].size, bool)
    index_T = jnp.arange(observed["starts"].shape[1])
    return (index_T[None] - observed["starts"] > step).reshape(-1)


def _mean(losses_EN: jax.Array, masks_EN: jax.Array) -> jax.Array:
    return (losses_EN * masks_EN).sum(-1) / jnp.maximum(masks_EN.sum(-1), 1)


def _token_losses(bound: Bound, observed: dict, recipe: Recipe, group: Sequence[int]):
    """(losses [G, N], None, whether the exits are right: bool [G, N]), N = B · T.

    Of the exits of a group (from 0), and behind them of steps of the recurrent exit. The last is
    for gates, and None where there are none.
    """
    exits = [e for e in group if e < len(bound.heads)]

    def features_of(e, hidden):
        return _flat(bound.heads[e].features(hidden, observed["context"])[0])

    if exits and bound.heads[0].is_cheap:
        # The backward pass makes them anew: they are as wide as the hidden states, and both
        # together would be most of what several exits keep.
        features_of = jax.checkpoint(features_of, static_argnums=0)
    features = [features_of(e, observed["hidden"][e]) for e in exits]
    at_exits = bound.exit_tables()
    tables = [at_exits[e] for e in exits]
    if steps := len(group) - len(exits):
        read = (observed[name] for name in ("taps", "embedded", "context", "starts"))
        states = bound.recurrent.unrolled(*read, steps)
        features += [_flat(bound.recurrent.features(state)) for state in states]
        tables += [bound.draft_table()] * steps
    targets = {"labels": observed["labels"].reshape(-1)}
    if "last" in observed:
        final = _flat(bound.backbone.features(observed["last"], observed["context"]))
        targets["teacher"] = (final, bound.backbone.output_table())
    elif "teacher" in observed:
        targets["teacher"] = losses.TopK(*map(_flat, observed["teacher"]))
    targets = [{name: targets[name]} for name in LOSSES[recipe.loss]]
    how = {"token_ids": bound.token_ids, "parts": recipe.table_parts}
    rest = {"by_confidence": recipe.by_confidence, "rule": bound.backbone.config.logit_rule}
    heads = features, tables
    found = [losses.exit_losses(*heads, **target, **how, **rest) for target in targets]
    right = None
    if exits and hasattr(bound.heads[0], "gate"):
        asked = features[: len(exits)], tables[: len(exits)]
        right = losses.right(*jax.lax.stop_gradient(asked), **targets[0], **how)
    return sum(found) / len(found), None, right


def _flat(x: jax.Array) -> jax.Array:
    return sharding.by_row(x.reshape(-1, x.shape[-1]))


def _class_losses(bound: Bound, observed: dict, recipe: Recipe, group: Sequence[int]):
    """(losses [E, B], those of ensembles, whether the answers are right: bool [E, B])."""
    del group  # all: heads may build on those before them
    logits, answers = [], []
    for e, hidden in enumerate(observed["hidden"]):
        logits.append(bound.exit_logits(e, hidden, observed["context"], logits))
        answers.append(bound.answer(logits))
    targets = {"labels": observed["labels"]}
    if "last" in observed:
        targets["teacher"] = bound.backbone.readout(observed["last"], observed["context"])
    targets = {name: targets[name] for name in LOSSES[recipe.loss]}

    def compared(of):
        how = {"by_confidence": recipe.by_confidence}
        found = [losses.class_losses(of, **{name: x}, **how) for name, x in targets.items()]
        return sum(found) / len(found)

    name, target = next(iter(targets.items()))
    best = target if name == "labels" else target.argmax(-1)
    right = jnp.stack([answer.argmax(-1) == best for answer in answers])
    # The first exit has none before it, and so no ensemble.
    ensembles = compared(answers[1:]) if answers and answers[-1] is not logits[-1] else None
    return compared(logits), ensembles, right


def _final_loss(
    rest: base.Params, observed: dict, *, model: MultiExit, recipe: Recipe
) -> jax.Array:
    """Mean cross-entropy of the final exit, a scalar."""
    backbone = model.bind(rest).backbone
    labels, mask = observed["labels"].reshape(-1), observed["mask"].reshape(-1)
    features = backbone.features(observed["last"], observed["context"])
    if model.config.classifies:
        final = base.logits(features, backbone.output_table(), backbone.output_bias())
        per_example = losses.class_losses([final], labels=labels)
    else:
        table = backbone.output_table()
        how = {"labels": labels, "parts": recipe.table_parts, "rule": model.config.logit_rule}
        per_example = losses.exit_losses([_flat(features)], [table], **how)
    return _mean(per_example, mask[None])[0]


def tuning_loss(
    trained: base.Params,
    frozen: base.Params,
    batch: dict,
    *,
    model: MultiExit,
    recipe: Recipe,
    step: jax.Array | int = 0,
    key: jax.Array | None = None,
) -> tuple[jax.Array, tuple[dict[str, jax.Array], base.Moments]]:
    """What tuning minimises: a pure function, to be differentiated by its first argument.

    Args:
      trained: the parameters that learn, float32: `{"exits": …}`, and `backbone` where the recipe
        trains it.
      frozen: the model's other parameters, in the type that it computes in.
      batch: as for `observe`.
      step: int32, from 0; what exits weigh depends on it.
      key: of the blocks that are left out (`Recipe.layer_dropout`); by default the step's own.

    Returns:
      (loss, float32 scalar, in nats; (that of each head by name, `exit_<point>` and
      `draft_<step>`; the batch's moments, for running statistics that are trained)).

    Example:
      >>> recipe = ee.Recipe("kl", ee.ExitWeights((1.0, 1.0)))
      >>> frozen = {"backbone": tuned.params["backbone"]}
      >>> loss, (by_exit, _) = ee.tuning_loss(
      ...     {"exits": tuned.heads}, frozen, batch, model=tuned.static, recipe=recipe
      ... )
      >>> loss.shape, sorted(by_exit)
      ((), ['exit_2', 'exit_4'])
    """
    whole = {**frozen, **computing(trained, recipe)}
    rest = {name: x for name, x in whole.items() if name != "exits"}
    how = {"model": model, "recipe": recipe}
    kept = None
    if recipe.layer_dropout:
        kept = kept_blocks(_key(recipe, step) if key is None else key, batch, **how)
    observed = observe(whole, batch, kept=kept, **how)
    loss, by_head = jnp.float32(0), {}
    if model.head_names:
        loss, found = heads_loss(whole["exits"], rest, observed, step=step, **how)
        names = [f"exit_{point}" for point in model.exits.points]
        names += [f"draft_{i + 1}" for i in range(len(recipe.draft_weights))]
        by_head = dict(zip(names, found, strict=True))
    if recipe.train == "all":
        by_head[f"exit_{model.config.depth}"] = final = _final_loss(rest, observed, **how)
        loss += final
    return loss, (by_head, observed["moments"])


def _key(recipe: Recipe, step: jax.Array | int) -> jax.Array:
    """Of what is left out at a step."""
    return jax.random.fold_in(stream(recipe.seed, "layer dropout"), step)


def tune_step(
    state: TuneState,
    frozen: base.Params,
    batch: dict,
    *,
    model: MultiExit,
    recipe: Recipe,
    optimizer: optax.GradientTransformation,
) -> tuple[TuneState, dict[str, jax.Array]]:
    """Updates what the recipe trains on one batch.

    Args:
      frozen: the model's parameters that are not trained.
      batch: as for `observe`.

    Returns:
      (new state, scalars: `loss`, `loss/exit_<point>`, the backbone's own included where it is
      trained, `loss/draft_<step>` of a recurrent exit, `grad_norm`).

    Example:
      >>> how = {"model": tuned.static, "recipe": recipe, "optimizer": optax.sgd(0.1)}
      >>> step = jax.jit(functools.partial(ee.tune_step, **how))
      >>> state, metrics = step(state, frozen, batch)
      >>> int(state["step"]), sorted(metrics)
      (1, ['grad_norm', 'loss', 'loss/exit_2', 'loss/exit_4'])
    """
    step, params = state["step"], state["params"]

    def objective(params, batch, key):
        return tuning_loss(params, frozen, batch, model=model, recipe=recipe, step=step, key=key)

    gradient = jax.value_and_grad(objective, has_aux=True)
    if recipe.accumulate > 1:
        gradient = _accumulated(gradient, recipe.accumulate, lambda part: targets(part, model)[1])
    (loss, (by_head, moments)), gradients = gradient(params, batch, _key(recipe, step))
    updates, opt_state = optimizer.update(gradients, state["opt_state"], params)
    params = optax.apply_updates(params, updates)
    if moments:
        params |= {"backbone": base.update_statistics(params["backbone"], moments)}
    metrics = {"loss": loss, "grad_norm": optax.tree.norm(gradients)}
    metrics |= {f"loss/{name}": value for name, value in by_head.items()}
    return {"params": params, "opt_state": opt_state, "step": step + 1}, metrics


def _accumulated(gradient: Callable, parts: int, counted: Callable) -> Callable:
    """A gradient function that takes a batch part by part, one part's activations at a time.

    What it returns is the mean over the parts, by how many positions count in each: what means over
    the whole batch give, but for gates, which balance, and running statistics, part by part.

    Args:
      gradient: (params, batch, key) → (value with what goes beside it, gradients).
      counted: batch → mask of what counts.
    """

    def whole(params, batch, key):
        # Every part has rows of all devices: part i has the i-th, (i + parts)-th, … row.
        split = jax.tree.map(
            lambda x: x.reshape(-1, parts, *x.shape[1:]).swapaxes(0, 1),
            batch,
        )
        counts = jax.vmap(lambda part: counted(part).sum())(split)
        shares = counts / jnp.maximum(counts.sum(), 1)

        def add(total, xs):
            part, share, key = xs
            part = jax.tree.map(sharding.by_row, part)
            found = gradient(params, part, key)
            return jax.tree.map(lambda x, y: x + share * y, total, found), None

        first = jax.tree.map(lambda x: x[0], split)
        zeros = jax.tree.map(
            lambda x: jnp.zeros(x.shape, jnp.float32), jax.eval_shape(gradient, params, first, key)
        )
        keys = jax.random.split(key, parts)
        return jax.lax.scan(add, zeros, (split, shares, keys))[0]

    return whole
