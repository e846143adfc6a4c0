"""Asking exits one after the other: what each says, how sure it is, and what came before.

The one idea: records, decoding and classifying ask in the same order and score with these same
functions, so that a threshold fitted on records does at run time what it did on paper.

`max_prob`, `margin`, `entropy` and `patience` are scores of what a head says; `similarity` and
`gate` are scores of hidden states alone, so that the head is run only where its answer is taken.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from early_exit import confidence as confidences
from early_exit.exits.multi_exit import Bound
from early_exit.policy import ExitPolicy


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Said:
    """What the exits asked so far have said of some positions (or inputs); every field is [...].

    Attributes:
      predicted: int32, the last one's prediction; −1 where it declined, or none was asked.
      agreeing: int32, how many just before it said the same.
    """

    predicted: jax.Array
    agreeing: jax.Array

    @classmethod
    def nothing(cls, shape: tuple[int, ...]) -> "Said":
        return cls(jnp.full(shape, -1, jnp.int32), jnp.zeros(shape, jnp.int32))

    def then(self, summary: confidences.Summary) -> "Said":
        """After one more exit, that says this."""
        agreeing = confidences.agreeing(summary, self.predicted, self.agreeing)
        return Said(confidences.said(summary), agreeing)

    def where(self, rows: jax.Array, otherwise: "Said") -> "Said":
        """This in some rows, `otherwise` in the others."""
        return jax.tree.map(lambda new, old: jnp.where(rows, new, old), self, otherwise)


def hear(
    logits: jax.Array,
    said: Said,
    e: int,
    policy: ExitPolicy | None = None,
    *,
    has_rest: bool = False,
) -> tuple[confidences.Summary, Said]:
    """What an exit says by its logits float32 [..., C], and all that was said with it.

    Args:
      policy: whose temperatures the scores are to be of; None for the logits as they are.
      has_rest: whether the last class stands for "none of these".
    """
    tempered = logits if policy is None else policy.tempered(e, logits)
    summary = confidences.summarize(tempered, has_rest=has_rest)
    return summary, said.then(summary)


def score(name: str, summary: confidences.Summary, said: Said) -> jax.Array:
    """An exit's score [...] float32 by what it says.

    Args:
      said: with it.

    Raises:
      ValueError: `name` is no score by what is said (`confidence.from_logits`).
    """
    return confidences.from_logits(name, summary, said.agreeing)


def hidden_score(
    name: str, bound: Bound, e: int, before: jax.Array, after: jax.Array, context: Any = None
) -> jax.Array:
    """An exit's score [...] float32 by hidden states alone; −inf of the final one, without a gate.

    Args:
      name: one of `confidence.FROM_HIDDEN`.
      before, after: hidden states [..., D] before and after the segment in front of the exit.
    """
    if name == "similarity":
        return confidences.similarity(before, after)
    if e == len(bound.heads):
        return jnp.full(after.shape[: 1 if bound.backbone.config.classifies else -1], -jnp.inf)
    return bound.heads[e].gate_score(after, context)
