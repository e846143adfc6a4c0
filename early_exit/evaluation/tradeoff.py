"""What early exit buys: measured decoding speed beside the share of unchanged tokens.

The one idea: the full model and every policy take turns on the same prompts in one process, so
that what is reported is a ratio under the same conditions, not two figures from two moments.
"""

import functools
from collections.abc import Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from early_exit import precision
from early_exit.backbones import base
from early_exit.decoding.generate import Generation, generate
from early_exit.decoding.mode import Mode
from early_exit.exits.multi_exit import MultiExit
from early_exit.policy import ExitPolicy


@functools.partial(jax.jit, static_argnames="model")
@precision.exact
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
    cases: Mapping[str, tuple[ExitPolicy | None, Mode]],
    *,
    new_tokens: int,
    rounds: int = 3,
) -> tuple[list[dict], dict[str, list[Generation]]]:
    """Greedy decoding, batch 1, of every prompt in every case, in turns.

    Args:
      cases: policy and mode by name; the first is what the speed-ups refer to, the full model.
      rounds: how often everything is timed; medians are kept.

    Returns:
      (a row per case: `policy`, its name, `tokens_per_second` after the prefill, `speedup`,
      `agreement` (see above; the first token, always the full model's, is left out),
      `mean_depth`, blocks run per token, `exit_shares` [E + 2], of the exits, the full model and
      looked-up tokens; the generations of the last round by name).
    """
    reference = next(iter(cases))
    generations: dict[str, list[Generation]] = {}
    rates: dict[str, list[float]] = {name: [] for name in cases}
    for _ in range(rounds):
        for name, (policy, mode) in cases.items():
            generations[name] = [
                generate(
                    model,
                    params,
                    [prompt],
                    policy=policy,
                    mode=mode,
                    max_new_tokens=new_tokens,
                )[0]
                for prompt in prompts
            ]
            tokens = sum(len(g.tokens) - 1 for g in generations[name])
            rates[name].append(tokens / sum(g.seconds for g in generations[name]))
    rows = []
    for name in cases:
        of_name = generations[name]
        exits = np.concatenate([g.exits[1:] for g in of_name])
        agrees = np.concatenate(
            [
                agreement(model, params, prompt, g)[1:]
                for prompt, g in zip(prompts, of_name, strict=True)
            ]
        )
        rows.append(
            {
                "policy": name,
                "tokens_per_second": float(np.median(rates[name])),
                # Round by round, so that drift of the machine's speed cancels.
                "speedup": float(np.median(np.divide(rates[name], rates[reference]))),
                "agreement": float(agrees.mean()),
                "mean_depth": float(
                    np.mean([g.layer_tokens / (len(g.tokens) - 1) for g in of_name])
                ),
                "exit_shares": (
                    np.bincount(exits, minlength=len(model.exit_depths) + 1) / len(exits)
                ).tolist(),
            }
        )
    return rows, generations
