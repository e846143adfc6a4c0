"""Records the tuned exits on held-out data and fits the policy that decides who leaves where.

    python -m launch.calibrate --workdir=runs/smollm2 --epsilon=0.95 --confidence=margin
    python -m launch.calibrate --workdir=runs/smollm2 --method=ltt --alpha=0.05 --delta=0.1
    python -m launch.calibrate --workdir=runs/smollm2 --method=search --budget=15
    python -m launch.calibrate --workdir=runs/smollm2 --method=ucb --alpha=0.1 --prompts=p.jsonl

The first asks that of those who leave, 95 % agree with the full model on the records; the second
promises, with a probability of 90 %, that at most 5 % of all positions of new texts will not; the
third looks for the best that 15 blocks per position buy. What is not given is the config's. A
promise is about positions of given text (or examples), not about what is decoded; before the model
runs, it is said what the data can promise at best, and less is refused. The fourth is of answers:
to prompts like these, decoded in that mode, at most 10 % of the tokens will not be the full model's
on average. Prompts stand in a file as for `launch.generate`. Writes records.npz, for a recurrent
exit chains.npz, and policy.json.
"""

import dataclasses

from absl import flags

from early_exit.calibration import answers, certify, methods, risk
from early_exit.data import text_files
from early_exit.evaluation import answers as of_answers
from early_exit.evaluation import exits, run
from early_exit.runs import layout
from early_exit.runs.metrics import table
from early_exit.storage import copies
from launch import common, decoding_flags, on_mesh, usage

SETTINGS = (
    flags.DEFINE_enum("method", None, methods.NAMES, "What is asked for; see calibration.methods."),
    flags.DEFINE_string("confidence", None, "Score to threshold."),
    flags.DEFINE_float("epsilon", None, "Share of leavers that must agree with the full model."),
    flags.DEFINE_float("alpha", None, "Risk at most."),
    flags.DEFINE_float("delta", None, "Probability with which the promise may fail."),
    flags.DEFINE_enum("risk", None, tuple(risk.RISKS), "What alpha bounds."),
    flags.DEFINE_enum("among", None, certify.AMONG, "Whom the risk is averaged over."),
    flags.DEFINE_enum("unit", None, risk.UNITS, "What is independent of each other."),
    flags.DEFINE_float("design", None, "Share of texts or examples to choose what to test on."),
    flags.DEFINE_float("budget", None, "Mean cost per position."),
    flags.DEFINE_enum("costs", None, ("blocks", "multiply_adds"), "What a budget is counted in."),
    flags.DEFINE_enum("against", None, ("agreement", "label"), "What a budget should buy."),
    flags.DEFINE_bool("temperature", None, "Fit a temperature for each head."),
    flags.DEFINE_float("abstain", None, "Share of positions that may stay without an answer."),
    flags.DEFINE_float("reject_risk", None, "Share of wrong answers at most, but for delta."),
    flags.DEFINE_bool("allow_never", None, "Take a policy that never leaves for an answer."),
)


PROMPTS = flags.DEFINE_string("prompts", None, "File of prompts: promise something of answers.")
LOSS = flags.DEFINE_enum("loss", "tokens", list(answers.LOSSES), "What one of them loses.")
NEW = flags.DEFINE_integer("max_new_tokens", 64, "Most tokens of an answer.", lower_bound=1)
BATCH = flags.DEFINE_integer("batch", 8, "Prompts decoded together.", lower_bound=1)
RAW = flags.DEFINE_bool("raw", False, "Continue prompts as they are, without the chat template.")

usage.group("promises about answers", PROMPTS, LOSS, NEW, BATCH, RAW)
usage.group("what is asked; what is not given is the config's", *SETTINGS)
for _module in (decoding_flags, on_mesh):  # what --help lists
    flags.adopt_module_key_flags(_module)


