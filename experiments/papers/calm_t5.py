"""CALM's table: what its three confidences give for each mean depth, on a T5 trained here.

    python -m experiments.papers.calm_t5 --runs=runs/calm --check
    python -m experiments.papers.calm_t5 --quick

CALM (Schuster et al. 2022) puts exits into the decoder of a T5 and compares three confidences: the
difference of the two largest probabilities (here `margin`), the cosine of the states before and
after (`similarity`), and a classifier on the state (`gate`). Here a T5 of six blocks learns to copy
words out of noise (`copying`), jointly with exits after each block but the last, weighted as in the
paper by their depth. Policies are fitted to calibration prompts for some ε, and each decodes the
test prompts, in lossy mode: keys and values of skipped blocks are those of the state that was left
with, as in CALM.

Last, a policy with a promise about answers, by the paper's rule (fixed-sequence testing from the
safest): with probability 1 − δ, at most α of an answer's tokens change.
"""

import dataclasses
import tempfile
from pathlib import Path

import numpy as np
from absl import flags

from configs import tiny
from early_exit.backbones.t5 import T5Config
from early_exit.calibration import answers, methods
from early_exit.decoding.generate import generate
from early_exit.decoding.mode import LOSSY
from early_exit.evaluation import answers as of_answers
from early_exit.evaluation import run
from early_exit.policy import ExitPolicy
from early_exit.runs.assemble import Tuned
from early_exit.runs.metrics import table
from early_exit.settings.overrides import override
from early_exit.settings.read import changed, read
from early_exit.settings.sections import Settings
from experiments import bars, classifiers
from experiments.papers import copying

RUNS = flags.DEFINE_string("runs", None, "Folder of the run, to go on with; temporary if absent.")
STEPS = flags.DEFINE_integer("steps", 3000, "Of training.", lower_bound=1)

DEPTH = 6
NETWORK = T5Config(
    vocab_size=len(copying.VOCABULARY),
    width=64,
    depth=DEPTH,
    encoder_depth=1,
    heads=4,
    head_dim=16,
    mlp_width=160,
    context_length=64,
)
CONFIDENCES = {"margin": "softmax", "similarity": "states alike", "gate": "classifier"}
EPSILONS = (0.9, 0.95, 0.98, 0.99, 0.995, 0.999)
ALPHA, DELTA = 0.05, 0.1
TEST, PROMPTS, BATCH = 400, 300, 64


