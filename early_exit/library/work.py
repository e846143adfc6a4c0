"""Tuning, records and policies of a model in hand.

The one idea: these are the bodies of the commands with other doors. What is not given is what the
commands' settings have for it, so the same model, data and settings give the same exits and policy.
"""

import dataclasses
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from early_exit.calibration.records import Records
from early_exit.data import feed as feeds
from early_exit.data import given
from early_exit.data.parts import GIVEN
from early_exit.data.transforms import Batch
from early_exit.evaluation import drafts, exits, run
from early_exit.library.model import Model, beside
from early_exit.runs import progress as displays
from early_exit.settings.read import changed
from early_exit.settings.sections import Settings, TuneSettings
from early_exit.storage import buckets
from early_exit.training import loop

# The name of a source, or what `data.given` takes.
Data = str | given.Data


def tune(
    model: Model,
    data: Data,
    *,
    steps: int = 1000,
    learning_rate: float = 1e-3,
    batch_size: int = 8,
    sequence_length: int = 256,
    loss: str = "kl",
    train: str = "exits",
    validation: given.Data = (),
    workdir: str | Path | None = None,
    settings: Mapping[str, Any] | None = None,
    on_step: Callable[[int, dict[str, float]], None] | None = None,
    progress: bool = True,
) -> Model:
    """The model with its exits tuned, or tuned further; its policy is gone, for they are others.

    AdamW with a linear warm-up and cosine decay, gradients clipped; on all devices of
    `jax.devices()`, rows split among them. `model` stays as it is.

    Args:
      data: one of
        texts, `str`, packed into rows of `sequence_length` tokens;
        prompts with answers, `{"prompt": …, "answer": …}`, for a network whose encoder reads them;
        labelled examples, `{"text": …}` or `{"image": uint8 [H, W, C]}` with a `label`, a number or
        one of the names of the classes;
        batches as they are, `{"tokens": int [B, T]}` or what a classifier's stem takes with
        `labels` (see `early_exit.data.given.Batches`); a list is gone through again and again;
        the name of a source, as `"stdlib"`, a folder, `"tfds:NAME"`: its training split.
      steps: of the optimizer; with a `workdir`, of the whole run.
      learning_rate: the highest.
      batch_size: rows of a batch; of given batches, theirs.
      sequence_length: tokens of a row; likewise.
      loss: `kl` to the full model's distribution, `cross_entropy` with the next token or the label,
        or `both`.
      train: `exits`, or `all`: the network jointly with them.
      validation: data of the same kind, on which exits are measured into the run's metrics; a named
        source has a split for it.
      workdir: a folder for checkpoints and metrics, from which the same call goes on where it was;
        every command takes it, too. None keeps nothing.
      settings: any others, called as in the commands' flags: `{"tune.warmup_steps": 10}`
        (`python -m launch.inspect --settings` lists them).
      on_step: called with each step's number, from 1, and its metrics: `loss`, `loss/exit_<block>`,
        in nats, `grad_norm`, `learning_rate`.
      progress: whether to show a bar on standard error.

    Raises:
      ValueError: settings that make no run (all are named), data that do not fit the network, that
        end before the last step, or without a split that is needed.
      FloatingPointError: the loss or a gradient is not finite.
      RuntimeError: another command is at work in `workdir`.

    Example:
      >>> attached = ee.attach(model, (2, 4))
      >>> losses = []
      >>> tuned = ee.tune(
      ...     attached, texts, steps=3, batch_size=2, sequence_length=32, progress=False,
      ...     on_step=lambda step, metrics: losses.append(metrics["loss"]),
      ... )
      >>> len(losses), tuned.step
      (3, 3)
    """
    asked = {
        "tune.steps": steps,
        "tune.learning_rate": learning_rate,
        "tune.loss": loss,
        "tune.train": train,
        "data.batch_size": batch_size,
        "data.sequence_length": sequence_length,
        **(settings or {}),
    }
    fresh = dataclasses.replace(model.settings, tune=TuneSettings())
    config, kind, data = _configured(model, fresh, data, asked)
    held_out: Any = list(validation)
    feed: feeds.Feed
    if kind is None:
        feed = feeds.make(config, model.static.config, model.tokenizer, _classes(model))
    else:
        feed = given.feed(
            kind, data, held_out, config.data, model.static.config, model.tokenizer, model.classes
        )
    material = loop.Given(
        # Whose identity is known, and need not be worked out again.
        pretrained=dataclasses.replace(model.backbone, known=model.backbone.identity),
        exits=model.heads,
        token_ids=[] if model.token_ids is None else model.token_ids.tolist(),
        feed=feed,
        validates=kind is None or bool(held_out),
        told=on_step,
        shows=progress,
    )
    folder = None if workdir is None else buckets.place(workdir)
    trained, config = loop.tune_given(config, material, folder)
    trained = beside(model.backbone.params, trained)
    network = model.backbone
    if "backbone" in trained:  # it is another one since
        network = dataclasses.replace(network, params=trained["backbone"], known=None)
    return dataclasses.replace(
        model,
        backbone=network,
        heads=trained["exits"],
        policy=None,
        settings=config,
        data=dict(feed.about()),
        step=config.tune.steps,
    )


def _classes(model: Model) -> feeds.About | None:
    """What a classifier keeps of earlier data, whatever it is tuned on next."""
    known = model.data or {}
    return {"classes": known["classes"]} if "classes" in known else None


