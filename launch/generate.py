"""Answers prompts with dynamic depth, each token coloured by the depth it needed.

    python -m launch.generate --workdir=runs/smollm2 --prompt="Write a haiku about time."
    python -m launch.generate --workdir=runs/smollm2 --prompt="def square(x):" --raw --mode=verified
    python -m launch.generate --workdir=runs/smollm2 --input=prompts.txt --output=answers.jsonl
    python -m launch.generate --config=configs/smollm2_135m.py --mode=verified --prompt="Hello!"

One prompt is answered as it is decoded; the last line counts the tokens that left at each exit. A
file has a prompt on each line, as text or (`.jsonl`) as an object with a "prompt"; the answers go,
in the same order, to a JSONL file with their statistics. Tokens that the full model is too unsure
of, by a policy calibrated with --abstain or --reject_risk, are named. The fourth needs no run: it
takes the network of a config without exits, for which earlier text still proposes tokens.
`--costs=1` says what the steps of the mode cost on this device, by which drafts are weighed.
"""

import dataclasses
import itertools
import json
import sys
from pathlib import Path
from typing import Any

import jax
import numpy as np
from absl import flags

from early_exit import sharding
from early_exit.calibration import drift, promise, rejection
from early_exit.data import text_files
from early_exit.decoding import drafters, measure
from early_exit.decoding import mode as modes
from early_exit.decoding.mode import Mode
from early_exit.decoding.sampling import Sampling
from early_exit.library import answers
from early_exit.library.answers import Answer
from early_exit.library.model import Model, network, of_run
from early_exit.report import tokens as token_colours
from early_exit.runs import assemble, progress
from early_exit.runs.metrics import table
from early_exit.storage import buckets, copies, files
from launch import common, decoding_flags, on_mesh, usage

PROMPT = flags.DEFINE_string("prompt", None, "What to answer, or - for standard input.")
INPUT = flags.DEFINE_string("input", None, "File of prompts, instead of --prompt.")
OUTPUT = flags.DEFINE_string("output", None, "JSONL file for the answers to --input.")
BATCH = flags.DEFINE_integer("batch", 8, "Prompts of --input decoded together.", lower_bound=1)
PENDING = flags.DEFINE_integer("pending", 8, "Most positions in one pass, except with lossy.")
RAW = flags.DEFINE_bool(
    "raw", False, "Continue the prompt as it is, special tokens and all, without the chat template."
)
FULL = flags.DEFINE_bool("full", False, "Consult no exit.")
NEW = flags.DEFINE_integer("max_new_tokens", 160, "Most tokens to answer with.", lower_bound=1)
TEMPERATURE = flags.DEFINE_float("temperature", 0.0, "0 is greedy.")
TOP_K = flags.DEFINE_integer("top_k", 0, "Sample among the k most probable tokens; 0 is all.")
TOP_P = flags.DEFINE_float("top_p", 1.0, "Sample among tokens of this total probability.")
SEED = flags.DEFINE_integer("seed", 0, "Of the sampling.", **common.SEEDS)
COLOUR = flags.DEFINE_enum(
    "colour", "auto", ["auto", "always", "never"], "Colour tokens by depth (auto: on a terminal)."
)

COSTS = flags.DEFINE_integer(
    "costs",
    0,
    "Answer nothing: say what steps of the mode cost here, so many rows together (0: answer).",
    lower_bound=0,
)

usage.group("how tokens are drawn", TEMPERATURE, TOP_K, TOP_P, SEED)
for _module in (decoding_flags, on_mesh):  # what --help lists
    flags.adopt_module_key_flags(_module)


def main(argv):
    on_mesh.begin(argv)
    if [PROMPT.value, INPUT.value, COSTS.value or None].count(None) != 2:
        raise ValueError("give one of --prompt, --input and --costs")
    if (INPUT.value is None) != (OUTPUT.value is None):
        raise ValueError("--input and --output go together")
    texts = text_files.listed(copies.fetched(INPUT.value), "prompt") if INPUT.value else None
    mode = dataclasses.replace(decoding_flags.mode(), pending=PENDING.value)
    _sampling()  # what cannot be is said before anything is loaded
    common.tell_devices()
    model, mode = _model(mode)
    if COSTS.value:
        _tell_costs(model, COSTS.value, mode)
        return
    policy = model.policy
    rejection.least_probability(policy)  # not only when all is decoded
    if policy and (warning := promise.elsewhere(policy.provenance, mode.name, NEW.value)):
        print(f"warning: {warning}", file=sys.stderr)
    if texts is None:
        text = text_files.unicode(PROMPT.value, "--prompt")
        if text == "-":  # of several processes, the first is asked
            given = b"" if jax.process_index() else sys.stdin.buffer.read()
            text = sharding.agreed(text_files.decode(given, "the standard input"))
        _show(model, text, mode)
    else:
        _answer_all(model, texts, mode, buckets.place(OUTPUT.value))


