"""What early exit buys a classifier: the quality of its answers beside their cost, also by clock.

The one idea: all cases, the full model first, take turns on the same examples in one process, and
what they are compared by are ratios within a round; figures of two moments would compare the
machine's moods.
"""

import dataclasses
import functools
import itertools
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence

import numpy as np

from early_exit.backbones import base
from early_exit.calibration import thresholds
from early_exit.calibration.records import Records
from early_exit.classifying.classify import Classified, Classifier
from early_exit.cost import energy, multiply_adds
from early_exit.exits.multi_exit import MultiExit
from early_exit.policy import ExitPolicy
from early_exit.runs import progress

# Levels of ε at which the curve of a policy's confidence is drawn.
LEVELS = (*np.linspace(0.5, 0.9, 9), *np.linspace(0.91, 1, 19))


@dataclasses.dataclass(frozen=True)
class Case:
    """One way to classify.

    Attributes:
      policy: None runs all blocks and no head.
      of: what the backbone costs for one row.
    """

    model: MultiExit
    params: base.Params
    policy: ExitPolicy | None
    of: multiply_adds.BackboneCost

    @functools.cached_property  # tracing a head takes a while
    def heads(self) -> tuple[multiply_adds.Cost, ...]:
        """What evaluating each head costs, its gate included."""
        return tuple(
            multiply_adds.head(self.model.config, self.model.exits, self.of, point, np.float32)[0]
            for point in self.model.exits.points
        )

    def paths(self, runs: Sequence[bool]) -> list[multiply_adds.Cost]:
        """What is run, all together, for an input that leaves at each exit, the final one last.

        Args:
          runs: which heads are run for those who go on; an exit's own is run for those who leave.
        """
        passed, found = multiply_adds.Cost(), []
        for point, head, run in zip(self.model.exits.points, self.heads, runs, strict=True):
            found.append(self.of.before(point) + passed + head)
            passed += head if run else multiply_adds.Cost()
        return [*found, self.of.full + passed]


def consulted(model: MultiExit, policy: ExitPolicy | None) -> list[bool]:
    """Which heads are run for those who come by: of those that nobody leaves at, few."""
    if policy is None:
        return [False] * len(model.exits.points)
    asked = [bool(policy.consults(e)) for e in range(len(model.exits.points))]
    chained = model.exits.cascade or model.exits.ensemble  # what comes later builds on it
    return [here or (chained and any(asked[e:])) for e, here in enumerate(asked)]


def parts(case: Case) -> list[dict]:
    """A row per exit, the final one last: what its head costs, and all that leads there.

    `head_multiply_adds`, `head_bytes` (of parameters); `multiply_adds`, `bytes` of the blocks and
    the heads on the way, all of them consulted. The final exit's head is the network's own readout.
    """
    heads = [*case.heads, case.of.readout]
    return [
        {
            "exit": int(depth),
            "head_multiply_adds": head.multiply_adds,
            "head_bytes": head.bytes,
            "multiply_adds": path.multiply_adds,
            "bytes": path.bytes,
        }
        for depth, head, path in zip(case.model.exit_depths, heads, _all_asked(case), strict=True)
    ]


def _all_asked(case: Case) -> list[multiply_adds.Cost]:
    return case.paths([True] * len(case.heads))


def _taken(case: Case, paths: Sequence[multiply_adds.Cost], exits: np.ndarray) -> dict:
    """What answers that left at these exits [N] took on average."""
    shares = np.bincount(exits, minlength=len(paths)) / len(exits)
    adds, read = ([getattr(p, name) for p in paths] for name in ("multiply_adds", "bytes"))
    return {
        "exit_shares": shares.tolist(),
        "mean_depth": float(shares @ case.model.exit_depths),
        "multiply_adds": float(shares @ adds),
        "bytes": float(shares @ read),
    }


def oracle(case: Case, records: Records) -> dict:
    """A bound: everything leaves at the first exit that is right, or runs to the end if none is.

    No policy can know that. Its cost is of blocks and of every head on the way.
    """
    right = records.correct
    exits = np.where(right.any(0), right.argmax(0), len(right) - 1)
    return {"accuracy": float(right.any(0).mean()), **_taken(case, _all_asked(case), exits)}


def by_epsilon(records: Records, confidence: str, levels=LEVELS) -> Iterator[ExitPolicy]:
    """A policy for each ε, which those who leave agree at on these records, from the lowest up."""
    for epsilon in levels:
        yield thresholds.fit(records, confidence, float(epsilon))


def curve(case: Case, policies: Iterable[ExitPolicy], records: Records) -> list[dict]:
    """A row for each policy unlike those before: its `accuracy`, `agreement` and cost on `records`.

    Args:
      policies: fitted on other records of the same model.
    """
    rows, seen = [], set()
    for policy in policies:
        if (key := policy.thresholds.tobytes()) in seen:
            continue
        seen.add(key)
        exits = policy.exit_index(records.score(policy.confidence), records.exit_depths)
        said = records.predictions[exits, np.arange(len(exits))]
        rows.append(
            {
                "accuracy": float((said == records.labels).mean()),
                "agreement": float((said == records.predictions[-1]).mean()),
                **_taken(case, case.paths(consulted(case.model, policy)), exits),
            }
        )
    return rows


