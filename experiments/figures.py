"""Figures of positions that depend on each other within a text, and how well they are known.

The one idea: what is drawn again, for an interval, is texts; positions of one text are no more
independent than its words are.
"""

from collections.abc import Callable

import numpy as np
from scipy import optimize, special, stats

Figures = Callable[[np.ndarray], np.ndarray]


def intervals(
    figures: Figures, texts: np.ndarray, draws: int, confidence: float = 0.95, seed: int = 0
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(figures [K], where their intervals begin, where they end), by the bootstrap over texts.

    The percentile interval of Efron 1979. NaN, a figure that a draw does not have, is left out.

    Args:
      figures: positions (int, some more than once) → float [K].
      texts: int [N], to which text each position belongs.
      draws: how often as many texts are drawn with replacement.
    """
    names, of_N = np.unique(texts, return_inverse=True)
    order = np.argsort(of_N, kind="stable")
    ends = np.cumsum(np.bincount(of_N))[:-1]
    of_text = np.split(order, ends)
    rng = np.random.default_rng(seed)
    drawn = np.array(
        [
            figures(np.concatenate([of_text[i] for i in rng.integers(len(names), size=len(names))]))
            for _ in range(draws)
        ]
    )
    tail = (1 - confidence) / 2
    low, high = np.full((2, drawn.shape[1]), np.nan)
    told = np.isfinite(drawn).any(axis=0)  # the others have no interval
    low[told], high[told] = np.nanquantile(drawn[:, told], [tail, 1 - tail], axis=0)
    return figures(np.arange(len(texts))), low, high


def auc(scores: np.ndarray, right: np.ndarray) -> float:
    """How often a position that is right scores higher than one that is not, ties counting half.

    Mann and Whitney 1947; NaN where all are the same.

    Args:
      scores: float [N]; −inf is the lowest.
      right: bool [N].
    """
    ones = np.count_nonzero(right)
    if not 0 < ones < len(right):
        return float("nan")
    ranks = stats.rankdata(scores)
    return float((ranks[right].sum() - ones * (ones + 1) / 2) / (ones * (len(right) - ones)))


def rank_correlation(x: np.ndarray, y: np.ndarray) -> float:
    """Spearman's, of ranks with ties; NaN where either is constant."""
    x, y = stats.rankdata(x), stats.rankdata(y)
    if not (np.ptp(x) and np.ptp(y)):
        return float("nan")
    return float(np.corrcoef(x, y)[0, 1])


def logistic(features: np.ndarray, right: np.ndarray, ridge: float = 1.0) -> Callable:
    """A logistic regression of `right` [N] on features [N, F]: features → log-odds.

    Features are brought to mean 0 and variance 1 first; a ridge of ½ · `ridge` · |w|² is on all but
    the constant.
    """
    mean, spread = features.mean(axis=0), features.std(axis=0)
    spread = np.where(spread > 0, spread, 1)

    def scaled(x):
        return np.column_stack([(x - mean) / spread, np.ones(len(x))])

    x, y = scaled(features), right.astype(np.float64)
    penalty = ridge * np.append(np.ones(features.shape[1]), 0)

    def loss(w):
        odds = x @ w
        value = np.logaddexp(0, odds).sum() - y @ odds + 0.5 * penalty @ w**2
        return value, x.T @ (special.expit(odds) - y) + penalty * w

    found = optimize.minimize(loss, np.zeros(x.shape[1]), jac=True, method="L-BFGS-B")
    return lambda other: scaled(other) @ found.x


def crossed(features: np.ndarray, right: np.ndarray, texts: np.ndarray, seed: int = 0):
    """What `logistic` foretells of each position [N], fitted to the other half of the texts."""
    names = np.unique(texts)
    first = np.random.default_rng(seed).permutation(names)[: len(names) // 2]
    half = np.isin(texts, first)
    found = np.zeros(len(texts))
    for known in (half, ~half):
        found[~known] = logistic(features[known], right[known])(features[~known])
    return found
