"""What early exit buys: measured decoding speed beside the share of unchanged tokens.

The one idea: the full model and every policy take turns on the same prompts in one process, so
that what is reported is a ratio under the same conditions, not two figures from two moments.
"""

import dataclasses
import functools
import itertools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from early_exit import precision, sharding
from early_exit.backbones import base
from early_exit.data import pairs
from early_exit.data.transforms import Batch
from early_exit.decoding import cache as caches
from early_exit.decoding import drafters, measure
from early_exit.decoding.costs import Costs
from early_exit.decoding.decoder import Decoder, Generation
from early_exit.decoding.generate import generate
from early_exit.decoding.mode import LOSSY, Mode
from early_exit.exits.multi_exit import MultiExit
from early_exit.policy import ExitPolicy
from early_exit.runs import progress


@dataclasses.dataclass(frozen=True)
class Case:
    """One way to decode; without anything, the full model as it is.

    Attributes:
      name: of the policy; None where none is asked.
      policy: when to leave.
      mode: None skips nothing and looks nothing up.
    """

    name: str | None = None
    policy: ExitPolicy | None = None
    mode: Mode | None = None


@functools.partial(jax.jit, static_argnames="model")
@precision.exact
@sharding.laid_out
def full_choices(params: base.Params, batch: Batch, *, model: MultiExit) -> jax.Array:
    """The full model's greedy next token after every position, int32 [B, T]."""
    bound = model.bind(params)
    hidden, context = bound.backbone.stem(batch)
    hidden = bound.backbone.run_blocks(hidden, 0, model.config.depth, context)
    table = bound.backbone.output_table()
    features = bound.backbone.features(hidden).reshape(-1, table.shape[1])

    def choose(feature, table):
        return jnp.argmax(base.logits(feature, table, rule=model.config.logit_rule))

    # Few positions at a time: full-vocabulary logits of a whole text are gigabytes.
    found = sharding.map_rows(choose, features, table, 64)
    return found.reshape(batch["tokens"].shape).astype(jnp.int32)


def agreement(
    model: MultiExit, params: base.Params, prompt: Sequence[int], generation: Generation
) -> np.ndarray:
    """Per new token: is it what the full model would say after the same text? bool [n]."""
    batch, first = pairs.alone(model.config, prompt, generation.tokens, 64)
    choices = sharding.fetch(full_choices(params, batch, model=model))[0]
    return choices[first - 1 : first + len(generation.tokens) - 1] == generation.tokens


def compare(
    model: MultiExit,
    params: base.Params,
    prompts: Sequence[Sequence[int]],
    cases: Sequence[Case],
    *,
    new_tokens: int,
    rounds: int = 3,
) -> list[dict]:
    """Greedy decoding, batch 1, of every prompt in every case, in turns.

    Args:
      cases: the first, the full model, is what the speed-ups refer to.
      new_tokens: of each answer, at least 2: the first comes out of the prefill.
      rounds: how often everything is timed, after once that is not: programs compile then.
        Medians are kept.

    Returns:
      A row per case: `policy`, its name, and `mode`, by `Mode.name`, both None where there is none;
      `tokens_per_second` after the prefill; `speedup`, of that rate; `seconds_to_last`, from the
      prompt to the last token of an answer, prefill included; `agreement` (see above; the first
      token, always the full model's, is left out); `blocks_per_token`, blocks run after the prefill
      for each token that was kept, drafts that were not kept included; `exit_shares` [E + 3], of
      the exits, the full model, looked-up tokens and those of a recurrent exit.

    Raises:
      ValueError: fewer than 2 new tokens.
    """
    if new_tokens < 2:
        raise ValueError(f"a rate needs at least 2 new tokens, not {new_tokens}")

    def slots_of(prompt: Sequence[int], mode: Mode) -> int:
        return caches.bucket(len(prompt) + new_tokens + mode.capacity - 1)

    @functools.cache
    def costs_of(i: int) -> Costs | None:
        """What steps of a case cost on this device."""
        policy, mode = cases[i].policy, cases[i].mode
        if mode is None or not mode.verified:
            return None
        slots = slots_of(prompts[0], mode)
        return measure.costs(Decoder(model, params, policy, (), mode), 1, slots)

    def answer(i: int, new: int) -> list[Generation]:
        mode = cases[i].mode or LOSSY
        return [
            generate(
                model,
                params,
                [prompt],
                policy=cases[i].policy,
                mode=mode,
                max_new_tokens=new,
                slots=slots_of(prompt, mode),
                costs=costs_of(i),
            )[0]
            for prompt in prompts
        ]

    for i in progress.counted(range(len(cases)), "compiling and weighing", "modes"):
        answer(i, 1)
    rates, to_last = np.zeros((2, len(cases), rounds))
    answers: list[list[Generation]] = [[]] * len(cases)
    turns = list(itertools.product(range(rounds), range(len(cases))))
    for turn, i in progress.counted(turns, "timing", "turns"):
        answers[i] = of_case = answer(i, new_tokens)
        tokens = sum(len(g.tokens) - 1 for g in of_case)
        rates[i, turn] = tokens / sum(g.seconds for g in of_case)
        to_last[i, turn] = np.mean([g.prefill_seconds + g.seconds for g in of_case])
    rows = []
    places = len(drafters.places(model.exit_depths))
    both = progress.counted(list(zip(cases, answers, strict=True)), "comparing", "modes")
    for i, (case, of_case) in enumerate(both):
        exits = np.concatenate([g.exits[1:] for g in of_case])
        agrees = np.concatenate(
            [
                agreement(model, params, prompt, g)[1:]
                for prompt, g in zip(prompts, of_case, strict=True)
            ]
        )
        rows.append(
            {
                "policy": case.name,
                "mode": case.mode and case.mode.name,
                "tokens_per_second": float(np.median(rates[i])),
                # Round by round, so that drift of the machine's speed cancels.
                "speedup": float(np.median(rates[i] / rates[0])),
                "seconds_to_last": float(np.median(to_last[i])),
                "agreement": float(agrees.mean()),
                "blocks_per_token": sum(g.layer_tokens for g in of_case) / exits.size,
                "exit_shares": (np.bincount(exits, minlength=places) / exits.size).tolist(),
            }
        )
    return rows
