"""Where a head's first weights come from: drawn at random, or copied from the backbone.

Copying follows EE-LLM (Chen et al. 2023, §3.2) and EE-Tuning (Pan et al. 2024, §2.2): the norm
and output matrix from the readout, the feed-forward part from the block the exit stands after,
the whole block from the last one.
"""

import jax
import jax.numpy as jnp

INITS = ("copy", "random")


def copied(head: dict, backbone: dict, point: int, depth: int, token_ids: jax.Array | None) -> dict:
    """A head's parameters, every one copied from the backbone's.

    Args:
      head: the head's parameters (only its structure is used).
      backbone: the decoder's parameters.
      point: block (1-based) after which the head stands.
      token_ids: int32 [R], the tokens a head with reduced classes predicts. Its last row, "none
        of these", starts as the mean of the rows it stands for.
    """
    block = backbone["blocks"][str(point - 1)]
    table = backbone.get("output", backbone["embedding"])["embedding"]
    sources = {
        "mlp_norm": lambda: block["mlp_norm"],
        "mlp": lambda: block["mlp"],
        "block": lambda: backbone["blocks"][str(depth - 1)],
        "norm": lambda: backbone["final_norm"],
        "output": lambda: {"embedding": _rows(table, token_ids, head["output"]["embedding"])},
    }
    # A copy, not a view: tuning donates the heads' buffers and must not take the backbone's along.
    return jax.tree.map(jnp.copy, {name: sources[name]() for name in head})


def _rows(table: jax.Array, token_ids: jax.Array | None, like: jax.Array) -> jax.Array:
    if token_ids is None:
        return table
    kept = table[token_ids]
    rest = (table.sum(0) - kept.sum(0)) / (table.shape[0] - kept.shape[0])
    rows = jnp.concatenate([kept, rest[None]])
    return rows[-like.shape[0] :]
