"""What a recurrent exit is worth: speed without loss and with some, and whether costs are foreseen.

    python -m experiments.recurrent_exits.run --workdir=runs/recurrent --check

Greedy, float32, of a calibrated run of SmolLM2-135M with a recurrent exit
(`configs/smollm2_recurrent.py`). All cases of a kind take turns in one process; a speed-up is the
median over rounds of the ratio to the full model within a round. What verified decoding weighs is
measured first, and what that makes of a decode is compared with the clock.
"""

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
from absl import flags

from early_exit.calibration import chains
from early_exit.decoding import measure
from early_exit.decoding.costs import Costs
from early_exit.decoding.decoder import Decoder, Generation
from early_exit.decoding.mode import DEFERRED, LOSSY, VERIFIED, Mode, served, verified
from early_exit.evaluation import drafts, tradeoff
from early_exit.policy import ExitPolicy
from early_exit.runs import assemble
from early_exit.runs.metrics import table
from experiments import bars
from experiments.decoding_speed.timing import Turns, decode_case
from experiments.recurrent_exits import prompts

WORKDIR = flags.DEFINE_string("workdir", None, "Folder of a tuned run.", required=True)
PROMPTS = flags.DEFINE_integer("prompts", 8, "Prompts of each kind.", lower_bound=1)
NEW = flags.DEFINE_integer("new_tokens", 96, "Tokens of an answer.", lower_bound=2)
ROUNDS = flags.DEFINE_integer("rounds", 2, "Turns on the clock.", lower_bound=1)
BATCHES = flags.DEFINE_multi_integer("batch", [1, 4, 8], "Prompts decoded together.")
KINDS = flags.DEFINE_multi_string("kind", [], "Kinds of text (`prompts.py`); all without.")

FULL, RECURRENT, LOOKUP = "full model", "verified: recurrent", "verified: lookup"
# Of a case whose batch keeps all its rows to the end.
WHOLE = ", whole"
# Shares of unchecked drafts that agree.
EPSILONS = (0.95, 0.9)
# What all drafters together are to reach on texts with such names.
TOGETHER = {"functions": 2.5, "code": 2.5, "maths": 1.8}
SLOTS = 512


@dataclasses.dataclass(frozen=True)
class Way:
    """A way to decode, and what its steps cost here."""

    policy: ExitPolicy | None
    mode: Mode
    costs: Callable[[int], Costs] | None = None


def main(argv):
    del argv
    count, new_tokens, rounds = PROMPTS.value, NEW.value, ROUNDS.value
    if bars.QUICK.value:
        count, new_tokens, rounds = 2, 24, 1
    tuned = assemble.load_tuned(Path(WORKDIR.value))
    texts = prompts.load(tuned, count)
    texts = {kind: texts[kind] for kind in KINDS.value or texts}
    rows, speedups, foreseen, equal, between = [], {}, [], {}, []
    for batch in BATCHES.value:
        ways, seconds = _ways(tuned, batch)
        for kind, asked in texts.items():
            cases = {}
            parts = [asked[i : i + batch] for i in range(0, len(asked), batch)]
            for name, way in ways.items():
                decoder = Decoder(tuned.model, tuned.params, way.policy, (), way.mode, way.costs)

                def case(whole, decoder=decoder, parts=parts):
                    how = {"new_tokens": new_tokens, "slots": SLOTS, "whole": whole}
                    return [decode_case(decoder, p, **how) for p in parts]

                cases[name] = case(whole=False)
                if batch > 1 and name in seconds:  # what all its rows together take is foreseen
                    cases[name + WHOLE] = case(whole=True)
            turns = Turns(cases, rounds)
            for name in ways:
                answers = turns.answers[name]
                speedups[kind, batch, name] = 1 / turns.ratio(name, FULL)
                equal[kind, batch, name] = _equal(tuned, asked, answers)
                if name in seconds:
                    foreseen.append((kind, batch, name, _foreseen(turns, name, seconds[name])))
                    if batch == 1:
                        taken = turns.median(name) / turns.median(FULL)
                        between.append((kind, name, *_between(answers, seconds[name], taken)))
                rate = len(asked) * new_tokens / turns.median(name)
                figures = rate, speedups[kind, batch, name], equal[kind, batch, name]
                rows.append((kind, batch, name, *figures, *_drafted(answers)))
            print(table(rows[-len(ways) :], header=_HEADER), flush=True)
    print(
        "\nforeseen ÷ measured seconds\n" + table(foreseen, header=("text", "batch", "mode", "÷"))
    )
    if between:
        print("\nwhat a pass takes beside one position, and speed-ups\n" + table(between, _BETWEEN))
    bars.conclude(
        {"rows": rows, "foreseen": foreseen, "between": between, "costs": seconds},
        _bars(speedups, equal, foreseen),
    )


