"""How sure a head is of its own prediction, as a number that grows with confidence.

The one idea: decoding and offline evaluation call these same functions on the same summary of a
distribution, so a threshold fitted on records does in the loop exactly what it did on paper.

`max_prob`, `margin` and `entropy` need the head's logits, `patience` the predictions of the heads
before as well (Zhou et al. 2020, PABEE: how many in a row have said the same); other scores of what
a head says can be added (`register`). `similarity` of hidden states (Schuster et al. 2022, CALM,
§3.5) and a learned `gate` on them need no logits: with these a head is evaluated only where an exit
is taken.
"""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp

FROM_LOGITS = ("max_prob", "margin", "entropy", "patience")
FROM_HIDDEN = ("similarity", "gate")
NAMES = FROM_LOGITS + FROM_HIDDEN

# Temperatures that records know: scores at any of them follow from what `soften` keeps.
TEMPERATURES = tuple(2 ** (step / 4) for step in range(-4, 9))


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Summary:
    """What the scores need of a distribution over classes; every field has the shape [...].

    Attributes:
      prediction: int32, the best class that stands for a token.
      top: float32, its log-probability.
      second: float32, log-probability of the runner-up, "none of these" included.
      entropy: float32, in units of the uniform distribution's: 0 sure, 1 uniform.
      declines: bool, whether "none of these" is the most probable class.
    """

    prediction: jax.Array
    top: jax.Array
    second: jax.Array
    entropy: jax.Array
    declines: jax.Array


def summarize(logits: jax.Array, has_rest: bool = False) -> Summary:
    """Summary of softmax(logits), logits float32 [..., C].

    Args:
      has_rest: whether the last class stands for "none of these".
    """
    log_probs = jax.nn.log_softmax(logits, axis=-1)
    real = log_probs[..., :-1] if has_rest else log_probs
    prediction = jnp.argmax(real, axis=-1).astype(jnp.int32)
    top = jnp.max(real, axis=-1)
    # A second maximum, not top_k: where only `top` is used the compiler drops it.
    is_top = jax.nn.one_hot(prediction, real.shape[-1], dtype=bool)
    second = jnp.max(jnp.where(is_top, -jnp.inf, real), axis=-1)
    rest = log_probs[..., -1] if has_rest else jnp.full_like(top, -jnp.inf)
    entropy = -jnp.sum(jnp.exp(log_probs) * log_probs, axis=-1)
    return Summary(
        prediction=prediction,
        top=top,
        second=jnp.maximum(second, rest),
        entropy=entropy / jnp.log(logits.shape[-1]),
        declines=rest > top,
    )


def soften(logits: jax.Array, has_rest: bool = False) -> dict[str, jax.Array]:
    """What `max_prob` and `margin` at any of `TEMPERATURES` are made of.

    Args:
      logits: float32 [..., C].
      has_rest: whether the last class stands for "none of these".

    Returns:
      log_normalizers float32 [K, ...], log Σ exp((logits − top) / T) with the top of the
      prediction; second [...], how far below it the runner-up is, "none of these" included.
    """
    real = logits[..., :-1] if has_rest else logits
    below = jnp.max(real, axis=-1, keepdims=True) - logits
    is_top = jax.nn.one_hot(jnp.argmax(real, axis=-1), logits.shape[-1], dtype=bool)
    return {
        "log_normalizers": jnp.stack(
            [jax.nn.logsumexp(-below / temperature, axis=-1) for temperature in TEMPERATURES]
        ),
        "second": jnp.min(jnp.where(is_top, jnp.inf, below), axis=-1),
    }


def agreeing(summary: Summary, predicted: jax.Array, before: jax.Array) -> jax.Array:
    """How many heads in a row, just before this one, predicted what it predicts: int32 [...].

    A head that declines agrees with none, and none with it.

    Args:
      predicted: what the head before said (−1: nothing).
      before: how many heads before that one had said the same.
    """
    same = (summary.prediction == predicted) & ~summary.declines
    return jnp.where(same, before + 1, 0)


def said(summary: Summary) -> jax.Array:
    """The prediction [...], −1 where the head declines."""
    return jnp.where(summary.declines, -1, summary.prediction)


Score = Callable[[Summary], jax.Array]
_registered: dict[str, Score] = {}


def register(name: str, score: Score) -> None:
    """Adds a score of what a head says: Summary of [...] → float32 [...], larger where surer.

    It is a function of the summary alone, so that it can be traced wherever a head is asked.

    Raises:
      ValueError: another one has that name.
    """
    if name in NAMES or _registered.get(name, score) is not score:
        raise ValueError(f"there is a confidence {name!r} already; choose another name")
    _registered[name] = score


def registered() -> tuple[str, ...]:
    """The scores that were added."""
    return tuple(_registered)


def names() -> tuple[str, ...]:
    """Every score that there is."""
    return NAMES + registered()


def from_logits(name: str, summary: Summary, agreeing: jax.Array) -> jax.Array:
    """Score [...] float32 of a head's prediction; −inf where the head declines to predict.

    Args:
      agreeing: see the function of that name.

    Raises:
      ValueError: `name` is not one of `FROM_LOGITS`, nor was it added.
    """
    if name == "max_prob":
        score = jnp.exp(summary.top)
    elif name == "margin":
        score = jnp.exp(summary.top) - jnp.exp(summary.second)
    elif name == "entropy":
        score = 1 - summary.entropy
    elif name == "patience":
        score = agreeing.astype(jnp.float32)
    elif name in _registered:
        score = _registered[name](summary).astype(jnp.float32)
    else:
        known = ", ".join(FROM_LOGITS + registered())
        raise ValueError(f"unknown confidence {name!r}; choose one of {known}")
    return jnp.where(summary.declines, -jnp.inf, score)


def similarity(before: jax.Array, after: jax.Array) -> jax.Array:
    """Cosine [...] float32 between the hidden states [..., D] at two neighbouring exits.

    `before` is the previous exit's (the stem's for the first exit).
    """
    before, after = before.astype(jnp.float32), after.astype(jnp.float32)
    dot = jnp.sum(before * after, axis=-1)
    norms = jnp.linalg.norm(before, axis=-1) * jnp.linalg.norm(after, axis=-1)
    return dot / jnp.maximum(norms, jnp.finfo(jnp.float32).tiny)
