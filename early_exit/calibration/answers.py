"""Promises about decoded answers: with probability 1 − δ, their mean loss is at most α.

The one idea: what is independent is a prompt, and what a policy does to its answer is one loss in
[0, 1], whatever happens inside: changed tokens, and all that follows from them, are in it. Policies
stand in a row, chosen on other data, from one that hardly leaves to one that leaves everywhere, and
are tested in this order, each at the full level δ, up to the first that fails (as in `certify`).

Answers are dear, so a test ends as soon as its end is known. Bets (`bounds.winnings`) may be looked
at after every answer, and a policy passes when they have won 1/δ. Any test is given up where it
would fail even if no further answer lost anything.
"""

import dataclasses
from collections.abc import Callable, Iterable, Sequence

import numpy as np

from early_exit import policy as policies
from early_exit.calibration import bounds, certify
from early_exit.calibration.records import Records

# (the full model's tokens, those of an answer) → the loss in [0, 1].
Loss = Callable[[Sequence[int], Sequence[int]], float]

# Of the candidates, the first lets this share of positions leave.
_FIRST_COVERAGE = 0.001


def changed(reference: Sequence[int], answer: Sequence[int]) -> float:
    """1 where the answer is not the full model's, token for token."""
    return float(list(reference) != list(answer))


def tokens(reference: Sequence[int], answer: Sequence[int]) -> float:
    """Share of places, of the longer of both, at which they have not the same token."""
    same = sum(a == b for a, b in zip(reference, answer, strict=False))
    return 1 - same / max(len(reference), len(answer))


def rouge_l(reference: Sequence[int], answer: Sequence[int]) -> float:
    """1 − the F-measure of the longest common subsequence of tokens (Lin 2004, ROUGE-L, β = 1)."""
    answer = np.asarray(answer)
    longest = np.zeros(len(answer) + 1, np.int64)
    for token in reference:
        extended = np.append(0, longest[:-1] + (answer == token))
        longest = np.maximum.accumulate(np.maximum(longest, extended))
    return float(1 - 2 * longest[-1] / (len(reference) + len(answer)))


LOSSES: dict[str, Loss] = {"changed": changed, "tokens": tokens, "rouge_l": rouge_l}


def loss_of(loss: Loss, reference: Sequence[int], answer: Sequence[int]) -> float:
    """One answer's loss.

    Raises:
      ValueError: it is not in [0, 1].
    """
    found = float(loss(reference, answer))
    if not 0 <= found <= 1:
        name = getattr(loss, "__name__", "user's")
        raise ValueError(
            f"the loss {name!r} of an answer must lie in [0, 1], and is {found}; divide it by the "
            "most that it can be"
        )
    return found


def candidates(records: Records, confidence: str, count: int) -> np.ndarray:
    """Thresholds of at most `count` policies, to be tried in order: float32 [J, E].

    They are of `certify.path`, and from one to the next the share that leaves on the records grows
    by about the same factor.
    """
    scores = records.score(confidence)[:-1]
    rows = certify.path(records, confidence)
    leaving = np.array([np.mean(policies.first_exit(scores, row) < len(scores)) for row in rows])
    most = leaving.max()
    if not most:
        return rows[:0]
    steps = np.geomspace(min(_FIRST_COVERAGE, most), most, count)
    return rows[np.unique(np.searchsorted(leaving, steps))]


@dataclasses.dataclass(frozen=True)
class Tested:
    """One policy's test: on the losses of so many answers, and whether it passed."""

    losses: np.ndarray
    passed: bool


def in_order(
    portions: Iterable[Iterable[np.ndarray]],
    *,
    total: int,
    method: str,
    alpha: float,
    delta: float,
) -> list[Tested]:
    """Tests policies one after the other, up to the first that fails.

    Args:
      portions: of each policy, its losses [n], portion by portion; made only as they are taken. The
        prompts stand in an order that was drawn at random.
      total: how many losses a policy has in all.
      method: one of `certify.METHODS`.

    Raises:
      ValueError: losses other than 0 and 1 for `clopper_pearson`.
    """
    tests = []
    for of_policy in portions:
        seen, passed = np.zeros(0), False
        for portion in of_policy:
            seen = np.concatenate([seen, portion])
            passed = _p_value(method, seen, alpha, delta, total) <= delta
            hoped = np.append(seen, np.zeros(total - len(seen)))
            if passed or _p_value(method, hoped, alpha, delta, total) > delta:
                break
        tests.append(Tested(seen, passed))
        if not passed:
            break
    return tests


def bound(method: str, losses: np.ndarray, delta: float, total: int) -> float:
    """The least α at which a policy would have passed with these losses."""
    return bounds.upper(lambda alpha: _p_value(method, losses, alpha, delta, total), delta)


def _p_value(method: str, losses: np.ndarray, alpha: float, delta: float, total: int) -> float:
    """Of "the mean loss is above α"; 1 where a test must wait for all the losses."""
    if method == "ucb":
        return float(np.exp(-max(0.0, bounds.winnings(losses, alpha, delta, total).max())))
    if len(losses) < total:
        return 1.0
    return certify.METHODS[method](losses, alpha, delta)
