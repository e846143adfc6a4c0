"""Do promises about answers hold? Calibrated on a part of real answers, judged on the others.

    python -m experiments.decoded_promises.run --workdir=runs/demo --records=runs/answers.npz \\
        --check

The full model answers maths word problems and programming tasks, and so does each of a row of
policies, in lossy and in deferred mode. Then policies are fitted to random parts of these prompts,
as `launch.calibrate --prompts` does it, and a promise is broken where the mean loss of the answers
to the others is above α.

Beside them: what `ucb` on given text takes for the same α (`given text`), which promises nothing
about answers; and a control that is wrong on purpose, `best of many`: the policy that leaves most
of those whose loss on the part is at most α. A promise under which nothing leaves is kept by
anybody, so the share of tokens that leave is held to a bar, too. Answers are kept in --records, and
not decoded again.
"""

import itertools
import json
from pathlib import Path
from typing import NamedTuple

import numpy as np
from absl import flags

from early_exit import policy as policies
from early_exit.calibration import answers, certify
from early_exit.decoding.mode import DEFERRED, LOSSY, Mode
from early_exit.evaluation import run
from early_exit.evaluation.answers import PORTION, Questions
from early_exit.runs import assemble
from early_exit.runs.metrics import table
from early_exit.storage import files
from experiments import bars
from experiments.recurrent_exits.questions import KINDS, questions

WORKDIR = flags.DEFINE_string("workdir", None, "Folder of a calibrated run.", required=True)
RECORDS = flags.DEFINE_string("records", None, "File for what was decoded; read if it is there.")
PROMPTS = flags.DEFINE_integer("prompts", 320, "How many, of both kinds together.", lower_bound=8)
NEW = flags.DEFINE_integer("new_tokens", 48, "Tokens of an answer at most.", lower_bound=2)
CANDIDATES = flags.DEFINE_integer("candidates", 16, "Policies in the row.", lower_bound=2)
BATCH = flags.DEFINE_integer("batch", 8, "Prompts decoded together.", lower_bound=1)
ALPHAS = flags.DEFINE_list("alphas", ["0.05", "0.1", "0.2"], "Targets.")
DELTA = flags.DEFINE_float("delta", 0.1, "Share of promises that may be broken.")
SPLITS = flags.DEFINE_integer("splits", 500, "Random parts.")
SHARE = flags.DEFINE_float("share", 0.5, "Of a part, in prompts.")
LEAST = flags.DEFINE_float("least", 0.02, "Share of tokens that must leave early at the easiest α.")

MODES = (LOSSY, DEFERRED)
METHODS = ("ucb", "ltt")
GIVEN, BEST = "given text", "best of many"


class Row(NamedTuple):
    """What came of a method at a level: shares of promises, the risk, and the share that leaves."""

    mode: str
    loss: str
    method: str
    alpha: float
    broken: float
    over_all: float
    risk: float
    leave_early: float


def main(argv):
    del argv
    alphas = [float(alpha) for alpha in ALPHAS.value]
    found = _recorded(alphas)
    splits = 20 if bars.QUICK.value else SPLITS.value
    rng, prompts = np.random.default_rng(0), found["loss/lossy/tokens"].shape[1]
    size = round(SHARE.value * prompts)
    kept: dict[tuple, list] = {}
    for _ in range(splits):
        order = rng.permutation(prompts)
        for key, figures in _compared(found, alphas, order[:size], order[size:]):
            kept.setdefault(key, []).append(figures)
    print(f"{prompts} prompts, {splits} parts of {SHARE.value:.0%}")
    rows = []
    for key, figures in kept.items():
        on_others, overall, leaving = np.array(figures).T
        alpha = key[-1]
        broken = [float(np.mean(risks > alpha + 1e-12)) for risks in (on_others, overall)]
        rows.append(Row(*key, *broken, float(overall.mean()), float(leaving.mean())))
    header = ("mode", "loss", "method", "α", "broken", "over all", "risk", "leave early")
    print(table(rows, header=header))
    bars.conclude({"rows": rows, "foreseen": float(found["foreseen"])}, _bars(rows, found, splits))