def settings(model: Path, rows: Path, steps: int) -> Settings:
    points = tuple(range(1, DEPTH))
    total = sum(range(1, DEPTH + 1))
    return read(
        override(
            tiny.get_config(),
            {
                "model.source": str(model),
                "exits.points": points,
                "exits.head": "norm",
                "exits.output": "shared",
                "exits.classes": 0,
                "exits.init": "random",
                "exits.gate": True,
                "data.source": str(rows),
                "data.sequence_length": copying.LONGEST_ANSWER,
                "data.prompt_length": copying.LONGEST_PROMPT,
                "data.batch_size": 64,
                "tune.train": "all",
                "tune.loss": "cross_entropy",
                # The paper's: in proportion to depth. What the final loss weighs is 1 here.
                "tune.weights": tuple(point / total * (total / DEPTH) for point in points),
                "tune.steps": steps,
                "tune.learning_rate": 3e-3,
                "tune.backbone_rate": 1.0,
                "tune.warmup_steps": max(steps // 20, 1),
                "tune.checkpoint_every": max(steps // 4, 1),
                "tune.validate_every": max(steps // 4, 1),
                "tune.validation_batches": 4,
                "calibrate.batches": 8,
            },
        )
    )


def main(argv):
    del argv
    quick = bars.QUICK.value
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(RUNS.value or scratch)
        if not (folder / "pairs.jsonl").exists():
            copying.write(folder, 600 if quick else 40_000, NETWORK)
        model, rows = folder / "network", folder / "pairs.jsonl"
        config = settings(model, rows, 8 if quick else STEPS.value)
        figures = _measured(classifiers.trained(config, folder / "run"))
    bars.conclude(figures, _bars(figures))


def _measured(tuned: Tuned) -> dict:
    records = run.records_of(tuned)
    count = min(TEST, len(tuned.feed.rows("test")))
    asked = [tuned.feed.rows("test")[i] for i in range(count)]
    prompts = [tuned.feed.encoding.prompt(prompt) for prompt, _ in asked]
    wanted = [tuned.feed.encoding.answer(answer) for _, answer in asked]
    full = _decoded(tuned, prompts, None)
    rows = [_row("full model", None, full, full, wanted)]
    for confidence in CONFIDENCES:
        for epsilon in EPSILONS:
            asked_for = dataclasses.replace(
                tuned.config.calibrate, confidence=confidence, epsilon=epsilon
            )
            found = _decoded(tuned, prompts, methods.fit(records, asked_for))
            rows.append(_row(CONFIDENCES[confidence], epsilon, found, full, wanted))
    print(
        table(
            [tuple(row.values()) for row in rows],
            header=("confidence", "ε", "blocks", "right", "as full", "tokens changed"),
        )
    )
    promised = _promised(tuned, prompts, full, wanted)
    print("\n" + table([tuple(promised.values())], header=tuple(promised)))
    return {"rows": rows, "promise": promised, "tokens": float(np.mean([len(f) for f, _ in full]))}


def _decoded(
    tuned: Tuned, prompts: list[list[int]], policy: ExitPolicy | None
) -> list[tuple[list[int], float]]:
    """Of each prompt its answer, and the blocks run for each of its tokens but the first."""
    found = generate(
        tuned.model,
        tuned.params,
        prompts,
        policy=policy,
        mode=LOSSY,
        max_new_tokens=copying.LONGEST_ANSWER,
        stop_ids=tuned.stop_ids,
        batch=min(BATCH, len(prompts)),
    )
    return [(g.tokens.tolist(), g.layer_tokens / max(len(g.tokens) - 1, 1)) for g in found]


def _row(name: str, epsilon: float | None, found: list, full: list, wanted: list) -> dict:
    """Blocks for a token; shares of answers that are right, and those of the full model; and of
    tokens that changed."""
    lengths = np.array([len(answer) - 1 for answer, _ in found])
    blocks = np.array([of for _, of in found])
    same = [answer == whole for (answer, _), (whole, _) in zip(found, full, strict=True)]
    changed_tokens = [
        answers.tokens(whole, answer) for (answer, _), (whole, _) in zip(found, full, strict=True)
    ]
    right = [answer == want for (answer, _), want in zip(found, wanted, strict=True)]
    return {
        "confidence": name,
        "epsilon": epsilon,
        "blocks": float((blocks * lengths).sum() / lengths.sum()),
        "right": float(np.mean(right)),
        "same": float(np.mean(same)),
        "changed": float(np.mean(changed_tokens)),
    }


def _promised(tuned: Tuned, tests: list[list[int]], full: list, wanted: list) -> dict:
    """What a policy that was calibrated on answers gives on other prompts."""
    rows = tuned.feed.rows("calibration")
    prompts = [tuned.feed.encoding.prompt(rows[i][0]) for i in range(min(PROMPTS, len(rows)))]
    alpha = 0.5 if bars.QUICK.value else ALPHA
    asked = changed(
        tuned.config,
        {
            "calibrate.method": "ltt",
            "calibrate.alpha": alpha,
            "calibrate.delta": DELTA,
            "calibrate.confidence": "margin",
        },
    ).calibrate
    how = {"loss": answers.tokens, "new_tokens": copying.LONGEST_ANSWER}
    policy = of_answers.calibrate(tuned, prompts, LOSSY, asked, batch=BATCH, **how)
    row = _row("softmax", None, _decoded(tuned, tests, policy), full, wanted)
    return {"alpha": alpha, "changed": row["changed"], "blocks": row["blocks"], "same": row["same"]}


def _cheapest(rows: list[dict], name: str, right: float) -> float:
    """Blocks of the cheapest policy of a confidence with at least such a share of right answers."""
    return min(
        (row["blocks"] for row in rows if row["confidence"] == name and row["right"] >= right),
        default=float(DEPTH),
    )


def _bars(figures: dict) -> list[bars.Bar]:
    full, *rows = figures["rows"]
    close = full["right"] - 0.01
    softmax = _cheapest(rows, "softmax", close)
    promise = figures["promise"]
    return [
        bars.Bar("answers of the full model that are right", full["right"], 0.9, at_least=True),
        bars.Bar("blocks ÷ all, softmax, a point less right at most", softmax / DEPTH, 0.6),
        bars.Bar(
            "the same ÷ that of states alike",
            softmax / _cheapest(rows, "states alike", close),
            1.0,
        ),
        bars.Bar(f"tokens changed, promised at most {promise['alpha']}", promise["changed"], ALPHA),
        bars.Bar("blocks ÷ all under that promise", promise["blocks"] / DEPTH, 0.7),
    ]


if __name__ == "__main__":
    bars.run(main)
