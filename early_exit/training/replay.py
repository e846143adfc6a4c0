"""A batch that broke a run, run once more: was it the batch, or what had been learned before?

The one idea: the last good checkpoint is a point from which the same batch can be looked at alone.
If all is finite there, the steps since have ruined the parameters; if not, the batch is to blame.
"""

import dataclasses
import math
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax

from early_exit import sharding, tree
from early_exit.backbones import base
from early_exit.runs import checkpoint
from early_exit.runs.layout import CHECKPOINTS
from early_exit.settings.sections import Settings
from early_exit.training import bad_batch, loop, plan
from early_exit.training import step as steps


@dataclasses.dataclass(frozen=True)
class Replay:
    """What one batch does to a checkpoint.

    Attributes:
      step: of the run at which the batch came.
      checkpoint: step of the parameters it was given; 0 for those before the first step.
      losses: `loss`, and `loss/exit_<point>` of every exit; NaN for one left out at this step.
      gradient_norms: of each part of what is trained, such as `exits/8` or `backbone/blocks`.
      inputs: names of the batch's arrays that hold a value that is not finite.
      parameter, gradient: the first path where one is not finite; None if there is none.
      largest: (path, size) of the parameter that is furthest from 0.
    """

    step: int
    checkpoint: int
    losses: dict[str, float]
    gradient_norms: dict[str, float]
    inputs: list[str]
    parameter: str | None
    gradient: str | None
    largest: tuple[str, float]

    def verdict(self) -> str:
        """What to look at."""
        learned = f"the parameters of step {self.checkpoint}"
        slower = "lower tune.learning_rate or tune.clip_norm"
        if self.inputs:
            return f"the batch itself is not finite ({', '.join(self.inputs)}): mend the data"
        if self.parameter:
            return f"{learned} are not finite: {slower}, and tune again in another folder"
        if self.gradient or not math.isfinite(self.losses["loss"]):
            path, size = self.largest
            return (
                f"{learned} and the batch are finite, and what comes of them is not: look at the "
                f"batch, or, if {path} with a value of {size:.3g} has grown too large, {slower}"
            )
        return (
            f"with {learned} all is finite: the {self.step - 1 - self.checkpoint} steps after them "
            f"have ruined the parameters, and not this batch; {slower}"
        )


def replay(config: Settings, workdir: Path, path: Path) -> Replay:
    """Runs a batch through the step, from the last checkpoint before it, and changes nothing.

    Raises:
      FileNotFoundError: no such batch.
      ValueError: a damaged file, or a batch that does not fit the run.
    """
    step, batch = bad_batch.read(path)
    run = loop.Run(config, workdir)
    good = max((s for s in checkpoint.steps(workdir / CHECKPOINTS) if s < step), default=0)
    if good:
        like = {"params": plan.state(config, run.model, run.mesh)["params"]}
        state, _ = checkpoint.restore(workdir / CHECKPOINTS, like, good)
    else:
        state = run.state()
    params = state["params"]
    inputs = [name for name, x in batch.items() if not np.isfinite(x).all()]
    try:
        metrics, gradients = _step(run, params, step, run.place_batch(batch))
    except (TypeError, KeyError, ValueError) as error:
        raise ValueError(
            f"the batch in {path} does not fit the run in {workdir}: {error}"
        ) from error
    sizes = _sizes({**run.frozen, **params})
    return Replay(
        step=step,
        checkpoint=good,
        losses={name: float(x) for name, x in metrics.items() if name.startswith("loss")},
        gradient_norms={name: float(optax.tree.norm(x)) for name, x in _parts(gradients).items()},
        inputs=inputs,
        parameter=_first_not_finite(sizes),
        gradient=_first_not_finite(_sizes(gradients)),
        largest=max(sizes.items(), key=lambda item: item[1]),
    )


def _step(run: loop.Run, params: base.Params, step: int, batch: dict) -> tuple[dict, base.Params]:
    """(metrics, gradients) of the run's step."""

    def take(gradients, state, params):
        return jax.tree.map(jnp.zeros_like, gradients), gradients

    # An optimizer whose state is the gradients, and which changes nothing.
    taker = optax.GradientTransformation(lambda params: (), take)

    def function(state, frozen, batch):
        how = {"model": run.model, "recipe": run.recipe, "optimizer": taker}
        return steps.tune_step(state, frozen, batch, **how)

    state = steps.init_state(params, taker) | {"step": jnp.int32(step - 1)}
    new, metrics = jax.jit(sharding.under(run.mesh, function))(state, run.given, batch)
    return metrics, new["opt_state"]


def _parts(params: base.Params) -> dict[str, base.Params]:
    return {f"{top}/{name}": part for top, parts in params.items() for name, part in parts.items()}


def _sizes(params: base.Params) -> dict[str, float]:
    """Path → the largest magnitude in every array."""
    return {path: float(jnp.abs(leaf).max()) for path, leaf in tree.flatten(params).items()}


def _first_not_finite(sizes: dict[str, float]) -> str | None:
    return next((path for path, size in sizes.items() if not math.isfinite(size)), None)
