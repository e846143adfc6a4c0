"""Chains of drafts: how likely each stands, and how far they may go where nobody checks them.

The one idea: a chain is a row of exits seen from the other side. It goes on while its drafts are
sure enough, so the ones it ends with are the policy, and all that is fitted for exits (a level of
agreement that all steps share, tests in a row with a promise) is fitted for steps.
"""

import dataclasses
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from early_exit.calibration import certify, thresholds
from early_exit.calibration.records import chosen_groups
from early_exit.policy import NEVER, DraftPolicy
from early_exit.settings.sections import CalibrateSettings
from early_exit.storage import files

_ARRAYS, _SCORE = ("agrees", "losses", "groups"), "score_"
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
      metadata: where they come from.

    Raises:
      ValueError: no chain, or arrays that do not belong together.
    """

    scores: dict[str, np.ndarray]
    agrees: np.ndarray
    losses: np.ndarray
    groups: np.ndarray
    metadata: dict[str, Any] = dataclasses.field(default_factory=dict)

    def __post_init__(self):
        shapes = {x.shape for x in (*self.scores.values(), self.agrees, self.losses)}
        if shapes != {(len(self.agrees), *self.groups.shape)} or not self.groups.size:
            raise ValueError(f"{self.groups.size} chains, with arrays of the shapes {shapes}")

    @property
    def stands(self) -> np.ndarray:
        """bool [K, N], whether a draft and all before it agree."""
        return np.logical_and.accumulate(self.agrees)

    def take(self, positions: np.ndarray) -> "Chains":
        """The chains that begin at some positions, given by index or by a mask."""
        return dataclasses.replace(
            self,
            scores={name: score[:, positions] for name, score in self.scores.items()},
            agrees=self.agrees[:, positions],
            losses=self.losses[:, positions],
            groups=self.groups[positions],
        )

    def save(self, path: Path) -> None:
        """Writes one `.npz`, whole or not at all."""
        arrays = {name: getattr(self, name) for name in _ARRAYS}
        arrays |= {f"{_SCORE}{name}": score for name, score in self.scores.items()}
        files.write_records(path, arrays, self.metadata)

    @classmethod
    def load(cls, path: Path) -> "Chains":
        """Reads what `save` wrote.

        Raises:
          FileNotFoundError: no such file, naming the command that writes it.
          ValueError: a damaged file, or not one of chains.
        """
        with files.opened_records(path) as (arrays, metadata):
            found = {name: arrays[name] for name in _ARRAYS}
            return cls(files.beginning(arrays, _SCORE), **found, metadata=metadata)


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
        row = _certified(chains.take(design), chains.take(~design), name, settings)
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
    from scipy import optimize  # not at the top: most commands need it late or never

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
    design: Chains, chains: Chains, name: str, settings: CalibrateSettings
) -> np.ndarray:
    """The last row before the first of which it cannot be shown that α is kept; never, if none.

    The rows, and what a document may draft at most, are from the design. Of each document the mean
    loss over so many drafts counts: 1 for a wrong one, 0 for a right one, α for one that is not
    made. It is at most α where the share of wrong drafts is.
    """
    test, never = certify.METHODS[settings.method], np.full(len(chains.agrees), NEVER, np.float32)
    rows = _path(design, name)[::-1]
    # Of very few drafts nothing can be shown, and the first failure is the end.
    begun = [_made(design.scores[name], row)[0].mean() for row in rows]
    passed, alpha = never, settings.alpha
    for row in rows[np.searchsorted(np.maximum.accumulate(begun), certify.FIRST_COVERAGE) :]:
        made = _made(chains.scores[name], row)
        if settings.method == "clopper_pearson":  # counts losses of 0 or 1
            losses = _one_of_each_document(chains, made, settings.seed)
        else:
            most = _by_document(design.groups, _made(design.scores[name], row)).max()
            count, wrong = (_by_document(chains.groups, x) for x in (made, made & ~chains.agrees))
            slots = np.maximum(count, most)
            losses = (wrong + alpha * (slots - count)) / slots
        if not losses.size or test(losses, alpha, settings.delta) > settings.delta:
            break
        passed = row
    return passed


def _by_document(groups: np.ndarray, counted_KN: np.ndarray) -> np.ndarray:
    """How many there are in each document, int."""
    _, of_N = np.unique(groups, return_inverse=True)
    return np.bincount(of_N, counted_KN.sum(axis=0)).astype(int)


def _one_of_each_document(chains: Chains, made: np.ndarray, seed: int) -> np.ndarray:
    """bool, whether a draft is wrong that is drawn from those of each document that has some."""
    step, chain = np.nonzero(made)
    order = np.random.default_rng(seed).permutation(len(step))
    _, first = np.unique(chains.groups[chain[order]], return_index=True)
    chosen = order[first]
    return ~chains.agrees[step[chosen], chain[chosen]]