def _model(mode: Mode) -> tuple[Model, Mode]:
    """The model that the flags name, with the policy that they ask for, and the mode it serves."""
    if common.WORKDIR.value is None:
        config = on_mesh.settings()
        tuned, model = None, network(dataclasses.asdict(config.model), on_mesh.mesh_of(config))
    else:
        tuned = on_mesh.load_tuned()
        model = of_run(tuned, None)
    if model.static.config.classifies:
        where = common.WORKDIR.value or "this config"
        raise ValueError(f"{where} holds a classifier; use launch.classify")
    mode = modes.served(mode, model.static)
    if tuned is None or FULL.value or not mode.asks_policy:
        return model, mode
    return dataclasses.replace(model, policy=assemble.load_policy(tuned)), mode


def _tell_costs(model: Model, batch: int, mode: Mode) -> None:
    """Prints what verified decoding weighs; measures it if it is not known."""
    how = answers.asked(model, mode, _sampling(), SEED.value, NEW.value)
    found = measure.known_seconds(answers.decoder(model, how), batch)
    first = found["passes"][0]
    rows = [
        (f"a pass of {width} position{'s'[: width > 1]}", 1e3 * taken, taken / first)
        for width, taken in zip(found["widths"], found["passes"], strict=True)
    ]
    if "recurrent" in mode.drafters:
        rows.append(("a draft of the recurrent exit", 1e3 * found["draft"], found["draft"] / first))
    for point, saved in zip(model.points if found["saved"] else (), found["saved"], strict=True):
        told = f"saved by leaving after block {point}, asking aside"
        rows.append((told, 1e3 * saved, saved / first))
    print(f"{mode.name}, {batch} rows together, on {found['device']}")
    print(table(rows, header=("step", "ms", "of a plain pass")))


def _sampling() -> Sampling:
    return Sampling(TEMPERATURE.value, TOP_K.value, TOP_P.value)


def _how(mode: Mode) -> dict[str, Any]:
    return {
        "mode": mode,
        "max_new_tokens": NEW.value,
        "sampling": _sampling(),
        "raw": RAW.value,
        "seed": SEED.value,
    }


def _show(model: Model, text: str, mode: Mode) -> None:
    """Prints an answer as it comes."""
    coloured = COLOUR.value == "always" or (COLOUR.value == "auto" and sys.stdout.isatty())
    exit_depths = model.static.exit_depths.tolist()
    shown = 0
    with progress.waiting("compiling"):
        answers_so_far = answers.stream(model, text, **_how(mode))
        first = next(answers_so_far)
    for answer in itertools.chain([first], answers_so_far):
        if coloured:
            depths = answer.depths[shown:].tolist()
            added = token_colours.ansi(answer.pieces[shown:], depths, exit_depths)
        else:
            added = token_colours.printable(answer.added)
        sys.stdout.write(added)
        sys.stdout.flush()
        shown = len(answer.tokens)

    print("\n")
    if coloured:
        others = drafters.of(model.static, mode)
        sources = [1 - drafter.place for drafter in others if drafter.place]
        print(token_colours.legend_ansi(exit_depths, sources))
    decoded = len(answer.tokens) - 1
    facts = _statistics(answer, model, mode)
    left = ", ".join(f"{where}: {n}" for where, n in facts["exits"].items())
    dropped = ", drafts that were not kept included" if mode.verified else ""
    print(
        f"{len(answer.tokens)} tokens, {mode.name}, "
        f"{decoded / answer.seconds if decoded else 0:.1f} tokens/s after the prompt, "
        f"{facts['blocks_per_token']:.1f} blocks run per token{dropped} (the full model runs "
        f"{model.depth}); proposed after {left}"
    )
    print(_saved(answer, model, mode))
    if facts["flagged"]:
        unsure = ", ".join(
            json.dumps(answer.pieces[i], ensure_ascii=False) for i in facts["flagged"]
        )
        print(f"less probable than {rejection.least_probability(model.policy):.2f}: {unsure}")


