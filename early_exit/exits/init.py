"""Where a head's first weights come from: drawn at random, or copied from the backbone.

Copying follows EE-LLM (Chen et al. 2023, §3.2) and EE-Tuning (Pan et al. 2024, §2.2): the norm
and output matrix from the readout, the feed-forward part from the block the exit stands after,
the whole block from the last one. An encoder's readout has no norm; its last block ends in one.
"""

import jax
import jax.numpy as jnp

from early_exit import tree

INITS = ("copy", "random")
# Parts of a head that a backbone has no like of.
DRAWN = ("gate", "cascade", "ensemble", "custom")


def copied_recurrent(drawn: dict, backbone: dict, depth: int, token_ids: jax.Array | None) -> dict:
    """A recurrent exit's parameters: copied where the backbone has a like, else as they are drawn.

    The blocks are the last block's, norm and output matrix the readout's. Of what is fused and
    joined, the state after the deepest tap goes through as it is, and the rest is `drawn`.

    Raises:
      ValueError: as `copied`.
    """
    parts = {name: drawn[name] for name in ("mlp_norm", "mlp", "norm", "output") if name in drawn}
    found = drawn | copied(parts, backbone, depth, depth, token_ids)
    if "blocks" in drawn:
        last = backbone["blocks"][str(depth - 1)]
        found["blocks"] = {name: jax.tree.map(jnp.copy, last) for name in drawn["blocks"]}
    for name in ("fuse", "join"):
        kernel = drawn[name]["kernel"]
        width = kernel.shape[1]
        found[name] = {"kernel": kernel.at[-width:].set(jnp.eye(width, dtype=kernel.dtype))}
    return found


def copied(head: dict, backbone: dict, point: int, depth: int, token_ids: jax.Array | None) -> dict:
    """A head's parameters, every one copied from the backbone's.

    Args:
      head: the head's parameters (only its structure is used).
      backbone: the backbone's parameters.
      point: block (1-based) after which the head stands.
      token_ids: int32 [R], the tokens a head with reduced classes predicts. Its last row, "none
        of these", starts as the mean of the rows it stands for.

    Raises:
      ValueError: a part that the backbone has no like of, or not of this shape.
    """
    block, last = (backbone["blocks"][str(i)] for i in (point - 1, depth - 1))
    sources = {
        "mlp_norm": block.get("mlp_norm"),
        "mlp": block.get("mlp"),
        "block": last,
        "norm": backbone.get("final_norm", last.get("mlp_norm")),
        "output": backbone.get("output", backbone.get("embedding")),
    }
    found = {name: sources.get(name) for name in head}
    if "output" in head:
        rows = _rows(found["output"]["embedding"], token_ids, head["output"]["embedding"])
        found["output"] = found["output"] | {"embedding": rows}
    unlike = [name for name in head if tree.shapes(found[name] or {}) != tree.shapes(head[name])]
    if unlike:
        raise ValueError(
            f"the head after block {point} cannot copy its {', '.join(unlike)}: the backbone has "
            "nothing of that shape; use exits.init=random"
        )
    # A copy, not a view: tuning donates the heads' buffers and must not take the backbone's along.
    return jax.tree.map(jnp.copy, found)


def _rows(table: jax.Array, token_ids: jax.Array | None, like: jax.Array) -> jax.Array:
    if token_ids is None:
        return table
    kept = table[token_ids]
    rest = (table.sum(0) - kept.sum(0)) / (table.shape[0] - kept.shape[0])
    rows = jnp.concatenate([kept, rest[None]])
    return rows[-like.shape[0] :]
