"""What a page needs to look into answers: all that every exit would have said.

The one idea: an answer of the full model is given text, and its positions are scored at every exit
as calibration scores them; so are a classifier's examples. So thresholds can be moved over them
without a model, and where each leaves, what it says there and what that saves follow by comparing
numbers.

What this cannot show is decoding itself, in which a token that differs changes all that follows.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np

from early_exit import confidence as confidences
from early_exit.calibration import temperature, thresholds
from early_exit.calibration.records import Records
from early_exit.data import pairs
from early_exit.data.examples import Examples
from early_exit.decoding import detokenize
from early_exit.decoding.generate import generate
from early_exit.decoding.mode import LOSSY
from early_exit.evaluation import exits, shown
from early_exit.policy import NEVER, ExitPolicy
from early_exit.runs import progress
from early_exit.runs.assemble import Tuned

EPSILONS = tuple(percent / 100 for percent in range(50, 101))
# Exits of a classifier seldom differ from the full model, so the last steps are small.
EXAMPLE_EPSILONS = (*EPSILONS[:40:5], *(half / 200 for half in range(180, 201)))
# Of examples and what is said of them, in all: the page stays below a megabyte. What an exit says
# of one, and its score, take about so much.
EXAMPLES_BYTES, _SAID_BYTES = 700_000, 20
# Texts are filled up to a multiple of this, so that few programs are compiled.
FILL = 64
_DIGITS = 9  # by which float32 numbers are told apart


def explorer(
    tuned: Tuned,
    records: Records,
    policy: ExitPolicy,
    prompts: Sequence[tuple[str, Sequence[int]]],
) -> dict[str, Any] | None:
    """The full model's answers to `prompts`, with what every exit would have said there.

    None where there is no exit to look into, or a temperature at which nothing was recorded.

    Args:
      records: of calibration data, on which thresholds for each ε are found; with what
        temperatures are fitted on, if the policy has some.
      policy: the one that is shown first; its temperatures soften all scores.
      prompts: (as it is shown, token ids).

    Returns:
      `confidence`; `depths`, and `costs` as shares of going all the way, [E + 1]; `epsilons` [K]
      with `thresholds` [K][E] ("never" for inf); `policy`, the thresholds of the policy itself;
      `words`, token → text; and `answers`: `prompt`, `pieces` [n], `said` [E + 1][n], the token
      that each exit would have said, `scores` [E + 1][n] (None where it declines), and `exits` [n],
      where each position leaves by the policy. The first position is the end of the prompt, which
      always runs to the end.
    """
    if not tuned.model.exits.points or not _recorded(policy):
        return None
    asked = progress.counted(prompts, "looking into answers", "answers")
    found = [_answer(tuned, policy, *prompt) for prompt in asked]
    tokens = sorted({token for answer in found for said in answer["said"] for token in said})
    return {
        **_movable(_softened(records, policy), policy, policy.thresholds, EPSILONS),
        "words": {str(token): tuned.tokenizer.decode([token]) for token in tokens},
        "answers": found,
    }


def examples(
    records: Records,
    policy: ExitPolicy,
    test: Records,
    given: Examples,
    *,
    count: int,
) -> dict[str, Any] | None:
    """The first examples of a split, with what every exit says of them.

    None where there is no exit to look into, none is asked for, or a temperature at which nothing
    was recorded.

    Args:
      records, policy: as for `explorer`.
      test: the records of `given`, as many as there are, in its order; with what temperatures are
        fitted on, if the policy has some.
      given: examples, of which the first are a fair sample.
      count: how many at most; fewer, if their pictures are large.

    Returns:
      What `explorer` does, but for: `words`, class → name; `answers` has one entry, in which
      `pieces` [n] are the examples, texts or addresses of pictures that hold them, and `labels`
      [n] their classes; `pictures`, which of both; and `reject`, the policy's.
    """
    count = min(count, len(given), len(test.labels))
    if len(records.exit_depths) == 1 or not count or not _recorded(policy):
        return None
    beside = _SAID_BYTES * len(records.exit_depths)
    pieces = list(shown.pieces((given[i] for i in range(count)), EXAMPLES_BYTES, beside))
    found = _softened(test.take(np.arange(len(pieces))), policy)
    scores = found.score(policy.confidence)
    # An example is an answer of its own and always at its start, where a decay has not begun.
    thresholds_E = np.array([policy.threshold(e, 0.0) for e in range(len(scores) - 1)])
    return {
        **_movable(_softened(records, policy), policy, thresholds_E, EXAMPLE_EPSILONS),
        "words": {str(i): name for i, name in enumerate(given.classes)},
        "pictures": "image" in given[0],
        "reject": None if policy.reject is None else float(policy.reject),
        "answers": [
            {
                "pieces": pieces,
                "labels": found.labels.tolist(),
                "said": found.predictions.tolist(),
                "scores": _numbers_of(scores),
                "exits": policy.exit_index(scores, found.exit_depths).tolist(),
            }
        ],
    }


def _movable(
    records: Records, policy: ExitPolicy, thresholds_E: Any, epsilons: Sequence[float]
) -> dict[str, Any]:
    """What is compared with what, wherever thresholds can be moved."""
    steps = thresholds.ladder(records, policy.confidence, epsilons)
    return {
        "confidence": policy.confidence,
        "depths": records.exit_depths.tolist(),
        "costs": (records.costs / records.costs[-1]).tolist(),
        "epsilons": list(epsilons),
        "thresholds": _numbers_of(steps),
        "policy": _numbers_of(np.asarray(thresholds_E)[None])[0],
    }


def speed_line(
    shares: Sequence[Sequence[float]], times: Sequence[float], costs: Sequence[float]
) -> dict[str, float]:
    """Time against mean cost, both as shares of the full model's, of P policies that were timed.

    A straight line through them: time = `fixed` + `slope` · cost. Through the origin where that
    says nothing: of fewer than two policies, or with a slope that is not positive. `points` is how
    many there are.

    Args:
      shares: [P, E + 1], of what left at each exit.
      times: [P].
      costs: [E + 1], of leaving at each exit.
    """
    mean_costs, times = np.reshape(shares, (-1, len(costs))) @ costs, np.asarray(times)
    fixed = slope = 0.0
    if len(times) > 1 and np.ptp(mean_costs) > 0:
        slope, fixed = np.polyfit(mean_costs, times, 1)
    if not slope > 0 or fixed < 0:
        fixed, slope = 0.0, float(times.mean() / mean_costs.mean()) if len(times) else 1.0
    return {"fixed": float(fixed), "slope": float(slope), "points": len(times)}


def of_decoding(rows: Sequence[dict[str, Any]], costs: Sequence[float]) -> dict[str, float]:
    """The `speed_line` of lossy decoding, a token's time; rows of `tradeoff.compare`."""
    lossy = [row for row in rows if row["mode"] == LOSSY.name]
    shares = [row["exit_shares"][: len(costs)] for row in lossy]
    return speed_line(shares, [1 / row["speedup"] for row in lossy], costs)