def _saved(answer: Answer, model: Model, mode: Mode) -> str:
    """What the full model alone would have done for this answer, beside what was done."""
    decoded = len(answer.tokens) - 1
    if not decoded:
        return "saved: nothing, for the first token comes out of the prompt's own pass"
    if not mode.verified:
        share = 1 - answer.layer_tokens / (decoded * model.depth)
        return f"saved: {max(share, 0):.0%} of the blocks that the full model runs"
    passes = float(answer.counts.passes_BEN[-1].sum())
    said = f"saved: {decoded} tokens in {passes:.0f} passes of the full model, whose answer it is"
    how = answers.asked(model, mode, _sampling(), SEED.value, NEW.value)
    if (alone := measure.pass_seconds(answers.decoder(model, how))) is None or not answer.seconds:
        return said
    return f"{said}; alone it takes about {decoded * alone / answer.seconds:.1f} times as long here"


def _answer_all(model: Model, texts: list[str], mode: Mode, path: Path) -> None:
    """Answers a file of prompts and writes them whole or not at all."""
    found = answers.generate(model, texts, batch=BATCH.value, **_how(mode))
    if jax.process_index():
        return
    files.make_folder(path.parent)
    rows = [_statistics(answer, model, mode) for answer in found]
    with files.replacing(path) as partial, partial.open("w", encoding="utf-8") as file:
        for text, answer, facts in zip(texts, found, rows, strict=True):
            row = {
                "prompt": text,
                "text": answer.text,
                "tokens": answer.tokens.tolist(),
                "depths": answer.depths.tolist(),
                "log_probs": answer.log_probs.tolist(),
                "statistics": facts,
            }
            file.write(files.json_text(row, ensure_ascii=False) + "\n")
    columns = {
        "new tokens": "new_tokens",
        "blocks per token": "blocks_per_token",
        "MB per token, modelled": "modelled_megabytes_per_token",
        "tokens/s": "tokens_per_second",
    }
    means = [float(np.mean([row[name] for row in rows])) for name in columns.values()]
    print(table([(mode.name, len(rows), *means)], header=("mode", "answers", *columns)))
    print(path)
    # Only what exits said by themselves compares with what they said in calibration.
    policy = model.policy
    if policy is not None and not mode.verified and not TEMPERATURE.value:
        exits, log_probs = (
            np.concatenate([getattr(answer, name)[1:] for answer in found])
            for name in ("exits", "log_probs")
        )
        if warning := drift.warning(policy, exits, np.exp(log_probs)):
            print(f"warning: {warning}", file=sys.stderr)


def _statistics(answer: Answer, model: Model, mode: Mode) -> dict:
    """What an answer took after its first token, which comes out of the prompt's pass.

    Blocks are those that were run, for drafts that were not kept too; megabytes are not measured
    but follow from the cost model (`cost.traffic`).
    """
    decoded = max(len(answer.tokens) - 1, 1)
    places = drafters.places(model.static.exit_depths)
    found = np.bincount(answer.exits, minlength=len(places))
    counts = answer.counts
    by_full = mode.verified | (answer.exits == len(model.points))
    unsure = np.exp(answer.log_probs) < rejection.least_probability(model.policy)
    return {
        "mode": mode.name,
        "new_tokens": len(answer.tokens),
        "exits": {
            place: int(n)
            for i, (place, n) in enumerate(zip(places, found, strict=True))
            if n or i < len(model.static.exit_depths)
        },
        "flagged": np.flatnonzero(by_full & unsure).tolist(),
        "blocks_per_token": answer.layer_tokens / decoded,
        "evaluations": counts.evaluations_BE.tolist(),
        "drafts_checked": counts.drafted_BW.tolist(),
        "drafts_accepted": counts.accepted_BW.tolist(),
        "modelled_megabytes_per_token": answer.bytes_read / decoded / 1e6,
        "seconds": answer.seconds,
        "tokens_per_second": decoded / answer.seconds if answer.seconds else 0.0,
    }


if __name__ == "__main__":
    common.run(main, untuned=True)
