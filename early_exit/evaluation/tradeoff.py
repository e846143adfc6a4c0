"""What early exit buys: measured decoding speed beside the share of unchanged tokens.

The one idea: the full model and every policy take turns on the same prompts in one process, so
that what is reported is a ratio under the same conditions, not two figures from two moments.
"""

import functools
from collections.abc import Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from early_exit.backbones import base
from early_exit.exits.multi_exit import MultiExit
from early_exit.inference.generate import Generation, generate
from early_exit.policy import ExitPolicy


@functools.partial(jax.jit, static_argnames="model")
def full_choices(params: base.Params, tokens_BT: jax.Array, *, model: MultiExit) -> jax.Array:
    """The full model's greedy next token after every position, int32 [B, T]."""
    bound = model.bind(params)
    hidden, context = bound.backbone.stem({"tokens": tokens_BT})
    hidden = bound.backbone.run_blocks(hidden, 0, model.config.depth, context)
    table = bound.backbone.output_table()
    features = bound.backbone.features(hidden).reshape(-1, table.shape[1])

    def choose(feature):
        return jnp.argmax(base.logits(feature, table))

    # Few positions at a time: full-vocabulary logits of a whole text are gigabytes.
    return jax.lax.map(choose, features, batch_size=64).reshape(tokens_BT.shape).astype(jnp.int32)


def agreement(
    model: MultiExit, params: base.Params, prompt: Sequence[int], generation: Generation
) -> np.ndarray:
    """Per new token: is it what the full model would say after the same text? bool [n]."""
    text = np.array([*prompt, *generation.tokens], np.int32)
    padded = np.pad(text, (0, -len(text) % 64))  # few programs
    choices = np.asarray(full_choices(params, jnp.array(padded[None]), model=model))[0]
    return choices[len(prompt) - 1 : len(text) - 1] == generation.tokens


def compare(
    model: MultiExit,
    params: base.Params,
    prompts: Sequence[Sequence[int]],
    policies: Mapping[str, ExitPolicy | None],
    *,
    new_tokens: int,
    rounds: int = 3,
) -> tuple[list[dict], dict[str, list[Generation]]]:
    """Greedy decoding, batch 1, of every prompt under every policy, in turns.

    Args:
      policies: by name; one must be None, the full model, which the speed-ups refer to.
      rounds: how often everything is timed; medians are kept.

    Returns:
      (a row per policy: `policy`, `tokens_per_second` after the prefill, `speedup`, `agreement`
      (see above; the first token, always the full model's, is left out), `mean_depth` in blocks,
      `exit_shares` [E + 1]; the generations of the last round by policy).

    Raises:
      ValueError: no full model among the policies.
    """
    dense = [name for name, policy in policies.items() if policy is None]
    if not dense:
        raise ValueError("one of the policies must be None: the full model to compare with")
    generations: dict[str, list[Generation]] = {}
    rates: dict[str, list[float]] = {name: [] for name in policies}
    for _ in range(rounds):
        for name, policy in policies.items():
            generations[name] = [
                generate(model, params, [prompt], policy=policy, max_new_tokens=new_tokens)[0]
                for prompt in prompts
            ]
            tokens = sum(len(g.tokens) - 1 for g in generations[name])
            rates[name].append(tokens / sum(g.seconds for g in generations[name]))
    rows = []
    for name in policies:
        exits = np.concatenate([g.exits[1:] for g in generations[name]])
        agrees = np.concatenate(
            [
                agreement(model, params, prompt, g)[1:]
                for prompt, g in zip(prompts, generations[name], strict=True)
            ]
        )
        rows.append(
            {
                "policy": name,
                "tokens_per_second": float(np.median(rates[name])),
                # Round by round, so that drift of the machine's speed cancels.
                "speedup": float(np.median(np.divide(rates[name], rates[dense[0]]))),
                "agreement": float(agrees.mean()),
                "mean_depth": float(model.exit_depths[exits].mean()),
                "exit_shares": (
                    np.bincount(exits, minlength=len(model.exit_depths)) / len(exits)
                ).tolist(),
            }
        )
    return rows, generations
