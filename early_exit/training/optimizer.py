"""AdamW or SGD with clipping, warm-up and cosine decay, from the section `tune`."""

import functools

import jax
import optax

from early_exit import tree
from early_exit.backbones import base
from early_exit.settings.sections import TuneSettings

# What decays, by its path, whatever its shape: stacked blocks (`model.scan`) have norms of [L, D].
# The first match decides.
DECAYS = (
    (r"(^|/)(kernel|embedding)$", True),
    (r"", False),
)


def learning_rate(tune: TuneSettings) -> optax.Schedule:
    """Linear warm-up over `warmup_steps`, then cosine to `final_fraction` at `steps`."""
    return optax.warmup_cosine_decay_schedule(
        init_value=0.0,
        peak_value=tune.learning_rate,
        warmup_steps=tune.warmup_steps,
        decay_steps=tune.steps,
        end_value=tune.learning_rate * tune.final_fraction,
    )


def make_optimizer(tune: TuneSettings) -> optax.GradientTransformation:
    """Clip by global norm, then AdamW or SGD with momentum; matrices decay, all else does not.

    A backbone that is trained learns at `backbone_rate` times the heads' rate.
    """
    rate = learning_rate(tune)
    if tune.optimizer == "adamw":
        rule = optax.adamw(rate, tune.b1, tune.b2, weight_decay=tune.weight_decay, mask=decays)
    else:
        rule = optax.chain(
            optax.add_decayed_weights(tune.weight_decay, decays),
            optax.sgd(rate, momentum=tune.b1, nesterov=True),
        )
    slower = optax.stateless(functools.partial(_scale_backbone, tune.backbone_rate))
    return optax.chain(optax.clip_by_global_norm(tune.clip_norm), rule, slower)


def decays(params: base.Params) -> base.Params:
    """A tree like `params` of bools: whether each array is drawn towards 0 by weight decay.

    Kernels (of convolutions, too) and embeddings are; norms, biases and statistics are not.
    """
    kept = [tree.match(DECAYS, path) for path in tree.flatten(params)]
    return jax.tree.unflatten(jax.tree.structure(params), kept)


def _scale_backbone(rate: float, updates, params):
    if "backbone" not in updates:
        return updates
    return updates | {"backbone": jax.tree.map(lambda x: rate * x, updates["backbone"])}
