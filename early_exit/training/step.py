"""One tuning step: a pure function of (state, frozen parameters, batch).

The one idea: only the exits are an argument of the differentiated function, so the backbone has
no gradient, no optimizer state and no saved activation, and it is never donated or returned.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax

from early_exit import losses
from early_exit.backbones import base
from early_exit.data.transforms import next_token_targets
from early_exit.exits.multi_exit import MultiExit

LOSSES = ("kl", "cross_entropy")


# {"exits": parameters of the heads, "opt_state": the optimizer's over them, "step": int32 scalar}
TuneState = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Recipe:
    """The loss: Σ_e weight_e · mean over positions of L_e.

    Attributes:
      loss: `kl`, KL(final ‖ exit), or `cross_entropy` against the next token.
      weights: one per exit.
    """

    loss: str
    weights: tuple[float, ...]

    def __post_init__(self):
        if self.loss not in LOSSES:
            raise ValueError(f"unknown loss {self.loss!r}; choose one of {', '.join(LOSSES)}")


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


def init_state(exits: base.Params, optimizer: optax.GradientTransformation) -> TuneState:
    """The state before the first step."""
    return {"exits": exits, "opt_state": optimizer.init(exits), "step": jnp.int32(0)}


def observe(frozen: base.Params, batch: dict, *, model: MultiExit, recipe: Recipe) -> dict:
    """Runs the backbone and keeps what the heads are tuned on.

    It runs as far as the loss needs it: to the last exit, or to its end where the final
    distribution is the teacher.

    Args:
      frozen: the model's parameters without `exits`.
      batch: `tokens`, `segments`, `positions`, int32 [B, T].

    Returns:
      `hidden`, per exit [B, T, D]; `context`, for heads that attend; `teacher`, the final
      features [B, T, D], absent for cross-entropy; `labels` int32 and `mask` bool, [B, T].
    """
    bound = model.bind(frozen)
    hidden, context = bound.backbone.stem(batch)
    labels, mask = next_token_targets(batch)
    observed = {"context": context, "labels": labels, "mask": mask}
    if recipe.loss == "kl":
        points = (*model.exits.points, model.config.depth)
        *at_exits, last = bound.hidden_at_exits(hidden, context, points)
        observed["teacher"] = bound.backbone.features(last)
    else:
        at_exits = list(bound.hidden_at_exits(hidden, context, model.exits.points))
    return observed | {"hidden": at_exits}


def heads_loss(
    exits: base.Params,
    frozen: base.Params,
    observed: dict,
    *,
    model: MultiExit,
    recipe: Recipe,
) -> tuple[jax.Array, jax.Array]:
    """The recipe's loss of the heads on what `observe` kept: (scalar, per exit [E]).

    Gates learn beside the heads whether these are right; what they learn from does not learn from
    them.
    """
    bound = model.bind({**frozen, "exits": exits})

    def flat(x):
        return x.reshape(-1, x.shape[-1])

    targets = {"labels": observed["labels"].reshape(-1)}
    if recipe.loss == "kl":
        targets = {"teacher": (flat(observed["teacher"]), bound.backbone.output_table())}
    features = [
        flat(head.features(hidden, observed["context"])[0])
        for head, hidden in zip(bound.heads, observed["hidden"], strict=True)
    ]
    targets |= {"token_ids": bound.token_ids}
    tables = bound.exit_tables()
    per_position = losses.exit_losses(features, tables, **targets)
    mask = observed["mask"].reshape(1, -1)
    per_exit = (per_position * mask).sum(-1) / jnp.maximum(mask.sum(), 1)
    loss = jnp.dot(jnp.array(recipe.weights), per_exit)
    if model.exits.gate:
        right = losses.right(*jax.lax.stop_gradient((features, tables)), **targets)
        gates = jnp.stack(
            [
                head.gate(hidden).reshape(-1)
                for head, hidden in zip(bound.heads, observed["hidden"], strict=True)
            ]
        )
        loss += losses.gate_losses(gates, right, mask[0] > 0).sum()
    return loss, per_exit


def tune_step(
    state: TuneState,
    frozen: base.Params,
    batch: dict,
    *,
    model: MultiExit,
    recipe: Recipe,
    optimizer: optax.GradientTransformation,
) -> tuple[TuneState, dict[str, jax.Array]]:
    """Updates the exits on one packed batch.

    Args:
      frozen, batch: as for `observe`.

    Returns:
      (new state, scalars: `loss`, `loss/exit_<point>`, `grad_norm`).
    """
    observed = observe(frozen, batch, model=model, recipe=recipe)
    (loss, per_exit), gradients = jax.value_and_grad(heads_loss, has_aux=True)(
        state["exits"], frozen, observed, model=model, recipe=recipe
    )
    updates, opt_state = optimizer.update(gradients, state["opt_state"], state["exits"])
    exits = optax.apply_updates(state["exits"], updates)
    metrics = {"loss": loss, "grad_norm": optax.tree.norm(gradients)}
    metrics |= {f"loss/exit_{point}": per_exit[e] for e, point in enumerate(model.exits.points)}
    return {"exits": exits, "opt_state": opt_state, "step": state["step"] + 1}, metrics
