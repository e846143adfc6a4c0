"""Random numbers by name: what each thing is drawn from, all of one seed.

The one idea: a run has one seed, and everything drawn in it has a stream of its own, named by what
is drawn. A stream never meets another one, and does not change when others come or go.
"""

import zlib

import jax


def stream(seed: int, name: str) -> jax.Array:
    """The key of a run's stream: fold_in(key(seed), CRC-32 of the name), the same everywhere."""
    return jax.random.fold_in(jax.random.key(seed), zlib.crc32(name.encode()))