_HEADER = (
    "text",
    "batch",
    "mode",
    "tokens/s",
    "speed-up",
    "equal",
    "tokens/pass",
    "drafts",
    "kept",
)
_BETWEEN = (
    "text",
    "mode",
    "tokens/pass",
    "checking",
    "drafting",
    "the rest",
    "measured",
    "rows free",
    "drafts free, too",
)


def _ways(tuned: assemble.Tuned, batch: int) -> tuple[dict[str, Way], dict[str, dict]]:
    """The ways by name; and of those that check drafts, seconds of their steps."""
    model, saved = tuned.model, assemble.load_policy(tuned)
    ways = {FULL: Way(None, LOSSY)}
    checked = [verified("exits")] if model.exits.points else []
    checked += [verified("lookup"), verified("recurrent"), served(VERIFIED, model)]
    seconds = {}
    for mode in checked:
        decoder = Decoder(model, tuned.params, saved, (), mode)
        seconds[mode.name] = measure.seconds(decoder, batch, SLOTS)
        ways[mode.name] = Way(saved, mode, measure.measured(decoder, SLOTS).costs)
        print(f"{mode.name}, batch {batch}: {_told(seconds[mode.name])}", flush=True)
    if batch == 1:
        batches = tuned.feed.calibration(tuned.config.calibrate.batches)
        found = drafts.record(model, tuned.params, batches)
        for epsilon in EPSILONS:
            asked = dataclasses.replace(tuned.config.calibrate, method="epsilon", epsilon=epsilon)
            policy = dataclasses.replace(saved, drafts=chains.fit(found, asked)[0])
            ways[f"deferred, ε = {epsilon:g}"] = Way(policy, DEFERRED)
    return ways, seconds


def _told(seconds: dict) -> str:
    first = seconds["passes"][0]
    passes = ", ".join(
        f"{width} positions {taken / first:.2f}"
        for width, taken in zip(seconds["widths"], seconds["passes"], strict=True)
    )
    return f"{1e3 * first:.1f} ms a pass; {passes}; a draft {seconds['draft'] / first:.3f}"


def _equal(tuned, asked: Sequence[Sequence[int]], answers: Sequence[Generation]) -> float:
    """Share of the new tokens that the full model says after the same text."""
    found = [
        tradeoff.agreement(tuned.model, tuned.params, prompt, answer)[1:]
        for prompt, answer in zip(asked, answers, strict=True)
    ]
    return float(np.concatenate(found).mean())


def _foreseen(turns: Turns, name: str, seconds: dict) -> float:
    """What the passes and drafts of a decode take by what each was measured to take, ÷ the clock.

    Of batches that keep their rows to the end, where there are several.
    """
    name = name + WHOLE if name + WHOLE in turns.answers else name
    answers = turns.answers[name]
    passes_N = sum(answer.counts.passes_BEN[-1] for answer in answers)
    steps = sum(float(answer.counts.draft_steps_B) for answer in answers)
    told = passes_N @ np.array(seconds["passes"]) + steps * seconds["draft"]
    return float(told / turns.median(name))


