"""What a policy promises, and the most that data can promise: known before a model runs.

The one idea: a bound on a mean needs independent units, and their number alone says how small a
risk they can show, were none of them ever to lose anything.
"""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from early_exit.calibration import bounds, certify
from early_exit.calibration.records import chosen_groups
from early_exit.settings.sections import CalibrateSettings


@dataclasses.dataclass(frozen=True)
class Reach:
    """What data can show of one risk.

    Attributes:
      name: of the setting that asks for it, `alpha` or `reject_risk`.
      asked: at most so much.
      least: the smallest risk that could be shown.
      units: how many are tested.
      kind: what they are.
      delta: with which probability the promise may fail.
    """

    name: str
    asked: float
    least: float
    units: int
    kind: str
    delta: float

    def __str__(self) -> str:
        # Rounded up: what is shown can be asked for.
        least = math.ceil(1e3 * self.least) / 1e3
        return (
            f"{self.units} independent {self.kind} to test on: {self.name} ≥ {least:g} at δ = "
            f"{self.delta:g} is the most that they can promise"
        )


def reach(groups: np.ndarray, settings: CalibrateSettings, kind: str) -> list[Reach]:
    """What calibration can show at best; empty where the method promises nothing of new data.

    Args:
      groups: int [N], the text or example of each position that will be recorded.
      kind: what a group is called.

    Raises:
      ValueError: too few groups to choose and to test on.
    """
    tested, found = groups, []
    if settings.reject_risk is not None:
        first = chosen_groups(groups, 0.5, settings.seed)
        tested, count = groups[first], len(np.unique(groups[~first]))
        # Algorithm 1 of Geifman and El-Yaniv 2017 shares δ out among its steps (`rejection`).
        steps = max(1, math.ceil(math.log2(count)))
        least = bounds.least(bounds.binomial, count, settings.delta / steps)
        found.append(Reach("reject_risk", settings.reject_risk, least, count, kind, settings.delta))
    if settings.method in certify.METHODS:
        tested = tested[~chosen_groups(tested, settings.design, settings.seed)]
        each = settings.unit == "position"
        count = len(tested) if each else len(np.unique(tested))
        least = bounds.least(certify.METHODS[settings.method], count, settings.delta)
        kind = "positions" if each else kind
        found.append(Reach("alpha", settings.alpha, least, count, kind, settings.delta))
    return found


def check(found: list[Reach], settings: CalibrateSettings) -> None:
    """Raises ValueError where less is asked than can be shown, unless `allow_never`."""
    for one in found:
        if one.asked < one.least and not settings.allow_never:
            raise ValueError(
                f"{one.name}={one.asked:g} cannot be promised: {one}. Ask for that, calibrate on "
                f"more {one.kind}, or take a policy that never leaves, with allow_never"
            )


def stated(settings: CalibrateSettings, *, classifies: bool, kind: str) -> dict[str, Any] | None:
    """What a promise is about, for the policy's file; None where new data is promised nothing."""
    if settings.method not in certify.METHODS and settings.reject_risk is None:
        return None
    if classifies:
        return {
            "subject": "new examples like those of the calibration data",
            "units": kind,
            "mode": "classification, each example leaving by the policy",
        }
    return {
        "subject": "positions of given text at full depth; not of decoded answers",
        "units": kind,
        "mode": "teacher forcing: every block is run for the text before a position",
    }


def of_answers(prompts: int, settings: CalibrateSettings) -> Reach:
    """What so many prompts can show at best of the mean loss of answers."""
    least = bounds.least(certify.METHODS[settings.method], prompts, settings.delta)
    return Reach("alpha", settings.alpha, least, prompts, "prompts", settings.delta)


def about_answers(mode: str, new_tokens: int) -> dict[str, Any]:
    """What a promise about decoded answers is about, for the policy's file."""
    return {
        "subject": "answers decoded to prompts like those of the calibration",
        "units": "prompts",
        "mode": mode,
        "new_tokens": new_tokens,
    }


def elsewhere(provenance: Mapping[str, Any], mode: str, new_tokens: int) -> str | None:
    """A sentence where a policy promises something of answers, but not of answers such as these.

    Args:
      provenance: the policy's.
      mode, new_tokens: in which answers are decoded, and how long they may become.
    """
    stated = provenance.get("promise") or {}
    if "new_tokens" not in stated or mode.startswith("verified"):
        return None  # it is about given text, or there is nothing that may be lost
    if mode == stated["mode"] and new_tokens <= stated["new_tokens"]:
        return None
    return (
        f"the policy's promise is about answers of at most {stated['new_tokens']} tokens in "
        f"{stated['mode']} mode; it says nothing of {mode} mode with up to {new_tokens}"
    )