def main(argv):
    on_mesh.begin(argv)
    common.own(common.workdir())
    common.tell_devices()
    texts = text_files.listed(copies.fetched(PROMPTS.value), "prompt") if PROMPTS.value else None
    tuned = on_mesh.load_tuned()
    given = {flag.name: flag.value for flag in SETTINGS if flag.value is not None}
    asked = dataclasses.replace(tuned.config.calibrate, **given)
    if texts is not None:
        _on_answers(tuned, texts, asked)
        return
    policy, records = run.calibrate(tuned, asked, tell=print)
    stated = policy.provenance
    rows = [
        (row["exit"], row["agreement"], row["coverage"], share, float(threshold))
        for row, share, threshold in zip(
            exits.summary(records), stated["exit_shares"], policy.thresholds, strict=False
        )
    ]
    header = ("exit", "agreement", "coverage at 95 %", "leave here", "threshold")
    if rows:
        print(table(rows, header=header))
    print("\n".join(told(stated)))
    print(f"policy in {common.workdir() / layout.POLICY}")


def _on_answers(tuned, texts, asked):
    mode = decoding_flags.mode()
    policy = of_answers.calibrate(
        tuned,
        [tuned.encode(text) if RAW.value else tuned.chat(text) for text in texts],
        mode,
        asked,
        loss=answers.LOSSES[LOSS.value],
        new_tokens=NEW.value,
        batch=BATCH.value,
        tell=print,
    )
    stated = policy.provenance
    print(
        f"{stated['tested']} of {stated['candidates']} policies tested, "
        f"{stated['answers_decoded']} answers decoded"
    )
    asked_for = f"mean loss {stated['risk_of']!r} of answers in {mode.name} mode"
    if stated["bound"] is None:
        print(f"{asked_for} ≤ {stated['alpha']:g} cannot be shown of any: nothing leaves early")
    else:
        print(
            f"{asked_for} ≤ {stated['alpha']:g} with probability {1 - stated['delta']:g}: found "
            f"{stated['risk']:.4f} on {stated['risk_on']} answers, at most {stated['bound']:.4f}; "
            f"{stated['coverage']:.1%} of the calibration texts' positions leave early"
        )
    print(f"policy in {common.workdir() / layout.POLICY}")


def told(stated):
    """What a policy keeps, by its provenance, in sentences."""
    agreement = "" if stated["agreement"] is None else f"{stated['agreement']:.1%} of these agree, "
    if stated["exit_shares"][1:]:  # there are exits before the full model
        yield (
            f"{stated['coverage']:.1%} leave early, {agreement}mean depth "
            f"{stated['mean_depth']:.2f}, cost {stated['mean_cost']:.2f} of going all the way"
        )
    if of := stated.get("chains"):
        kept = "none" if of["agreement"] is None else f"{of['agreement']:.1%} of them"
        yield (
            f"drafts of the recurrent exit that stand unchecked: {kept} agree with the full model; "
            f"{of['tokens']:.2f} tokens for each that it says itself, in {of['chains']} chains"
        )
    if "bound" in stated:
        asked = f"{stated['risk_of']} among {stated['among']} ≤ {stated['alpha']:g}"
        if stated["bound"] is None:
            yield (
                f"{asked} cannot be shown on {stated['units']} units of the kind {stated['unit']}; "
                f"without a single loss it would take {stated['units_needed']}"
            )
        else:
            yield (
                f"{asked} with probability {1 - stated['delta']:g}: found {stated['risk']:.4f}, at "
                f"most {stated['bound']:.4f}, on {stated['units']} units of the kind "
                f"{stated['unit']}"
            )
    elif stated["method"] == "epsilon" and not stated.get("promise"):
        yield "so it is on these records; methods that promise it for new data: ltt, ucb"
    if "temperature" in stated:
        of = stated["temperature"]
        before, after = (
            ", ".join(f"{x:.3f}" for x in of[f"error_{at}"]) for at in ("before", "after")
        )
        yield (
            f"calibration error of each exit {before} → {after} by temperatures; without them "
            f"{of['coverage_without']:.1%} would leave, at cost {of['mean_cost_without']:.2f}"
        )
    if "rejection" in stated:
        of = stated["rejection"]
        wrong = "" if of["wrong"] is None else f"; {of['wrong']:.1%} of the answers are wrong"
        yield f"{of['answered']:.1%} are answered{wrong}"
    if stated.get("promise"):
        yield f"what is promised is about {stated['promise']['subject']}"
    if stated["unreachable"]:
        yield f"nothing leaves at exits {stated['unreachable']}: no threshold does what is asked"


if __name__ == "__main__":
    common.run(main)
