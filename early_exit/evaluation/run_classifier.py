"""The body of `launch.evaluate` for a classifier: from a run's folder to what its exits are worth.

The one idea: everything is measured on the test split, which neither training nor calibration has
seen, and beside smaller networks without exits, the other way to pay less for an answer.
"""

import textwrap
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path

import jax
import numpy as np

from early_exit import policy as policies
from early_exit import tree
from early_exit.classifying.classify import Classified
from early_exit.cost import energy, multiply_adds
from early_exit.data import feed as feeds
from early_exit.data.parts import Example
from early_exit.evaluation import classifiers, exits, explore, run, shown
from early_exit.evaluation.classifiers import Case
from early_exit.policy import ExitPolicy
from early_exit.runs import assemble, lock, progress
from early_exit.runs.assemble import Tuned
from early_exit.runs.metrics import table
from early_exit.storage import files

FULL = "full model"
# Settings of the data that a network without exits must share with the one it is compared with.
_SAME = ("source", "mean", "std", "image_size", "sequence_length")


def evaluate(tuned: Tuned, baselines: Sequence[Path] = ()) -> dict:
    """Measures the exits, and saves what was found as `evaluation.json`.

    The run's policies (`run.policies_of`) take turns with the full model and with the baselines.

    Args:
      baselines: folders of runs on the same data, of networks without exits.

    Raises:
      ValueError: a baseline with exits or other data.
      RuntimeError: another command is at work in the run's folder.
    """
    with lock.held(tuned.workdir):
        found = run.policies_of(tuned, run.records_of(tuned)) if tuned.model.exits.points else {}
        beside = [assemble.load_tuned(folder, mesh=tuned.mesh) for folder in baselines]
        results = measure(tuned, found, beside)
        if not jax.process_index():
            files.write_json(tuned.workdir / "evaluation.json", results)
    return results


def measure(
    tuned: Tuned,
    measured: Mapping[str, ExitPolicy],
    baselines: Sequence[Tuned] = (),
    curve: Iterable[ExitPolicy] | None = None,
) -> dict:
    """All of `evaluation.json`.

    Args:
      measured: policies by name; the first is the one to be shown.
      curve: policies for the curve of accuracy against cost; by default, one for each ε.

    Raises:
      ValueError: a baseline with exits or other data.
    """
    settings, model = tuned.config.evaluate, tuned.model
    feed = tuned.feed
    batches = list(feed.held_out("test", settings.batches))
    inputs, labels = _joined(batches)
    chosen, policy = next(iter(measured.items()), (None, None))
    recorded = progress.counted(batches, "recording the test split")
    soften = policy is not None and policy.temperatures is not None
    test = exits.record(model, tuned.params, recorded, soften=soften, **tuned.metadata)
    looked_into = policy and explore.examples(
        run.records_of(tuned, soften=soften),
        policy,
        test,
        feed.examples("test"),
        count=settings.explored,
    )
    row = {name: jax.ShapeDtypeStruct((1, *x.shape[1:]), x.dtype) for name, x in inputs.items()}

    def case(of: Tuned, policy: ExitPolicy | None = None):
        of_backbone = multiply_adds.backbone(of.model.config, inputs=row)
        return Case(of.model, of.params, policy, of_backbone)

    full = case(tuned)
    cases = {FULL: full}
    cases |= {name: Case(model, tuned.params, policy, full.of) for name, policy in measured.items()}
    for baseline in baselines:
        _check(baseline, tuned)
        cases[baseline.workdir.name] = case(baseline)
    rows, answers = classifiers.compare(
        cases,
        inputs,
        labels,
        rounds=settings.rounds,
        singles=settings.singles,
        rows=settings.rows,
        sizes=settings.sizes,
    )
    confidence = policy.confidence if policy else "max_prob"
    if curve is None and model.exits.points:
        curve = classifiers.by_epsilon(run.records_of(tuned), confidence)
    of_model = len(rows) - len(baselines)
    meter = energy.meter()
    if looked_into:
        looked_into["speed"] = explore.of_classifying(rows[:of_model], looked_into["costs"])
    return {
        "model": _described(tuned),
        "exits": exits.summary(test),
        "parts": classifiers.parts(full),
        "policy": policy and policies.as_json(policy),
        "classification": {
            "chosen": chosen,
            "rows": rows[:of_model],
            "static": rows[of_model:],
            "curve": classifiers.curve(full, curve or (), test),
            "oracle": classifiers.oracle(full, test),
            "confidence": confidence,
            "energy": meter.name if meter else energy.MODELLED,
            "singles": min(settings.singles, len(labels)),
            "rounds": settings.rounds,
        },
        "examples": _examples(feed, answers[chosen or FULL], labels, settings.examples),
        "explorer": looked_into,
        "data": {"source": tuned.config.data.source, "split": "test", "count": len(labels)},
        "machine": run.machine(),
    }


