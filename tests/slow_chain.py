"""What a chain of a recurrent exit is: its head run over the whole text, anew for every step."""

import functools

import jax
import jax.numpy as jnp


@functools.partial(jax.jit, static_argnames=("model", "steps", "own"))
def slow_chain(params, tokens_T, anchor, *, model, steps, own=False):
    """(states [K, D], tokens that are said [K]) of the chain that begins at position `anchor`.

    Args:
      tokens_T: int32, longer than `anchor` + `steps`; what stands beyond has no part.
      own: whether the text goes on with what the chain says, not as it stands.
    """
    bound = model.bind(params)
    head = bound.recurrent
    embedded, context = bound.backbone.stem({"tokens": tokens_T[None]})
    fused = head.fused(list(bound.hidden_at_exits(embedded, context, model.exits.recurrent_taps)))
    before = jnp.pad(fused[:, :-1], ((0, 0), (1, 0), (0, 0)))
    states, said = [], []
    for at in (anchor + step for step in range(steps)):
        embedded, context = bound.backbone.stem({"tokens": tokens_T[None]})
        hidden = head.joined(before, embedded)
        for block in head.own_blocks:
            hidden, _ = block(hidden, context)
        if not head.own_blocks:
            hidden = hidden + head.mlp(head.mlp_norm(hidden))
        states.append(hidden[0, at])
        said.append(jnp.argmax(head.features(hidden)[0, at] @ bound.draft_table().T))
        before = before.at[:, at + 1].set(hidden[:, at])
        if own:
            tokens_T = tokens_T.at[at + 1].set(said[-1])
    return jnp.stack(states), jnp.stack(said)
