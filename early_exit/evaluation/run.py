"""The body of `launch.calibrate`, and what it shares with that of `launch.evaluate`.

The one idea: everything is derived from the newest checkpoint and saved beside it, marked with
the fingerprint of the heads it came from, so results of an older checkpoint are never reused.
"""

import dataclasses
import functools
import os
import platform
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from early_exit import policy as policies
from early_exit import sharding
from early_exit.calibration import chains, methods, promise
from early_exit.calibration.chains import Chains
from early_exit.calibration.records import Records
from early_exit.data.transforms import next_token_targets
from early_exit.evaluation import drafts, exits
from early_exit.exits.multi_exit import MultiExit
from early_exit.policy import ExitPolicy
from early_exit.runs import assemble, layout, lock, progress
from early_exit.runs.assemble import Tuned
from early_exit.settings.sections import CalibrateSettings


def check_exits(tuned: Tuned) -> None:
    """Raises ValueError for a run without exits."""
    if not tuned.model.head_names:
        raise ValueError(
            f"{tuned.workdir} has no exits (exits.points=()): there is nothing to calibrate and no "
            "exit to measure; tune a run that has some"
        )


def records_of(tuned: Tuned, *, soften: bool = False) -> Records:
    """The model on the run's calibration data; read back if this model has been recorded on it.

    Args:
      soften: whether temperatures are to be fitted.

    Raises:
      ValueError: a run without exits.
    """
    check_exits(tuned)
    record = functools.partial(exits.record, soften=soften)
    serves = (lambda found: bool(found.softened)) if soften else (lambda found: True)
    return _kept(tuned, "records.npz", Records, record, serves)


def chains_of(tuned: Tuned) -> Chains:
    """What `records_of` is for exits, for a run's recurrent exit."""
    return _kept(tuned, "chains.npz", Chains, drafts.record, lambda found: True)


def _kept(tuned: Tuned, name: str, kind, record: Callable, serves: Callable):
    """Records of some kind on the run's calibration data; made where what is kept does not serve.

    Args:
      name: of their file in the run's folder.
    """
    path = tuned.workdir / name
    feed = tuned.feed
    metadata = tuned.metadata | {
        "data": feed.data_hash("calibration"),
        "num_batches": tuned.config.calibrate.batches,
    }
    found = kind.load(path) if path.exists() else None
    suits = found is not None and found.metadata == metadata and serves(found)
    if sharding.agreed(suits):
        return found or kind.load(path)
    count = metadata["num_batches"]
    batches = progress.counted(feed.calibration(count), "recording", total=count)
    found = record(tuned.model, tuned.params, batches, **metadata)
    if not jax.process_index():
        found.save(path)
    return found


def calibrate(
    tuned: Tuned,
    settings: CalibrateSettings | None = None,
    tell: Callable[[str], None] = lambda _: None,
) -> tuple[ExitPolicy, Records]:
    """Fits a policy, as the settings (or the config's) ask, and saves it as `policy.json`.

    Args:
      tell: is told, before the model runs, what the data can promise at best.

    Raises:
      ValueError: a run without exits, settings that make no policy, or a promise that the data
        cannot give.
      RuntimeError: another command is at work in the run's folder.
    """
    check_exits(tuned)
    settings = tuned.config.calibrate if settings is None else settings
    with lock.held(tuned.workdir):
        policy, records = fitted(
            tuned.model,
            settings,
            groups=lambda: _groups(tuned),
            record=lambda: records_of(tuned, soften=settings.temperature),
            chain=lambda: chains_of(tuned),
            tell=tell,
        )
        if not jax.process_index():
            policies.save(policy, tuned.workdir / layout.POLICY)
    return policy, records


def fitted(
    model: MultiExit,
    settings: CalibrateSettings,
    *,
    groups: Callable[[], np.ndarray],
    record: Callable[[], Records],
    chain: Callable[[], Chains],
    tell: Callable[[str], None] = lambda _: None,
) -> tuple[ExitPolicy, Records]:
    """The policy that keeps what is asked, and the records that it was fitted on.

    Args:
      groups: gives the text or example of each position that `record` will have, int [N].
      record: runs the model, or reads what it did.
      chain: the same for a recurrent exit, where there is one.
      tell: is told, before the model runs, what the data can promise at best.

    Raises:
      ValueError: settings that make no policy, or a promise that the data cannot give.
    """
    classifies = model.config.classifies
    kind = "examples" if classifies else "texts"
    if (stated := promise.stated(settings, classifies=classifies, kind=kind)) is not None:
        found = promise.reach(groups(), settings, kind)
        promise.check(found, settings)
        for one in found:
            tell(str(one))
    records = record()
    return _fitted(model, records, chain, settings, promise=stated), records


def _fitted(
    model: MultiExit,
    records: Records,
    chain: Callable[[], Chains],
    settings: CalibrateSettings,
    **stated: Any,
) -> ExitPolicy:
    """The policy that keeps what is asked, of all kinds of exits that the model has.

    Args:
      stated: goes into its provenance.
    """
    policy, drafting = methods.fit(records, settings), None
    stated = {**policy.provenance, **stated}
    if model.exits.recurrent_taps:
        drafting, stated["chains"] = chains.fit(chain(), settings)
    return dataclasses.replace(policy, provenance=stated, drafts=drafting)


def _groups(tuned: Tuned) -> np.ndarray:
    """The text or example of every position that `records_of` has or will have, int [N]."""
    feed = tuned.feed
    batches = tuned.config.calibrate.batches
    if tuned.model.config.classifies:
        count = len(feed.examples("calibration"))
        return np.arange(count if batches is None else min(count, batches * feed.per_batch))
    return np.concatenate(
        [batch["groups"][next_token_targets(batch)[1]] for batch in feed.calibration(batches)]
    )


def policies_of(tuned: Tuned, records: Records) -> dict[str, ExitPolicy]:
    """The policies to measure, by name (`methods.described`); the first is the one to be shown.

    The run's own comes first, then one for each of `evaluate.epsilons`, by the same confidence. The
    surest of these is first where the run has no policy of its own, or has switched it off.
    """
    saved = (tuned.workdir / layout.POLICY).exists()
    own = assemble.load_policy(tuned) if saved else None
    confidence = own.confidence if own else tuned.config.calibrate.confidence
    epsilons = list(tuned.config.evaluate.epsilons)
    if own is None and epsilons:
        epsilons.insert(0, max(epsilons))
    found = {} if own is None else {methods.described(own): own}
    for epsilon in epsilons:
        asked = CalibrateSettings(confidence=confidence, epsilon=float(epsilon))
        policy = _fitted(tuned.model, records, lambda: chains_of(tuned), asked)
        found.setdefault(methods.described(policy), policy)
    return found


def machine() -> dict:
    """Where figures were measured."""
    return {
        "device": jax.devices()[0].device_kind,
        "cores": os.cpu_count(),
        "jax": jax.__version__,
        "system": platform.system(),
    }
