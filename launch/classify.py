"""Classifies images or texts with dynamic depth.

    python -m launch.classify --workdir=runs/fashion --input=pictures/
    python -m launch.classify --workdir=runs/news --input=headlines.txt --output=answers.jsonl
    python -m launch.classify --workdir=runs/fashion --split=test --batch=256

Images are the PNG and JPEG files of a folder, or one file. Texts are the lines of a file, or of a
`.jsonl` file objects with a "text". The last command takes a split of the run's own data, whose
labels are known. Prints, or writes as JSONL, the answer to each and the blocks that it took; then
how many left where, and how fast that was; and a warning if they leave unlike calibration's data.
"""

import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import jax
import numpy as np
from absl import flags

from early_exit.calibration import drift
from early_exit.classifying.classify import Classified, Classifier
from early_exit.data import text_files
from early_exit.data.image_sets import SUFFIXES, read_image
from early_exit.data.inputs import Prepare
from early_exit.data.parts import Example
from early_exit.policy import ExitPolicy
from early_exit.runs import assemble
from early_exit.runs.metrics import table
from early_exit.storage import buckets, copies, files
from launch import common, on_mesh

INPUT = flags.DEFINE_string("input", None, "Folder of images, an image, or a file of texts.")
SPLIT = flags.DEFINE_enum(
    "split",
    None,
    ["train", "validation", "calibration", "test"],
    "Of the run's data, instead of --input.",
)
OUTPUT = flags.DEFINE_string("output", None, "JSONL file for the answers.")
POLICY = flags.DEFINE_string("policy", None, "Exit policy; the run's own if absent.")
FULL = flags.DEFINE_bool("full", False, "Consult no exit.")
BUDGET = flags.DEFINE_float("budget", None, "Blocks that an answer may take at most in the mean.")
BATCH = flags.DEFINE_integer("batch", 64, "Examples classified together.", lower_bound=1)

flags.adopt_module_key_flags(on_mesh)  # what --help lists

_SHOWN = 60  # characters of a text


# How examples are called in the answers, and what reads each when it is asked for:
# {"image": …} or {"text": …}, and "label" if it is known.
Work = tuple[Sequence[str], Sequence[Example]]


def main(argv):
    on_mesh.begin(argv)
    if (INPUT.value is None) == (SPLIT.value is None):
        raise ValueError("give either --input or --split")
    common.tell_devices()
    tuned = on_mesh.load_tuned()
    model = tuned.model
    if not model.config.classifies:
        raise ValueError(f"{tuned.workdir} holds a language model; use launch.generate")
    feed = tuned.feed
    if SPLIT.value:
        examples = feed.examples(SPLIT.value)
        names = [f"{SPLIT.value} {i}" for i in range(len(examples))]
    else:
        names, examples = _given(copies.fetched(INPUT.value))
    classes = feed.classes
    # No larger than needed: fewer programs have to be compiled.
    rows = min(BATCH.value, len(names))
    policy = _policy(tuned)
    classify = Classifier(model, tuned.params, policy, largest=1 << (rows - 1).bit_length())
    answers, labels, speed = _classify(classify, feed.prepare(), examples)
    if OUTPUT.value:
        _write(buckets.place(OUTPUT.value), names, answers, labels, classes)
    else:
        for i, name in enumerate(names):
            print(_line(name, answers, i, classes))
        print()
    print(_summary(model.exit_depths, answers, labels, speed))
    if OUTPUT.value:
        print(OUTPUT.value)
    as_calibrated = policy is not None and BUDGET.value is None  # with a budget, others leave
    if as_calibrated and (warning := _drift(policy, answers)):
        print(f"warning: {warning}", file=sys.stderr)


def _policy(tuned: assemble.Tuned) -> ExitPolicy | None:
    if FULL.value or not tuned.model.exits.points:
        return None
    return assemble.load_policy(tuned, buckets.place(POLICY.value) if POLICY.value else None)


def _drift(policy: ExitPolicy, answers: Classified) -> str | None:
    """`drift.warning`, of probabilities as they are without temperatures."""
    powers = answers.probabilities
    if policy.temperatures is not None:
        powers = powers ** np.asarray(policy.temperatures)[answers.exits, None]
    return drift.warning(policy, answers.exits, powers.max(-1) / powers.sum(-1))