def _configured(
    model: Model, settings: Settings, data: Data, asked: Mapping[str, Any]
) -> tuple[Settings, str | None, Data]:
    """(the settings of a call, the kind of data if it was not named, the data)."""
    if isinstance(data, str):
        return changed(settings, {"data.source": data, **asked}), None, data
    kind, data, first = given.opened(data)
    asked = {"data.source": f"{GIVEN}{kind}", **asked}
    if kind == "batches":
        shape = given.completed(first, model.static.config)[
            "labels" if model.static.config.classifies else "tokens"
        ].shape
        asked |= dict(zip(("data.batch_size", "data.sequence_length"), shape, strict=False))
    return changed(settings, asked), kind, data


def _batches(
    model: Model, data: Data, batches: int | None, batch_size: int, sequence_length: int
) -> tuple[list[Batch], str]:
    """(the batches to record, the identity of the data)."""
    asked = {"data.batch_size": batch_size, "data.sequence_length": sequence_length}
    config, kind, data = _configured(model, model.settings, data, asked)
    network, known = model.static.config, model.data
    if not network.classifies and config.data.source != model.settings.data.source:
        known = None  # of other text
    if kind is None:
        feed = feeds.make(config, network, model.tokenizer, known)
    else:
        feed = given.feed(kind, data, (), config.data, network, model.tokenizer, model.classes)
    return list(feed.calibration(batches)), feed.data_hash("calibration")


def record(
    model: Model,
    data: Data,
    *,
    batches: int | None = None,
    batch_size: int = 8,
    sequence_length: int = 256,
    soften: bool = False,
) -> Records:
    """What every exit says, position by position, on data that it was not tuned on.

    All that `calibrate` needs, so that another policy never runs the model again; a frozen value of
    numpy arrays, with `save` and `load`.

    Args:
      data: as for `tune`; of a named source, its calibration split. Of texts, every one gets a row
        before any gets a second, for what counts is how many there are.
      batches: at most so many; None for all.
      batch_size, sequence_length: as for `tune`.
      soften: whether temperatures are to be fitted.

    Returns:
      scores float32 [E + 1, N], predictions int32 [E + 1, N], losses in nats, labels int32 [N], and
      which text each of the N positions belongs to.

    Raises:
      ValueError: a model without exits, or data that do not fit it.

    Example:
      >>> records = ee.record(tuned, texts, batch_size=2, sequence_length=32)
      >>> records.exit_depths.tolist(), bool(records.agrees.mean() <= 1)
      ([2, 4, 6], True)
    """
    found, identity = _batches(model, data, batches, batch_size, sequence_length)
    return _recorded(model, found, identity, batches, soften)


def _recorded(
    model: Model, found: list[Batch], identity: str, batches: int | None, soften: bool
) -> Records:
    if not model.static.head_names:
        raise ValueError("this model has no exits; give it some with early_exit.attach")
    metadata = {**model.metadata, "data": identity, "num_batches": batches}
    told = displays.counted(found, "recording")
    return exits.record(model.static, model.params, told, soften=soften, **metadata)


def calibrate(
    model: Model,
    data: Data | Records,
    *,
    batches: int | None = None,
    batch_size: int = 8,
    sequence_length: int = 256,
    tell: Callable[[str], None] = lambda _: None,
    **asked: Any,
) -> Model:
    """The model with a policy that keeps what is asked; `policy.provenance` says how well.

    Args:
      data: as for `record`, or records.
      batches, batch_size, sequence_length: as for `record`; not for records.
      tell: is told, before the model runs, what the data can promise at best.
      asked: `method`: `epsilon`, those who leave agree with the full model at the rate `epsilon` on
        these data; `ltt`, `ucb` or `clopper_pearson`, a risk of at most `alpha` with probability
        1 − `delta` on new data like these; `search` and others, the best for a mean cost `budget`,
        in blocks. `confidence`: `max_prob`, `margin`, `entropy`, `patience`, `similarity`, `gate`.
        What is not given is the model's settings' (`launch.inspect --settings`, section
        `calibrate`).

    Raises:
      ValueError: a model without exits, settings that make no policy, a promise that the data
        cannot give, or records of other heads.

    Example:
      >>> leaving = ee.calibrate(tuned, records, epsilon=0.9, confidence="margin")
      >>> leaving.policy.thresholds.shape
      (2,)
    """
    settings = changed(model.settings, {f"calibrate.{k}": v for k, v in asked.items()})
    asked_for = settings.calibrate
    kept: Records | None
    if isinstance(data, Records):
        _check_records(model, data)
        kept, identity = data, ""
        found: list[Batch] = []
    else:
        kept = None
        found, identity = _batches(model, data, batches, batch_size, sequence_length)

    def groups() -> np.ndarray:
        return exits.groups_of(model.static, found) if kept is None else kept.groups

    def recorded() -> Records:
        if kept is not None:
            return kept
        return _recorded(model, found, identity, batches, asked_for.temperature)

    policy, _ = run.fitted(
        model.static,
        asked_for,
        groups=groups,
        record=recorded,
        chain=lambda: drafts.record(model.static, model.params, found),
        tell=tell,
    )
    return dataclasses.replace(model, policy=policy, settings=settings)


def _check_records(model: Model, records: Records) -> None:
    if model.static.exits.recurrent_taps:
        raise ValueError("a recurrent exit is calibrated on data, not on records; give the data")
    if records.metadata.get("heads") != model.metadata["heads"]:
        raise ValueError(
            "these records are of other heads than the model's; record it anew with "
            "early_exit.record"
        )
