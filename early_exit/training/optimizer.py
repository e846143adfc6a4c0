"""AdamW or SGD with clipping, warm-up and cosine decay, from a config."""

import functools

import jax
import optax

OPTIMIZERS = ("adamw", "sgd")


def learning_rate(config) -> optax.Schedule:
    """Linear warm-up over `warmup_steps`, then cosine to `final_fraction` at `steps`.

    Raises:
      ValueError: the warm-up is not shorter than the run.
    """
    if not 0 <= config.warmup_steps < config.steps:
        raise ValueError(
            f"tune.warmup_steps={config.warmup_steps} must be below tune.steps={config.steps}"
        )
    return optax.warmup_cosine_decay_schedule(
        init_value=0.0,
        peak_value=config.learning_rate,
        warmup_steps=config.warmup_steps,
        decay_steps=config.steps,
        end_value=config.learning_rate * config.final_fraction,
    )


def make_optimizer(config) -> optax.GradientTransformation:
    """Clip by global norm, then AdamW or SGD with momentum; matrices decay, norms do not.

    A backbone that is trained learns at `backbone_rate` times the heads' rate.

    Raises:
      ValueError: unknown optimizer.
    """
    if config.optimizer not in OPTIMIZERS:
        known = ", ".join(OPTIMIZERS)
        raise ValueError(f"unknown tune.optimizer {config.optimizer!r}; choose one of {known}")
    rate = learning_rate(config)
    if config.optimizer == "adamw":
        rule = optax.adamw(rate, config.b1, config.b2, weight_decay=config.weight_decay, mask=_wide)
    else:
        rule = optax.chain(
            optax.add_decayed_weights(config.weight_decay, _wide),
            optax.sgd(rate, momentum=config.b1, nesterov=True),
        )
    slower = optax.stateless(functools.partial(_scale_backbone, config.backbone_rate))
    return optax.chain(optax.clip_by_global_norm(config.clip_norm), rule, slower)


def _wide(params):
    return jax.tree.map(lambda x: x.ndim > 1, params)


def _scale_backbone(rate: float, updates, params):
    if "backbone" not in updates:
        return updates
    return updates | {"backbone": jax.tree.map(lambda x: rate * x, updates["backbone"])}