def _between(answers: Sequence[Generation], seconds: dict, taken: float) -> tuple:
    """What stands between the tokens of a pass and the speed-up, in passes of one position.

    Of each pass: what its further positions take, what the drafts take, and what is left of the
    clock (prompts, lookup, sampling, noise). Then the speed-up as it is; as it would be where
    further positions take nothing, as on an accelerator; and where drafts take nothing either.

    Args:
      taken: time ÷ the full model's for as many tokens.
    """
    first = seconds["passes"][0]
    passes_N = sum(answer.counts.passes_BEN[-1] for answer in answers)
    passes = passes_N.sum()
    tokens = sum(len(answer.tokens) - 1 for answer in answers) / passes
    checking = passes_N @ (np.array(seconds["passes"]) / first - 1) / passes
    steps = sum(float(answer.counts.draft_steps_B) for answer in answers)
    drafting = steps * seconds["draft"] / first / passes
    rest = tokens * taken - 1 - checking - drafting
    free = tokens / (1 + drafting + rest), tokens / (1 + rest)
    found = tokens, checking, drafting, rest, 1 / taken, *free
    return tuple(map(float, found))


def _drafted(answers: Sequence[Generation]) -> tuple:
    """Of each row's passes: tokens, drafts that were checked, and the share of these that stood."""
    drafted = sum(int(answer.counts.drafted_BW.sum()) for answer in answers)
    kept = sum(int(answer.counts.accepted_BW.sum()) for answer in answers)
    tokens = sum(len(answer.tokens) - 1 for answer in answers)
    # Positions at full depth that were no drafts: the first of each pass.
    passes = sum(int(answer.counts.evaluations_BE[-1]) - 1 for answer in answers) - drafted
    return tokens / passes, drafted / passes, kept / drafted if drafted else None


def _bars(speedups: dict, equal: dict, foreseen: list) -> list[bars.Bar]:
    """What is claimed, each by its own figure."""
    everything = max((name for *_, name in speedups if name.startswith("verified")), key=len)
    kinds = list(dict.fromkeys(kind for kind, *_ in speedups))
    own = [kind for kind in kinds if kind in prompts.OWN or kind.startswith(prompts.LIKE)]
    batches = sorted({batch for _, batch, _ in speedups})
    found = []
    if 1 in batches:
        for kind in own:
            found.append(bars.Bar(f"{RECURRENT}, {kind}", speedups[kind, 1, RECURRENT], 1.5, True))
        for kind in own:
            limit = next((x for name, x in TOGETHER.items() if name in kind), None)
            if limit is not None:
                figure = speedups[kind, 1, everything]
                found.append(bars.Bar(f"{everything}, {kind}", figure, limit, True))
        for name in (RECURRENT, everything):
            slowest = min(kinds, key=lambda kind: speedups[kind, 1, name])
            figure = speedups[slowest, 1, name]
            found.append(bars.Bar(f"{name}, slowest ({slowest})", figure, 0.97, True))
        for epsilon, limit in zip(EPSILONS, (1.4, 1.7), strict=True) if own else ():
            name = f"deferred, ε = {epsilon:g}"
            mean = np.exp(np.mean([np.log(speedups[kind, 1, name]) for kind in own]))
            found.append(bars.Bar(f"{name}, mean of own answers", float(mean), limit, True))
    for batch in batches:
        for kind in kinds if batch > 1 else ():
            figure = speedups[kind, batch, everything]
            found.append(bars.Bar(f"{everything}, {kind}, batch {batch}", figure, 1.0, True))
    furthest = max((abs(1 - ratio) for *_, ratio in foreseen), default=0.0)
    found.append(bars.Bar("foreseen ÷ measured seconds, furthest from 1", furthest, 0.15))
    return found


if __name__ == "__main__":
    bars.run(main)
