"""Chains of drafts: how likely each stands, and how far they may go where nobody checks them.

The one idea: a chain is a row of exits seen from the other side. It goes on while its drafts are
sure enough, so the ones it ends with are the policy, and all that is fitted for exits (a level of
agreement that all steps share, tests in a row with a promise) is fitted for steps.
"""

import dataclasses

import jax.numpy as jnp
import numpy as np
from scipy import optimize

from early_exit.calibration import certify, thresholds
from early_exit.calibration.records import chosen_groups
from early_exit.policy import NEVER, DraftPolicy
from early_exit.settings.sections import CalibrateSettings

# Scores of one draft alone, by what it says.
SCORES = ("max_prob", "margin", "entropy")
# Equal parts of [0, 1] in which scores are told apart.
PARTS = 20


@dataclasses.dataclass(frozen=True)
class Chains:
    """What the K steps of a chain say that begins at each of N positions of some text.

    The tokens between are the text's; where the full model says other ones, a chain of its own
    words would have ended there.

    Attributes:
      scores: confidence name → float32 [K, N]; −inf where the head declines.
      agrees: bool [K, N], whether the step's token is the full model's there.
      losses: float32 [K, N], cross-entropy of the text's token in nats.
      groups: int [N], the document.
    """

    scores: dict[str, np.ndarray]
    agrees: np.ndarray
    losses: np.ndarray
    groups: np.ndarray

    @property
    def stands(self) -> np.ndarray:
        """bool [K, N], whether a draft and all before it agree."""
        return np.logical_and.accumulate(self.agrees)

    def take(self, positions: np.ndarray) -> "Chains":
        """The chains that begin at some positions, given by index or by a mask."""
        return Chains(
            {name: score[:, positions] for name, score in self.scores.items()},
            self.agrees[:, positions],
            self.losses[:, positions],
            self.groups[positions],
        )


def fit(chains: Chains, settings: CalibrateSettings) -> tuple[DraftPolicy, dict]:
    """What chains are worth, and thresholds for where drafts stand unchecked; how well, as JSON.

    With a method that promises (`certify.METHODS`), the share of wrong ones among unchecked drafts
    is at most α with probability 1 − δ; with any other, at most 1 − ε on these chains.

    Raises:
      ValueError: too few documents to choose and to test on.
    """
    name = settings.confidence if settings.confidence in SCORES else SCORES[0]
    stands_KN = _stands(chains, name)
    if settings.method in certify.METHODS:
        design = chosen_groups(chains.groups, settings.design, settings.seed)
        rows = _path(chains.take(design), name)[::-1]
        row = _certified(chains.take(~design), rows, name, settings)
    else:
        row = _epsilon(chains, _path(chains, name), name, settings.epsilon)
    made = _made(chains.scores[name], row)
    drafts = int(made.sum())
    stated = asked(settings) | {
        "confidence": name,
        "agreement": float(chains.agrees[made].mean()) if drafts else None,
        "tokens": 1 + drafts / chains.groups.size,
        "chains": int(chains.groups.size),
    }
    return DraftPolicy(jnp.asarray(row), jnp.asarray(stands_KN), name), stated


def asked(settings: CalibrateSettings) -> dict:
    """What is asked of drafts that nobody checks, as `fit` understands it."""
    if settings.method in certify.METHODS:
        return {"method": settings.method, "alpha": settings.alpha, "delta": settings.delta}
    return {"method": "epsilon", "epsilon": settings.epsilon}


def _stands(chains: Chains, name: str) -> np.ndarray:
    """How often drafts stand by step and score, if those before do: float32 [K, PARTS].

    It does not fall with the score. Each part counts one draft more, that stands as often as the
    head itself holds it likely.
    """
    centres = (np.arange(PARTS) + 0.5) / PARTS
    found = []
    reached = np.ones(chains.groups.size, bool)
    for score, agrees in zip(chains.scores[name], chains.agrees, strict=True):
        counts = reached & (score > -np.inf)
        part = np.clip(score[counts] * PARTS, 0, PARTS - 1).astype(int)
        total = np.bincount(part, minlength=PARTS) + 1
        stood = np.bincount(part, agrees[counts], PARTS) + centres
        fitted = optimize.isotonic_regression(stood / total, weights=total)
        found.append(fitted.x)
        reached &= agrees
    return np.stack(found).astype(np.float32)


def _path(chains: Chains, name: str) -> np.ndarray:
    """Thresholds float32 [J, K] at each shared level of agreement; lower levels come first."""
    pairs = zip(chains.scores[name], chains.agrees, strict=True)
    each = [thresholds.at_levels(*pair, thresholds.LEVELS) for pair in pairs]
    return np.stack(each, axis=1).astype(np.float32)


def _made(scores_KN: np.ndarray, row: np.ndarray) -> np.ndarray:
    """bool [K, N], the drafts that chains with these thresholds make."""
    return np.logical_and.accumulate(scores_KN >= row[:, None])


def _epsilon(chains: Chains, rows: np.ndarray, name: str, epsilon: float) -> np.ndarray:
    """The row of the lowest level at which the drafts that are made agree at a rate ≥ ε."""
    for row in rows:
        made = _made(chains.scores[name], row)
        if not made.any() or chains.agrees[made].mean() >= epsilon:
            return row
    return np.full(len(rows[0]), NEVER, np.float32)


def _certified(
    chains: Chains, rows: np.ndarray, name: str, settings: CalibrateSettings
) -> np.ndarray:
    """The last row before the first of which it cannot be shown that α is kept; never, if none.

    Of each document the mean loss counts, over all steps of all its chains: 1 for a wrong draft, 0
    for a right one, α for one that is not made. It is at most α where the share of wrong drafts is.
    """
    test = certify.METHODS[settings.method]
    documents, of_N = np.unique(chains.groups, return_inverse=True)
    sizes = np.bincount(of_N) * len(chains.agrees)
    if settings.method == "clopper_pearson":  # counts losses of 0 or 1: a draft of each document
        order = np.random.default_rng(settings.seed).permutation(of_N.size)
    passed = np.full(rows.shape[1], NEVER, np.float32)
    for row in rows:
        made = _made(chains.scores[name], row)
        if not made.any():
            continue
        if settings.method == "clopper_pearson":
            first = order[made[0, order]]
            _, chosen = np.unique(of_N[first], return_index=True)
            ends = made[:, first[chosen]].sum(axis=0)
            step = np.random.default_rng(settings.seed).integers(ends)
            losses = ~chains.agrees[step, first[chosen]]
        else:
            losses = np.where(made, ~chains.agrees, settings.alpha).sum(axis=0)
            losses = np.bincount(of_N, losses, len(documents)) / sizes
        if test(losses, settings.alpha, settings.delta) > settings.delta:
            break
        passed = row
    return passed