def tables(results: dict) -> Iterator[str]:
    """What `measure` found, as text: exits; quality and cost; time."""
    of, data = results["classification"], results["data"]
    full = results["parts"][-1]
    source = data["source"].partition("#")[0]  # a hash of what it must be follows
    head = f"Exits on {data['count']} examples of the {data['split']} split of {source}:"
    yield (
        textwrap.fill(head, 100, break_long_words=False, break_on_hyphens=False)
        + "\n"
        + table(
            [
                (
                    row["exit"],
                    *(row["loss"], row["correct"], row["agreement"]),
                    *(part["head_multiply_adds"] / 1e6, part["head_bytes"] / 1e3),
                    *(part["multiply_adds"] / 1e6, part["multiply_adds"] / full["multiply_adds"]),
                )
                for row, part in zip(results["exits"], results["parts"], strict=True)
            ],
            header=(
                "exit",
                *("loss", "accuracy", "agreement"),
                *("head, M mult-adds", "kB", "all, leaving there", "÷ full"),
            ),
        )
    )
    oracle, rows = of["oracle"], [*of["rows"], *of["static"]]
    quality = [
        (
            row["policy"],
            *(row["accuracy"], row["agreement"], row["mean_depth"], row["multiply_adds"] / 1e6),
            1e3 * row["joules"],
        )
        for row in rows
    ]
    adds, depth = oracle["multiply_adds"] / 1e6, oracle["mean_depth"]
    quality.append(("oracle exits", oracle["accuracy"], None, depth, adds, None))
    columns = ("accuracy", "equal to full", "mean depth", "M mult-adds", f"mJ, {of['energy']}")
    yield "Quality and cost of an answer:\n" + table(quality, header=("policy", *columns))
    sizes = list(rows[0]["throughput"])
    said = (
        f"Time: milliseconds of one of {of['singles']} examples one by one, and examples a second "
        f"in batches; {of['rounds']} rounds in turns:"
    )
    yield f"{textwrap.fill(said, 100)}\n" + table(
        [
            (
                row["policy"],
                *row["latency"].values(),
                row["latency_ratio"],
                *(x for n in sizes for x in (row["throughput"][n], row["throughput_ratio"][n])),
                row["programs"],
            )
            for row in rows
        ],
        header=(
            "policy",
            *rows[0]["latency"],
            "÷ full",
            *(x for n in sizes for x in (f"batch {n}", "× full")),
            "programs",
        ),
    )


def _joined(batches: Iterable[dict]) -> tuple[dict[str, np.ndarray], np.ndarray]:
    """(what the stem takes, the labels) of the examples of all batches."""
    parts = [{name: x[batch["valid"]] for name, x in batch.items()} for batch in batches]
    joined = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
    del joined["valid"]
    return joined, joined.pop("labels")


def _check(baseline: Tuned, tuned: Tuned) -> None:
    if baseline.model.exits.points:
        raise ValueError(
            f"{baseline.workdir} has exits after blocks {baseline.model.exits.points}; a baseline "
            "is a network without exits (exits.points=())"
        )
    theirs, ours = ((of.data or {}).get("classes") for of in (baseline, tuned))
    if theirs and ours and theirs != ours:
        raise ValueError(
            f"{baseline.workdir} was trained with the classes {', '.join(theirs)}, but "
            f"{tuned.workdir} with {', '.join(ours)}, in this order; they cannot be compared"
        )
    for name in _SAME:
        theirs, ours = (getattr(of.config.data, name) for of in (baseline, tuned))
        if theirs != ours:
            raise ValueError(
                f"{baseline.workdir} was trained with data.{name}={theirs}, but {tuned.workdir} "
                f"with {ours}; they cannot be compared"
            )


def _described(tuned: Tuned) -> dict:
    model, config = tuned.model, tuned.config
    new = dict(config.model.new)
    return {
        # A network made anew is named by what it was made of.
        "source": config.model.source or f"{new.pop('family')} ({_listed(new)})",
        "depth": model.config.depth,
        "num_classes": model.config.num_classes,
        "exit_points": list(model.exits.points),
        "head": model.exits.head,
        "output": model.exits.output,
        "init": config.exits.init,
        "train": config.tune.train,
        "backbone_parameters": tree.count(tuned.params["backbone"]),
        "exit_parameters": tree.count(tuned.params["exits"]),
    }


def _listed(settings: dict) -> str:
    return ", ".join(f"{name} {value}" for name, value in settings.items())


def _examples(feed: feeds.ExampleFeed, answer: Classified, labels: np.ndarray, count: int) -> dict:
    """Those that left first and last, ready to be shown: `first` and `last`."""
    examples = feed.examples("test")

    def row(index: int) -> dict:
        example = examples[index]
        said = int(answer.labels[index])
        return {
            "label": examples.classes[labels[index]],
            "prediction": examples.classes[said],
            "right": said == int(labels[index]),
            "depth": int(answer.depths[index]),
            "score": float(answer.scores[index]),
            **_shown_as(example),
        }

    first, last = classifiers.extremes(answer, count)
    return {"first": [row(i) for i in first], "last": [row(i) for i in last]}


def _shown_as(example: Example) -> dict[str, str]:
    if "text" in example:
        return {"text": shown.cut(example["text"])}
    return {"png": shown.png(example["image"])}
