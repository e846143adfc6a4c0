"""What a page needs to look into answers: all that every exit would have said, token by token.

The one idea: an answer of the full model is given text, and its positions are scored at every exit
as calibration scores them. So thresholds can be moved over it without a model, and where each
position leaves, what it says there and what that saves follow by comparing numbers.

What this cannot show is decoding itself, in which a token that differs changes all that follows.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np

from early_exit import confidence as confidences
from early_exit.calibration import temperature, thresholds
from early_exit.calibration.records import Records
from early_exit.data import pairs
from early_exit.decoding import detokenize
from early_exit.decoding.generate import generate
from early_exit.decoding.mode import LOSSY
from early_exit.evaluation import exits
from early_exit.policy import NEVER, ExitPolicy
from early_exit.runs import progress
from early_exit.runs.assemble import Tuned

EPSILONS = tuple(percent / 100 for percent in range(50, 101))
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
    records = _softened(records, policy)
    shown = progress.counted(prompts, "looking into answers", "answers")
    found = [_answer(tuned, policy, *prompt) for prompt in shown]
    tokens = sorted({token for answer in found for said in answer["said"] for token in said})
    costs = records.costs / records.costs[-1]
    steps = thresholds.ladder(records, policy.confidence, EPSILONS)
    return {
        "confidence": policy.confidence,
        "depths": tuned.model.exit_depths.tolist(),
        "costs": costs.tolist(),
        "epsilons": list(EPSILONS),
        "thresholds": _numbers_of(steps),
        "policy": _numbers_of(np.asarray(policy.thresholds)[None])[0],
        "words": {str(token): tuned.tokenizer.decode([token]) for token in tokens},
        "answers": found,
    }


def speed_line(rows: Sequence[dict[str, Any]], costs: Sequence[float]) -> dict[str, float]:
    """Time of a token against its mean cost, both as shares of the full model's.

    A straight line through what was measured of lossy decoding: time = `fixed` + `slope` · cost.
    Through the origin where that says nothing: of fewer than two policies, or with a slope that is
    not positive. `points` is how many were measured.

    Args:
      rows: of `tradeoff.compare`.
      costs: [E + 1], of leaving at each exit.
    """
    lossy = [row for row in rows if row["mode"] == LOSSY.name]
    shares = np.array([row["exit_shares"][: len(costs)] for row in lossy]).reshape(-1, len(costs))
    mean_costs, times = shares @ costs, np.array([1 / row["speedup"] for row in lossy])
    fixed = slope = 0.0
    if len(lossy) > 1 and np.ptp(mean_costs) > 0:
        slope, fixed = np.polyfit(mean_costs, times, 1)
    if not slope > 0 or fixed < 0:
        fixed, slope = 0.0, float(times.mean() / mean_costs.mean()) if lossy else 1.0
    return {"fixed": float(fixed), "slope": float(slope), "points": len(lossy)}


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
    first = len(pairs.row_of(tuned.model.config, prompt))
    length, longest = (n + -n % FILL for n in (first + new, len(prompt)))
    batch = pairs.batch(tuned.model.config, [(prompt, answer.tokens)], length, 1, longest)
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