def _recorded(alphas: list[float]) -> dict[str, np.ndarray]:
    """Of each mode: the losses [J + A, N] of policies in the row and of those on given text, and
    which share of each answer's tokens left early. Kept policy by policy, to go on with."""
    count = 16 if bars.QUICK.value else PROMPTS.value
    new_tokens = 12 if bars.QUICK.value else NEW.value
    asked_for = {
        "alphas": alphas,
        "candidates": CANDIDATES.value,
        "new_tokens": new_tokens,
        "prompts": count,
    }
    path = RECORDS.value and Path(RECORDS.value)
    kept = _kept(path, asked_for)
    if "ways" not in kept or _named(MODES[-1], int(kept["ways"]) - 1, "leaving") not in kept:
        tuned = assemble.load_tuned(Path(WORKDIR.value))
        texts = [text for kind in KINDS for text in questions(kind, count // 2, held_out=True)]
        asked = Questions.ask(
            tuned, [tuned.chat(t) for t in texts], new_tokens, BATCH.value, seed=0
        )
        ways = _policies(tuned, alphas)
        kept["ways"] = np.array(len(ways))
        for mode, (i, policy) in itertools.product(MODES, enumerate(ways)):
            if _named(mode, i, "leaving") in kept:
                continue
            answered = _answered(asked, policy, mode)
            kept |= {_named(mode, i, name): figures for name, figures in answered.items()}
            print(f"{mode.name}, policy {i + 1} of {len(ways)}", flush=True)
            if path:
                with files.replacing(path) as partial, partial.open("wb") as file:
                    np.savez(file, asked_for=files.json_text(asked_for), **kept)

    def together(mode: Mode, name: str) -> np.ndarray:
        return np.array([kept[_named(mode, i, name)] for i in range(int(kept["ways"]))])

    found = {f"leaving/{mode.name}": together(mode, "leaving") for mode in MODES}
    for mode, name in itertools.product(MODES, answers.LOSSES):
        found[f"loss/{mode.name}/{name}"] = together(mode, name)
    found["foreseen"] = np.mean([together(mode, "foreseen") for mode in MODES])
    return found


def _named(mode: Mode, policy: int, name: str) -> str:
    return f"{mode.name}/{policy}/{name}"


def _kept(path: Path | None, asked_for: dict) -> dict[str, np.ndarray]:
    """What the file holds by now."""
    if not path or not path.exists():
        return {}
    with np.load(path, allow_pickle=False) as kept:
        if json.loads(str(kept["asked_for"])) == asked_for:
            return {name: kept[name] for name in kept.files if name != "asked_for"}
    raise ValueError(f"{path} holds answers to other flags; name another file")


def _answered(asked: Questions, policy: policies.ExitPolicy, mode: Mode) -> dict[str, np.ndarray]:
    """Of each answer [N]: its losses, the share that left early, and whether one pass over the full
    model's answer foresees that it is another."""
    everything = range(len(asked.prompts))
    decoded = asked.decoded(everything, policy, mode)
    pairs = [(r, answer.tokens) for r, answer in zip(asked.references, decoded, strict=True)]
    found = {
        name: np.array([answers.loss_of(loss, *pair) for pair in pairs])
        for name, loss in answers.LOSSES.items()
    }
    told, _ = asked.losses(everything, policy, mode, answers.changed)
    final = len(asked.tuned.model.exits.points)
    leaving = np.array([np.mean(answer.exits < final) for answer in decoded])
    return found | {"leaving": leaving, "foreseen": told == found["changed"]}


def _policies(tuned: assemble.Tuned, alphas: list[float]) -> list[policies.ExitPolicy]:
    """The row, and at its end what is found on given text for each α."""
    confidence = tuned.config.calibrate.confidence
    records = run.records_of(tuned)
    rows = answers.candidates(records, confidence, CANDIDATES.value)
    design, tested = records.split(tuned.config.calibrate.design, tuned.config.calibrate.seed)
    path = certify.path(design, confidence)
    given = [
        certify.fit(tested, path, confidence, method="ucb", alpha=alpha, delta=DELTA.value)
        for alpha in alphas
    ]
    return [*(policies.make(row, confidence) for row in rows), *given]


def _compared(found: dict, alphas: list[float], part: np.ndarray, others: np.ndarray):
    """((mode, loss, method, α), (loss of the others, of all, share that leaves early))."""
    for mode in MODES:
        leaving = found[f"leaving/{mode.name}"].mean(axis=1)
        for loss in answers.LOSSES:
            losses = found[f"loss/{mode.name}/{loss}"]
            row = len(losses) - len(alphas)

            def figures(j, losses=losses, leaving=leaving):
                if j is None:
                    return 0.0, 0.0, 0.0
                return losses[j, others].mean(), losses[j].mean(), leaving[j]

            for a, alpha in enumerate(alphas):
                for method in METHODS:
                    taken = _taken(losses[:row, part], method, alpha)
                    yield (mode.name, loss, method, alpha), figures(taken)
                within = np.flatnonzero(losses[:row, part].mean(axis=1) <= alpha)
                best = int(within[-1]) if within.size else None
                yield (mode.name, loss, BEST, alpha), figures(best)
                yield (mode.name, loss, GIVEN, alpha), figures(row + a)


def _taken(losses: np.ndarray, method: str, alpha: float) -> int | None:
    """Which policy `launch.calibrate --prompts` takes; None for one that never leaves."""
    count = losses.shape[1]
    portions = (np.split(of_policy, range(PORTION, count, PORTION)) for of_policy in losses)
    tests = answers.in_order(portions, total=count, method=method, alpha=alpha, delta=DELTA.value)
    passed = [j for j, test in enumerate(tests) if test.passed]
    return passed[-1] if passed else None


def _bars(rows: list[Row], found: dict, splits: int) -> list[bars.Bar]:
    # By chance, the share of broken promises is further above δ in one case in a thousand.
    limit = DELTA.value + 3.1 * float(np.sqrt(DELTA.value * (1 - DELTA.value) / splits))
    kept = [bars.Bar("answers foreseen without decoding", float(found["foreseen"]), 0.99, True)]
    for mode in MODES:
        for method in METHODS:
            own = [row for row in rows if (row.mode, row.method) == (mode.name, method)]
            name = f"{method}, {mode.name}"
            kept.append(bars.Bar(f"{name}: promises broken", max(row.broken for row in own), limit))
            leaving = max(row.leave_early for row in own)
            kept.append(bars.Bar(f"{name}: leave at the easiest α", leaving, LEAST.value, True))
    control = max(row.broken for row in rows if row.method == BEST)
    return [*kept, bars.Bar(f"{BEST} (control): broken", control, 2 * DELTA.value, True)]


if __name__ == "__main__":
    bars.run(main)
