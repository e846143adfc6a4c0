"""How large a mean can be, given a sample: p-values and upper bounds for losses in [0, 1].

The one idea: every method is a test of "the mean is above α" for independent units, valid for any
sample size. Its upper bound is the same test read backwards: the least α that it still rejects.
"""

from collections.abc import Callable

import numpy as np

# (losses [n] in [0, 1], α, δ) → p-value of "their mean is above α". Only bets depend on δ.
Test = Callable[[np.ndarray, float, float], float]

_FUZZ = 1e-9  # rounding of a sum of shares, in units


def hoeffding_bentkus(losses: np.ndarray, alpha: float, delta: float = 0.1) -> float:
    """p = min(e^(−n·h(R̂, α)), e·P[Bin(n, α) ≤ ⌈n·R̂⌉]), h the divergence of Bernoulli variables.

    Bates et al. 2021 ("Distribution-Free, Risk-Controlling Prediction Sets", §3.1), as used by
    Angelopoulos et al. 2021 ("Learn then Test", prop. 1) and CALM; 1 where R̂ ≥ α.
    """
    del delta
    count, mean = len(losses), float(np.mean(losses))
    if mean >= alpha:
        return 1.0
    from scipy import special  # not at the top: most commands need it late or never

    divergence = special.rel_entr(mean, alpha) + special.rel_entr(1 - mean, 1 - alpha)
    at_most = np.ceil(count * mean - _FUZZ)
    return float(min(np.exp(-count * divergence), np.e * special.bdtr(at_most, count, alpha)))


def binomial(losses: np.ndarray, alpha: float, delta: float = 0.1) -> float:
    """p = P[Bin(n, α) ≤ errors], exact for losses that are 0 or 1.

    Raises:
      ValueError: other losses.
    """
    del delta
    errors = float(np.sum(losses))
    if not np.isin(losses, (0, 1)).all():
        raise ValueError("an exact binomial test counts errors: each loss must be 0 or 1")
    from scipy import special

    return float(special.bdtr(errors, len(losses), alpha))


def betting(losses: np.ndarray, alpha: float, delta: float = 0.1) -> float:
    """p = 1 / the most that bets against "the mean is above α" have ever won.

    Waudby-Smith and Ramdas 2024 ("Estimating means of bounded random variables by betting"), with
    the bets of Bates et al. 2021, prop. 5. Sharper than Hoeffding–Bentkus where losses vary little,
    as shares of a text's tokens do. The order matters, and units may come sorted by what they are,
    so they are mixed, always in the same way.
    """
    mixed = losses[np.random.default_rng(0).permutation(len(losses))]
    return float(np.exp(-max(0.0, winnings(mixed, alpha, delta, len(losses)).max())))


def winnings(losses: np.ndarray, alpha: float, delta: float, total: int) -> np.ndarray:
    """The logarithm of what the bets of `betting` have won after each loss, float64 [n].

    It may be looked at after every loss: with a mean above α, that it is ever as much as log 1/δ
    has a probability of at most δ (Ville's inequality).

    Args:
      losses: the first n, in an order that does not depend on what they are.
      total: how many there will be.
    """
    index = np.arange(1, len(losses) + 1)
    means = (0.5 + np.cumsum(losses)) / (1 + index)
    variances = (0.25 + np.cumsum((losses - means) ** 2)) / (1 + index)
    before = np.append(0.25, variances[:-1])
    bets = np.minimum(1, np.sqrt(2 * np.log(1 / delta) / (total * before)))
    return np.cumsum(np.log1p(-bets * (losses - alpha)))


def upper(p_value: Callable[[float], float], delta: float) -> float:
    """The upper bound on a mean that holds with probability 1 − δ: inf{α : p(α) ≤ δ}.

    With the `binomial` test, that of Clopper and Pearson (1934).
    """
    low, high = 0.0, 1.0
    for _ in range(40):
        middle = (low + high) / 2
        low, high = (low, middle) if p_value(middle) <= delta else (middle, high)
    return high


def least(test: Test, units: int, delta: float) -> float:
    """The smallest bound that so many units can give: that of units without any loss."""
    return upper(lambda alpha: test(np.zeros(units), alpha, delta), delta)


def units_needed(alpha: float, delta: float) -> int:
    """How many units without any loss it takes to show that the mean is at most α."""
    return int(np.ceil(np.log(delta) / np.log1p(-alpha) - _FUZZ))
