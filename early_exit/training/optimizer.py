"""AdamW with clipping, warm-up and cosine decay, from a config."""

import jax
import optax


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
    """Clip by global norm, then AdamW; matrices decay, norms do not."""
    return optax.chain(
        optax.clip_by_global_norm(config.clip_norm),
        optax.adamw(
            learning_rate(config),
            b1=config.b1,
            b2=config.b2,
            weight_decay=config.weight_decay,
            mask=lambda params: jax.tree.map(lambda x: x.ndim > 1, params),
        ),
    )