def compare(
    cases: Mapping[str, Case],
    inputs: Mapping[str, np.ndarray],
    labels: np.ndarray,
    *,
    rounds: int,
    singles: int,
    rows: int,
    sizes: Sequence[int],
) -> tuple[list[dict], dict[str, Classified]]:
    """Answers all examples in every case, and times all cases in turns.

    Args:
      cases: by name; the first, the full model, is what others are compared with.
      inputs: name → [N, ...], what the stem takes.
      labels: int [N].
      rounds: how often everything is timed, after once that is not: programs compile then.
      singles: examples that are classified one by one.
      rows: examples that are classified in batches.
      sizes: of these batches.

    Returns:
      (a row per case: `policy`, its name; `accuracy` among its answers; `abstained`, the share of
      examples without one; `agreement` with the first case; what an answer costs on average,
      `multiply_adds`, `bytes`, `mean_depth`, `exit_shares` [E + 1]; `latency` of one example in
      milliseconds, its `mean`, `p50`, `p95`, `p99`, and `latency_ratio`, its mean ÷ the first
      case's; `throughput` by size of batch, examples per second, and `throughput_ratio`;
      `joules` for an answer one by one; `programs` compiled;
      the answers by name).

    Raises:
      ValueError: fewer examples than a batch has.
    """
    if max(sizes) > len(labels):
        raise ValueError(
            f"batches of {max(sizes)} cannot be timed on {len(labels)} examples; lower "
            "evaluate.sizes, or raise evaluate.batches"
        )
    classifiers = {
        name: Classifier(case.model, case.params, case.policy, largest=max(sizes))
        for name, case in cases.items()
    }
    all_of_them = progress.counted(list(classifiers.items()), "answering", "policies")
    answers = {name: classify(inputs) for name, classify in all_of_them}
    meter = energy.meter()
    amounts = {1: min(singles, len(labels))}
    # Whole batches, at least one; what is left over of a last one is left out.
    amounts |= {size: max(min(rows, len(labels)) // size, 1) * size for size in sizes}
    seconds, joules = _in_turns(classifiers, inputs, amounts, rounds, meter)
    reference, found = next(iter(cases)), []
    for name, case in cases.items():
        answer = answers[name]
        given = ~answer.abstained
        taken = _taken(case, case.paths(consulted(case.model, case.policy)), answer.exits)
        one = 1e3 * seconds[name][1]
        each = joules[name][1] / amounts[1] if meter else None
        found.append(
            {
                "policy": name,
                "accuracy": float((answer.labels == labels)[given].mean()),
                "abstained": float(answer.abstained.mean()),
                "agreement": float((answer.labels == answers[reference].labels).mean()),
                **taken,
                "latency": {
                    "mean": float(one.mean()),
                    **{f"p{q}": float(np.percentile(one, q)) for q in (50, 95, 99)},
                },
                "latency_ratio": _ratio(seconds[name][1], seconds[reference][1]),
                "throughput": {
                    str(size): float(amounts[size] / np.median(seconds[name][size].sum(1)))
                    for size in sizes
                },
                "throughput_ratio": {
                    str(size): _ratio(seconds[reference][size], seconds[name][size])
                    for size in sizes
                },
                "joules": float(np.median(each))
                if meter
                else energy.modelled(taken["multiply_adds"], taken["bytes"]),
                "programs": classifiers[name].programs,
            }
        )
    return found, answers


def _ratio(above: np.ndarray, below: np.ndarray) -> float:
    """Of the sums over calls; round by round, so that drift of the machine's speed cancels."""
    return float(np.median(above.sum(1) / below.sum(1)))


def _in_turns(classifiers, inputs, amounts, rounds, meter):
    """name → size of batch → seconds [rounds, calls]; name → size → joules [rounds]."""
    seconds = {name: {size: [] for size in amounts} for name in classifiers}
    joules = {name: {size: [] for size in amounts} for name in classifiers}
    names = list(classifiers)
    turns = list(itertools.product(range(rounds + 1), amounts.items()))
    for turn, (size, amount) in progress.counted(turns, "timing", "turns"):
        chunks = [
            {key: value[start : start + size] for key, value in inputs.items()}
            for start in range(0, amount, size)
        ]
        after = turn % len(names)  # no one always comes after the same
        for name in names[after:] + names[:after]:
            before = meter.read() if meter else None
            took = [_seconds(classifiers[name], chunk) for chunk in chunks]
            if turn:  # the first compiled
                seconds[name][size].append(took)
                joules[name][size].append(meter.between(before, meter.read()) if meter else 0)
    return (
        {name: {size: np.array(x) for size, x in by.items()} for name, by in found.items()}
        for found in (seconds, joules)
    )


def _seconds(classify: Classifier, chunk: Mapping[str, np.ndarray]) -> float:
    began = time.perf_counter()
    classify(chunk)
    return time.perf_counter() - began


def extremes(answer: Classified, count: int) -> tuple[list[int], list[int]]:
    """Indices of the examples that left first, the surest before others, and of those that left
    last, the least sure before others."""
    surest = np.lexsort((-answer.scores, answer.exits))
    deepest = np.lexsort((answer.scores, -answer.exits))
    return surest[:count].tolist(), deepest[:count].tolist()
