"""One tuning step: a pure function of (state, frozen parameters, batch).

The one idea: what is trained is an argument of the differentiated function, and nothing else is.
Tuning exits alone (`train="exits"`), the backbone has no gradient, no optimizer state and no saved
activation, and is never donated or returned. In tandem (`train="all"`) it learns from its own
labels and from what the exits ask of it.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax

from early_exit import losses, sharding
from early_exit.backbones import base
from early_exit.data.states import hidden_name
from early_exit.data.transforms import next_token_targets
from early_exit.exits.multi_exit import Bound, MultiExit

# What each loss compares an exit with; their mean where there are two.
LOSSES = {"kl": ("teacher",), "cross_entropy": ("labels",), "both": ("labels", "teacher")}
TRAINED = {"exits": ("exits",), "all": ("backbone", "exits")}

# {"params": those that are trained, "opt_state": the optimizer's over them, "step": int32 scalar}
TuneState = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Recipe:
    """The loss: Σ_e weight_e · mean over positions of L_e, and what learns from it.

    Attributes:
      loss: `kl`, KL(final ‖ exit), self-distillation from the final exit; `cross_entropy` against
        the next token or the class; or `both`, their mean.
      weights: one per exit.
      train: `exits`, or `all`: the backbone as well, whose own cross-entropy then joins the sum
        with weight 1. No exit's teacher learns from its pupils.
      dtype: what the network computes in. Whatever is trained is kept in float32.
      table_parts: over how many devices the rows of the output matrices are split (`mesh.tensor`).
    """

    loss: str
    weights: tuple[float, ...]
    train: str = "exits"
    dtype: str = "float32"
    table_parts: int = 1

    def __post_init__(self):
        for name, known in (("loss", LOSSES), ("train", TRAINED)):
            if getattr(self, name) not in known:
                given = getattr(self, name)
                raise ValueError(f"unknown {name} {given!r}; choose one of {', '.join(known)}")

    @property
    def runs_all_blocks(self) -> bool:
        return self.train == "all" or "teacher" in LOSSES[self.loss]


def exit_weights(weights: Sequence[float], points: Sequence[int]) -> tuple[float, ...]:
    """One weight per exit; all 1 if none are given.

    Raises:
      ValueError: another number of weights than exits.
    """
    if weights and len(weights) != len(points):
        raise ValueError(
            f"tune.weights has {len(weights)} values for {len(points)} exits; give one per exit, "
            "or none for equal weights"
        )
    return tuple(map(float, weights)) or (1.0,) * len(points)


def computing(params: base.Params, recipe: Recipe) -> base.Params:
    """Trained parameters, float32, in the type that the network computes in."""
    return jax.tree.map(lambda x: x.astype(recipe.dtype), params)


def init_state(params: base.Params, optimizer: optax.GradientTransformation) -> TuneState:
    """The state before the first step; `params` are those that are trained."""
    return {"params": params, "opt_state": optimizer.init(params), "step": jnp.int32(0)}


def observe(params: base.Params, batch: dict, *, model: MultiExit, recipe: Recipe) -> dict:
    """Runs the backbone and keeps what the losses are made of.

    It runs as far as they need it: to the last exit, or to its end where the final distribution is
    the teacher or is trained.

    Args:
      params: the model's; `exits` are not used.
      batch: `tokens`, `segments`, `positions`, int32 [B, T]; for a classifier what its stem takes,
        `labels` int32 [B] and `valid` bool [B]. From cached states (`data.states`) it brings what
        the backbone made of it; no block is run then, and none is needed among `params`.

    Returns:
      `hidden`, per exit; `context`, for heads that attend; `last`, the hidden states after the
      last block, if it was run, or `teacher`, the final distribution's top-K [B, T, K] from cached
      states; `labels` int32 and `mask` bool, [B, T] or [B]; `moments`, of the batch, for running
      statistics that are trained.
    """
    if "teacher_ids" in batch:
        return _recall(params, batch, model=model, recipe=recipe)
    backbone = model.bind({name: x for name, x in params.items() if name != "exits"}).backbone
    points = model.exits.points + ((model.config.depth,) if recipe.runs_all_blocks else ())
    trained = recipe.train == "all"
    moments, states, start = {}, [], 0
    if trained:
        hidden, context, moments = backbone.stem_training(batch)
    else:
        hidden, context = backbone.stem(batch)
    for stop in points:
        if trained:
            hidden, new = backbone.run_blocks_training(hidden, start, stop, context)
            moments |= new
        else:
            hidden = backbone.run_blocks(hidden, start, stop, context)
        states.append(hidden)
        start = stop
    if model.config.pools:
        labels, mask = batch["labels"], batch["valid"]
    else:
        labels, mask = next_token_targets(batch)
    observed = {"context": context, "labels": labels, "mask": mask, "moments": moments}
    if recipe.runs_all_blocks:
        observed["last"] = states.pop()
    return observed | {"hidden": states}


def _recall(params: base.Params, batch: dict, *, model: MultiExit, recipe: Recipe) -> dict:
    backbone = model.bind({name: x for name, x in params.items() if name != "exits"}).backbone
    labels, mask = next_token_targets(batch)
    ids, log_probs = batch["teacher_ids"], batch["teacher_log_probs"]
    return {
        "hidden": [batch[hidden_name(p)].astype(recipe.dtype) for p in model.exits.points],
        "context": backbone.stem(batch)[1],
        "teacher": losses.TopK(ids.astype(jnp.int32), log_probs.astype(jnp.float32)),
        "labels": labels,
        "mask": mask,
        "moments": {},
    }


def heads_loss(
    exits: base.Params,
    rest: base.Params,
    observed: dict,
    *,
    model: MultiExit,
    recipe: Recipe,
) -> tuple[jax.Array, jax.Array]:
    """The recipe's loss of the heads on what `observe` kept: (scalar, per exit [E]).

    Gates and ensembles learn beside the heads; what they learn from does not learn from them.

    Args:
      rest: the model's parameters but for the exits.
    """
    bound = model.bind({**rest, "exits": exits})
    losses_of = _class_losses if model.config.pools else _token_losses
    per_example, beside, right = losses_of(bound, observed, recipe)
    mask = observed["mask"].reshape(-1)
    per_exit = _mean(per_example, mask)
    loss = jnp.dot(jnp.array(recipe.weights), per_exit)
    if beside is not None:
        loss += _mean(beside, mask).sum()
    if model.exits.gate:
        gates = [
            head.gate_logit(hidden, observed["context"]).reshape(-1)
            for head, hidden in zip(bound.heads, observed["hidden"], strict=True)
        ]
        loss += losses.gate_losses(jnp.stack(gates), right, mask > 0).sum()
    return loss, per_exit


def _mean(losses_EN: jax.Array, mask_N: jax.Array) -> jax.Array:
    return (losses_EN * mask_N[None]).sum(-1) / jnp.maximum(mask_N.sum(), 1)


def _token_losses(bound: Bound, observed: dict, recipe: Recipe):
    """(losses [E, N], None, whether the heads are right: bool [E, N]), N = B · T.

    The last is for gates, and None where there are none.
    """
    features = [
        _flat(head.features(hidden, observed["context"])[0])
        for head, hidden in zip(bound.heads, observed["hidden"], strict=True)
    ]
    targets = {"labels": observed["labels"].reshape(-1)}
    if "last" in observed:
        final = _flat(bound.backbone.features(observed["last"], observed["context"]))
        targets["teacher"] = (final, bound.backbone.output_table())
    elif "teacher" in observed:
        targets["teacher"] = losses.TopK(*map(_flat, observed["teacher"]))
    targets = [{name: targets[name]} for name in LOSSES[recipe.loss]]
    heads = features, bound.exit_tables()
    how = {"token_ids": bound.token_ids, "parts": recipe.table_parts}
    found = [losses.exit_losses(*heads, **target, **how) for target in targets]
    right = None
    if hasattr(bound.heads[0], "gate"):
        right = losses.right(*jax.lax.stop_gradient(heads), **targets[0], **how)
    return sum(found) / len(found), None, right


def _flat(x: jax.Array) -> jax.Array:
    return sharding.by_row(x.reshape(-1, x.shape[-1]))


def _class_losses(bound: Bound, observed: dict, recipe: Recipe):
    """(losses [E, B], those of ensembles, whether the answers are right: bool [E, B])."""
    logits, answers = [], []
    for e, hidden in enumerate(observed["hidden"]):
        logits.append(bound.exit_logits(e, hidden, observed["context"], logits))
        answers.append(bound.answer(logits))
    targets = {"labels": observed["labels"]}
    if "last" in observed:
        targets["teacher"] = bound.backbone.readout(observed["last"], observed["context"])
    targets = {name: targets[name] for name in LOSSES[recipe.loss]}

    def compared(of):
        found = [losses.class_losses(of, **{name: x}) for name, x in targets.items()]
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
    if model.config.pools:
        final = base.logits(features, backbone.output_table(), backbone.output_bias())
        per_example = losses.class_losses([final], labels=labels)
    else:
        table = backbone.output_table()
        how = {"labels": labels, "parts": recipe.table_parts}
        per_example = losses.exit_losses([_flat(features)], [table], **how)
    return _mean(per_example, mask)[0]


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
      trained, `grad_norm`).
    """

    def objective(params):
        whole = {**frozen, **computing(params, recipe)}
        rest = {name: x for name, x in whole.items() if name != "exits"}
        observed = observe(whole, batch, model=model, recipe=recipe)
        loss, by_point = jnp.float32(0), {}
        if model.exits.points:
            loss, per_exit = heads_loss(whole["exits"], rest, observed, model=model, recipe=recipe)
            by_point = dict(zip(model.exits.points, per_exit, strict=True))
        if recipe.train == "all":
            by_point[model.config.depth] = final = _final_loss(
                rest, observed, model=model, recipe=recipe
            )
            loss += final
        return loss, (by_point, observed["moments"])

    params = state["params"]
    (loss, (by_point, moments)), gradients = jax.value_and_grad(objective, has_aux=True)(params)
    updates, opt_state = optimizer.update(gradients, state["opt_state"], params)
    params = optax.apply_updates(params, updates)
    if moments:
        params |= {"backbone": base.update_statistics(params["backbone"], moments)}
    metrics = {"loss": loss, "grad_norm": optax.tree.norm(gradients)}
    metrics |= {f"loss/exit_{point}": value for point, value in by_point.items()}
    return {"params": params, "opt_state": opt_state, "step": state["step"] + 1}, metrics