def of_classifying(rows: Sequence[dict[str, Any]], costs: Sequence[float]) -> dict[str, float]:
    """The `speed_line` of one example at a time; rows of `classifiers.compare`, the full model's
    first and none of another network."""
    dynamic = rows[1:]
    shares = [row["exit_shares"] for row in dynamic]
    return speed_line(shares, [row["latency_ratio"] for row in dynamic], costs)


def _answer(tuned: Tuned, policy: ExitPolicy, text: str, prompt: Sequence[int]) -> dict[str, Any]:
    (answer,) = generate(
        tuned.model,
        tuned.params,
        [prompt],
        policy=None,
        max_new_tokens=tuned.config.evaluate.sample_tokens,
        stop_ids=tuned.stop_ids,
    )
    new = len(answer.tokens)
    batch, first = pairs.alone(tuned.model.config, prompt, answer.tokens, FILL)
    soften = policy.temperatures is not None
    of_text = exits.record(tuned.model, tuned.params, [batch], soften=soften)
    # A position for each token but the last: the one just before it.
    found = _softened(of_text.take(np.arange(first - 1, first - 1 + new)), policy)
    scores = found.score(policy.confidence)
    progress = np.arange(1, new) / tuned.config.evaluate.sample_tokens
    left = policy.exit_index(scores[:, 1:], found.exit_depths, progress)
    return {
        "prompt": text,
        "pieces": detokenize.pieces(tuned.tokenizer, answer.tokens),
        "said": found.predictions.tolist(),
        "scores": _numbers_of(scores),
        "exits": [len(found.exit_depths) - 1, *left.tolist()],
    }


def _recorded(policy: ExitPolicy) -> bool:
    """Whether records know the scores at the policy's temperatures."""
    asked = () if policy.temperatures is None else np.asarray(policy.temperatures).tolist()
    return all(np.float32(confidences.TEMPERATURES).tolist().count(x) for x in asked)


def _softened(records: Records, policy: ExitPolicy) -> Records:
    """The records as the policy sees them."""
    if policy.temperatures is None:
        return records
    return temperature.apply(records, np.asarray(policy.temperatures))


def _numbers_of(rows: np.ndarray) -> list[list[float | str | None]]:
    """float32 [R, n] as short numbers in the same order; `never` for inf, None for −inf."""
    words = {NEVER: "never", -NEVER: None}
    return [
        [words[x] if x in words else float(f"{x:.{_DIGITS}g}") for x in row]
        for row in rows.astype(float).tolist()
    ]
