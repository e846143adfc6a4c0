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

    The backbone runs as far as the loss needs it: to the last exit, or to its end where the final
    distribution is the teacher.

    Args:
      frozen: the model's parameters without `exits`.
      batch: `tokens`, `segments`, `positions`, int32 [B, T].

    Returns:
      (new state, scalars: `loss`, `loss/exit_<point>`, `grad_norm`, `tokens`).
    """
    points = model.exits.points
    labels_BT, mask_BT = next_token_targets(batch)
    mask = mask_BT.reshape(-1)
    count = jnp.maximum(mask.sum(), 1)
    distil = recipe.loss == "kl"

    def flat(x):
        return x.reshape(-1, x.shape[-1])

    # Outside the differentiated function: the backbone is a constant of the loss.
    bound = model.bind({**frozen, "exits": state["exits"]})
    hidden, context = bound.backbone.stem(batch)
    run_to = (*points, model.config.depth) if distil else points
    at_exits = list(bound.hidden_at_exits(hidden, context, run_to))
    teacher = None
    if distil:
        final = bound.backbone.features(at_exits[-1])
        teacher = flat(final), bound.backbone.output_table()

    def loss_fn(exits):
        bound = model.bind({**frozen, "exits": exits})
        features = [
            flat(head.features(h, context)[0])
            for head, h in zip(bound.heads, at_exits, strict=False)
        ]
        per_position = losses.exit_losses(
            features,
            bound.exit_tables(),
            labels=None if distil else labels_BT.reshape(-1),
            teacher=teacher,
            token_ids=bound.token_ids,
        )
        per_exit = (per_position * mask[None]).sum(-1) / count
        return jnp.dot(jnp.array(recipe.weights), per_exit), per_exit

    (loss, per_exit), gradients = jax.value_and_grad(loss_fn, has_aux=True)(state["exits"])
    updates, opt_state = optimizer.update(gradients, state["opt_state"], state["exits"])
    exits = optax.apply_updates(state["exits"], updates)
    metrics = {"loss": loss, "grad_norm": optax.global_norm(gradients), "tokens": count}
    metrics |= {f"loss/exit_{point}": per_exit[e] for e, point in enumerate(points)}
    new_state = {"exits": exits, "opt_state": opt_state, "step": state["step"] + 1}
    return new_state, metrics
