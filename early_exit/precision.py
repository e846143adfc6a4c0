"""How exactly matrices are multiplied.

The one idea: float32 means float32. GPUs and TPUs by default round what they multiply to 10 or 8
bits, so two programs for the same numbers differ in the third digit, and no promise holds that
compares them. Programs that make such promises (decoding, scoring, classifying) go through `exact`;
tuning, whose steps are noisy anyway, keeps the faster default.
"""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp


def exact(program: Callable) -> Callable:
    """A program whose products are of all digits if its parameters are float32; to be jitted.

    With parameters of half precision nothing is changed: their products are exact, and are summed
    in float32.

    Args:
      program: its first argument is the parameters, a tree of arrays.
    """

    @functools.wraps(program)
    def wrapped(params, *args, **kwargs):
        if not _float32(params):
            return program(params, *args, **kwargs)
        with jax.default_matmul_precision("highest"):
            return program(params, *args, **kwargs)

    return wrapped


def _float32(params) -> bool:
    return any(jnp.result_type(leaf) == jnp.float32 for leaf in jax.tree.leaves(params))
