"""The body of `launch.evaluate` for a language model: from a run's folder to `evaluation.json`.

The one idea: what was calibrated is what is measured. The run's own policy is timed in every mode,
beside the full model, and its thresholds are kept with the figures that they gave.
"""

import textwrap
from collections.abc import Iterator, Sequence

import jax

from early_exit import policy as policies
from early_exit import tree
from early_exit.decoding import detokenize
from early_exit.decoding.generate import generate
from early_exit.decoding.mode import DEFERRED, LOSSY, VERIFIED, Mode, served, verified
from early_exit.decoding.state import check_prompts
from early_exit.evaluation import drafts, exits, explore, run, tradeoff
from early_exit.evaluation.tradeoff import Case
from early_exit.exits.multi_exit import MultiExit
from early_exit.policy import ExitPolicy
from early_exit.runs import lock, progress
from early_exit.runs.assemble import Tuned
from early_exit.runs.metrics import table
from early_exit.storage import files

LOOKUP = verified("lookup")  # asks no policy
FULL = "full model"

Prompt = tuple[str, Sequence[int]]  # as it is shown, and its token ids


def evaluate(tuned: Tuned) -> dict:
    """Measures the exits and what decoding with them gains; saves `evaluation.json`.

    Speed and agreement are measured on prompts cut from the test split of the run's text (config
    section `evaluate`).

    Raises:
      ValueError: a run without exits, or prompts that the model or the data have no room for;
        before anything is timed.
      RuntimeError: another command is at work in the run's folder.
    """
    with lock.held(tuned.workdir):
        results = _measured(tuned)
        if not jax.process_index():
            files.write_json(tuned.workdir / "evaluation.json", results)
    return results


def _measured(tuned: Tuned) -> dict:
    settings, model = tuned.config.evaluate, tuned.model
    found = run.policies_of(tuned, records := run.records_of(tuned))
    chosen = next(iter(found), None)
    prompts = cut_prompts(tuned, settings.prompts, settings.prompt_tokens)
    check_prompts(model, prompts, settings.new_tokens)
    shown, left_out = _shown(tuned, prompts)
    check_prompts(model, [ids for _, ids in shown], settings.sample_tokens)
    policy = found.get(chosen)
    if policy is not None and policy.temperatures is not None:
        records = run.records_of(tuned, soften=True)
    looked_into = policy and explore.explorer(tuned, records, policy, shown)
    cases = cases_of(found, model)
    rows = tradeoff.compare(
        model,
        tuned.params,
        prompts,
        cases,
        new_tokens=settings.new_tokens,
        rounds=settings.rounds,
    )
    asked = progress.counted(shown, "answering for the report", "answers")
    if looked_into:
        looked_into["speed"] = explore.of_decoding(rows, looked_into["costs"])
    return {
        "model": _described(tuned),
        "exits": exits.summary(records),
        "drafts": drafts.summary(run.chains_of(tuned)) if model.exits.recurrent_taps else [],
        "policy": policy and policies.as_json(policy),
        "decoding": {
            "chosen": chosen,
            "rows": [
                row | {"epsilon": case.policy and case.policy.provenance.get("epsilon")}
                for row, case in zip(rows, cases, strict=True)
            ],
            "confidence": policy and policy.confidence,
            "prompts": len(prompts),
            "prompt_tokens": max(map(len, prompts)),
            "new_tokens": settings.new_tokens,
            "rounds": settings.rounds,
        },
        "text": f"{tuned.config.data.source} (test split)",
        "samples": [_sample(tuned, prompt, chosen, policy) for prompt in asked] if policy else [],
        "explorer": looked_into,
        "left_out": left_out,
        "machine": run.machine(),
    }


def cases_of(found: dict[str, ExitPolicy], model: MultiExit) -> list[Case]:
    """What takes turns: the full model, the first policy in all modes, lookup, the others."""
    (name, policy), *others = found.items() or [(None, None)]
    cases = [Case()]
    if policy is not None:
        modes = modes_of(model)
        cases += [Case(name, policy, mode) for mode in modes]
        cases.insert(-1, Case(mode=LOOKUP))  # before all drafters together
    else:
        cases.append(Case(mode=LOOKUP))
    # The cheapest way in which each kind of exit decides alone.
    modes = [LOSSY] * bool(model.exits.points) + [DEFERRED] * bool(model.exits.recurrent_taps)
    return cases + [Case(name, policy, mode) for mode in modes for name, policy in others]


def modes_of(model: MultiExit) -> list[Mode]:
    """How a run's own policy is timed: each kind of exit, and all drafters together at the end."""
    exits, recurrent = bool(model.exits.points), bool(model.exits.recurrent_taps)
    modes = [LOSSY] * exits + [DEFERRED]
    modes += [verified("exits")] * exits + [verified("recurrent")] * recurrent
    return [*modes, served(VERIFIED, model)]