def _given(path: Path) -> Work:
    """What lies at a path.

    Raises:
      FileNotFoundError: nothing.
      ValueError: no images and no texts.
    """
    if not path.exists():
        raise FileNotFoundError(f"there is no {path}")
    if not path.is_dir() and path.suffix.lower() not in SUFFIXES:
        texts = text_files.listed(path, "text")
        return texts, [{"text": text} for text in texts]
    files, root = [path], path.parent
    if path.is_dir():
        found = (Path(at, name) for at, _, names in os.walk(path) for name in names)
        files, root = sorted(file for file in found if file.suffix.lower() in SUFFIXES), path
    if not files:
        raise ValueError(f"{path} holds no image; put {', '.join(SUFFIXES)} files there")
    return [file.relative_to(root).as_posix() for file in files], _Images(files)


class _Images(Sequence):
    """Examples of image files, each read when it is asked for."""

    def __init__(self, files: Sequence[Path]):
        self.files = files

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> Example:
        return {"image": read_image(self.files[index])}


def _classify(
    classify: Classifier, prepare: Prepare, examples: Sequence[Example]
) -> tuple[Classified, np.ndarray, float]:
    """(the answers; labels int [N], −1 for unknown; examples per second, compiling excepted)."""
    found, labels, timed, seconds = [], [], 0, 0.0
    starts = list(range(0, len(examples), BATCH.value))
    for start in [*starts, 0]:  # the first once more: all others may have to compile
        stop = min(start + BATCH.value, len(examples))
        batch = [examples[i] for i in range(start, stop)]
        inputs, known = prepare(batch, None), classify.programs
        began = time.perf_counter()
        answers = classify(inputs, budget=BUDGET.value)
        took = time.perf_counter() - began
        if classify.programs == known:
            timed, seconds = timed + len(batch), seconds + took
        found.append(answers)
        labels += [example.get("label", -1) for example in batch]
    answers = Classified.joined(found[:-1])
    return answers, np.array(labels[: len(examples)]), timed / seconds


def _line(name: str, answers: Classified, i: int, classes: Sequence[str]) -> str:
    label = "withheld" if answers.abstained[i] else classes[answers.labels[i]]
    name = name if len(name) <= _SHOWN else f"{name[: _SHOWN - 1]}…"
    sure = answers.probabilities[i].max()
    return f"{label:<14} {sure:6.1%}  depth {answers.depths[i]:>3}  {name}"


def _write(
    path: Path,
    names: Sequence[str],
    answers: Classified,
    labels: np.ndarray,
    classes: Sequence[str],
) -> None:
    """All answers, whole or not at all."""
    if jax.process_index():
        return
    files.make_folder(path.parent)
    with files.replacing(path) as partial, partial.open("w", encoding="utf-8") as file:
        for i, name in enumerate(names):
            row = {
                "name": name,
                "label": classes[answers.labels[i]],
                "withheld": bool(answers.abstained[i]),
                "depth": int(answers.depths[i]),
                "score": float(answers.scores[i]) if np.isfinite(answers.scores[i]) else None,
                "probabilities": answers.probabilities[i].astype(float).round(6).tolist(),
            }
            if labels[i] >= 0:
                row["known_label"] = classes[labels[i]]
            file.write(files.json_text(row, ensure_ascii=False) + "\n")


def _summary(exit_depths: np.ndarray, answers: Classified, labels: np.ndarray, speed: float) -> str:
    """Who left where, and all together; accuracy is among answers that are not withheld."""
    given = ~answers.abstained

    def row(name, chosen):
        judged = chosen & given & (labels >= 0)
        right = float((answers.labels == labels)[judged].mean()) if judged.any() else None
        return name, int(chosen.sum()), float(chosen.mean()), right

    rows = [row(f"block {x}", answers.exits == e) for e, x in enumerate(exit_depths)]
    rows.append(row("all", np.ones(len(given), bool)))
    count, final = len(given), exit_depths[-1]
    withheld = f", {np.mean(~given):.1%} of the answers withheld" if not given.all() else ""
    return (
        f"{table(rows, header=('left after', 'examples', 'share', 'accuracy'))}\n\n"
        f"{count} examples, {speed:.1f} examples/s once compiled, {answers.depths.mean():.2f} of "
        f"{final} blocks per example{withheld}"
    )


if __name__ == "__main__":
    common.run(main)
