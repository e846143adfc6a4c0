"""Tuning in a loop and with an optimizer of one's own: the library gives the loss, and no more.

python examples/own_loop.py tests/fixtures/tiny_chat
"""

import dataclasses
import sys

import jax
import numpy as np
import optax

import early_exit as ee


def tuned(model, batches, optimizer):
    """The model after one step a batch, int32 [B, T] each; and the losses, in nats."""
    recipe = ee.Recipe("kl", ee.ExitWeights((1.0,) * len(model.points)))
    trained, frozen = {"exits": model.heads}, {"backbone": model.params["backbone"]}

    @jax.jit
    def step(trained, state, batch):
        # Differentiated by its first argument: what is not in there stays as it is.
        gradient = jax.value_and_grad(ee.tuning_loss, has_aux=True)
        found, gradients = gradient(trained, frozen, batch, model=model.static, recipe=recipe)
        (loss, (by_exit, _)) = found
        updates, state = optimizer.update(gradients, state, trained)
        return optax.apply_updates(trained, updates), state, loss, by_exit

    state, losses = optimizer.init(trained), []
    for tokens in batches:
        ones, places = np.ones_like(tokens), np.arange(tokens.shape[1], dtype=np.int32)
        batch = {"tokens": tokens, "documents": ones, "positions": ones * places}
        trained, state, loss, by_exit = step(trained, state, batch)
        losses.append(float(loss))
    return dataclasses.replace(model, heads=trained["exits"], policy=None), losses


def main(source):
    model = ee.attach(ee.load(source), (2, 4))
    text = np.array(model.tokenizer.encode(ee.__doc__ * 20), np.int32)
    rows = text[: len(text) // 128 * 128].reshape(-1, 2, 64)
    model, losses = tuned(model, rows, optax.lion(1e-4))
    print(f"loss {losses[0]:.3f} → {losses[-1]:.3f} in {len(losses)} steps")


if __name__ == "__main__":
    main(sys.argv[1])