def cut_prompts(tuned: Tuned, count: int, length: int) -> list[list[int]]:
    """`count` stretches of `length` tokens, each from another document of the test split.

    Where an encoder reads prompts, those of the data.

    Raises:
      ValueError: too few documents long enough.
    """
    prompts = []
    if tuned.model.config.encodes_prompts:
        return _first_prompts(tuned, count)
    for _, document in tuned.feed.documents("test"):
        tokens = tuned.feed.encode(document)
        if len(tokens) >= 3 * length:
            prompts.append(tokens[length : 2 * length])
        if len(prompts) == count:
            return prompts
    raise ValueError(
        f"the test split of {tuned.config.data.source} has only {len(prompts)} documents of "
        f"{3 * length} tokens; lower evaluate.prompts or evaluate.prompt_tokens"
    )


def _first_prompts(tuned: Tuned, count: int) -> list[list[int]]:
    """As many prompts of the test split.

    Raises:
      ValueError: it has fewer.
    """
    found = tuned.feed.rows("test")
    if len(found) < count:
        raise ValueError(
            f"the test split of {tuned.config.data.source} has only {len(found)} prompts; lower "
            "evaluate.prompts"
        )
    return [tuned.feed.encoding.prompt(found[i][0]) for i in range(count)]


def tables(results: dict) -> Iterator[str]:
    """What `evaluate` found, as text of at most 100 columns: exits, then decoding."""
    of, model = results["decoding"], results["model"]
    yield "Exits on held-out text, a position being a next token to predict:\n" + table(
        [(row["exit"], row["loss"], row["agreement"], row["coverage"]) for row in results["exits"]],
        header=("exit", "loss", "agreement", "coverage at 95 %"),
    )
    if results["drafts"]:
        yield (
            "Drafts of the recurrent exit, and the tokens of a pass that checks so many of them:\n"
        ) + table(
            [tuple(row.values()) for row in results["drafts"]], header=tuple(results["drafts"][0])
        )
    times = "once" if of["rounds"] == 1 else f"{of['rounds']} times"
    yield (
        f"Decoding, batch 1, {of['prompts']} prompts of {of['prompt_tokens']} tokens × "
        f"{of['new_tokens']} new ones, {times} in turns:\n"
    ) + table(
        [
            (
                *named(row),
                *(row["tokens_per_second"], row["speedup"], row["seconds_to_last"]),
                *(row["agreement"], row["blocks_per_token"]),
            )
            for row in of["rows"]
        ],
        header=("policy", "mode", "tokens/s", "× full", "last, s", "= full", "blocks"),
    )
    notes = [
        "tokens/s: after the prompt, and × full, of the full model's rate; last, s: from the "
        "prompt to the last token; = full: share of the tokens that the full model says after the "
        "same text; blocks: run for each new token, drafts that were not kept included; the full "
        f"model runs {model['depth']}.",
        *([results["left_out"]] if results["left_out"] else []),
    ]
    yield "\n".join(textwrap.fill(note, 100) for note in notes)


def named(row: dict) -> tuple[str | None, str | None]:
    """A row's policy and mode, as they are shown."""
    return (FULL, None) if row["mode"] is None else (row["policy"], row["mode"])


def _shown(tuned: Tuned, prompts: Sequence[Sequence[int]]) -> tuple[list[Prompt], str | None]:
    """(what is answered for the report, what of it had to be left out, in a sentence)."""
    questions, left_out = tuple(tuned.config.evaluate.questions), None
    asks = tuned.model.config.encodes_prompts or tuned.tokenizer.chat_template
    if questions and not asks:
        left_out = (
            "evaluate.questions were left out: this model has no chat template to ask them by."
        )
        questions = ()
    asked = [(f"{text}\n\n", tuned.chat(text)) for text in questions]
    return asked + [(tuned.tokenizer.decode(ids), ids) for ids in prompts[:2]], left_out


def _sample(tuned: Tuned, prompt: Prompt, name: str, policy: ExitPolicy) -> dict:
    text, ids = prompt
    # Tokens of exits stand; those of a recurrent exit can only where keys and values are exact.
    mode = DEFERRED if tuned.model.exits.recurrent_taps else LOSSY
    (answer,) = generate(
        tuned.model,
        tuned.params,
        [ids],
        policy=policy,
        mode=mode,
        max_new_tokens=tuned.config.evaluate.sample_tokens,
        stop_ids=tuned.stop_ids,
    )
    return {
        "prompt": text,
        "policy": name,
        "mode": mode.name,
        "pieces": detokenize.pieces(tuned.tokenizer, answer.tokens),
        "depths": answer.depths.tolist(),
    }


def _described(tuned: Tuned) -> dict:
    model, config = tuned.model, tuned.config
    return {
        "source": config.model.source,
        "depth": model.config.depth,
        "exit_points": list(model.exits.points),
        "head": model.exits.head,
        "output": model.exits.output,
        "classes": model.exits.classes,
        "init": config.exits.init,
        "backbone_parameters": tree.count(tuned.params["backbone"]),
        "exit_parameters": tree.count(tuned.params["exits"]),
    }
