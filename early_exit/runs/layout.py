"""What lies in a run's folder, and whose it is.

    workdir/config.json  checkpoints/  records.npz  chains.npz  policy.json  evaluation.json
            metrics.jsonl  speed.jsonl  tensorboard/  report.html  bad_batch_<step>.npz
            in_use.json    as long as a command writes there (see `lock`)

The one idea: settings are written before anything is tuned with them, and a folder that holds heads
takes no others. So what a folder says of itself is true of its weights.
"""

import json
from pathlib import Path
from typing import Any

import jax
from absl import logging

from early_exit.backbones import base
from early_exit.exits import artefact
from early_exit.runs import checkpoint
from early_exit.settings import read
from early_exit.settings.sections import Settings
from early_exit.storage import buckets, files

CHECKPOINTS = "checkpoints"
POLICY = "policy.json"

# What the tuned heads depend on; the other sections may change from command to command.
TUNED_BY = ("seed", "model", "exits", "data", "tune")
# But for when it is saved and looked at: an interrupted run may go on with others of these.
WHEN = frozenset(
    f"tune.{name}"
    for name in ("checkpoint_every", "keep_checkpoints", "validate_every", "validation_batches")
)


def save_config(config: Settings, workdir: Path) -> None:
    """Writes the run's config; a folder that holds a run must hold one with the same heads.

    Raises:
      ValueError: the folder belongs to a run with other settings; names those that differ.
    """
    if artefact.is_in(workdir):
        raise ValueError(f"{workdir} holds an exported model; use another --workdir")
    path = workdir / "config.json"
    # Settings that failed before anything was saved may be mended.
    if path.exists() and checkpoint.latest_step(workdir / CHECKPOINTS) is not None:
        check_same_run(config, workdir)
    files.make_folder(workdir)
    if jax.process_index() == 0:
        files.write_json(path, read.as_dict(config))


def check_same_run(config: Settings, workdir: Path) -> None:
    """Raises ValueError where the folder's heads were tuned with other settings."""
    if changed := sorted(_changed(as_fitted(config, workdir) or config, workdir)):
        raise ValueError(
            f"{workdir} holds a run with other settings ({'; '.join(changed)}); "
            "use another --workdir, or the same settings to go on"
        )


def as_fitted(config: Settings, workdir: Path) -> Settings | None:
    """The settings with as many steps as the folder's run has been fitted to (`tune.minutes`).

    None where there is no run with the same heads but for that.
    """
    if not config.tune.minutes or not (workdir / "config.json").exists():
        return None
    steps = load_config(workdir).tune.steps
    if not config.tune.warmup_steps < steps <= config.tune.steps:
        return None
    fitted = read.changed(config, {"tune.steps": steps})
    return None if list(_changed(fitted, workdir)) else fitted


def _changed(config: Settings, workdir: Path):
    """What the folder's heads were tuned with, and the settings have otherwise."""
    before, after = (read.as_dict(c) for c in (load_config(workdir), config))
    for section in TUNED_BY:
        for name, old, new in _differences({section: before[section]}, {section: after[section]}):
            if name not in WHEN:
                yield f"{name}: {old} → {new}"


def _differences(before: dict, after: dict, prefix: str = ""):
    """(name, value before, value after) of what differs."""
    for name in before.keys() | after.keys():
        old, new = before.get(name), after.get(name)
        if isinstance(old, dict) and isinstance(new, dict):
            yield from _differences(old, new, f"{prefix}{name}.")
        elif old != new:
            yield f"{prefix}{name}", old, new


def load_config(workdir: Path) -> Settings:
    """The config that a run, or what it was exported to, was tuned with.

    Raises:
      FileNotFoundError: no run in that folder.
      ValueError: a file that is damaged, or has settings that there are not.
    """
    if artefact.is_in(workdir):
        path, text = workdir / artefact.DESCRIPTION, json.dumps(artefact.describe(workdir).config)
    else:
        path = workdir / "config.json"
        if not path.exists():
            raise FileNotFoundError(
                f"no run in {workdir} ({path} is missing); start with launch.tune"
            )
        text = path.read_text(encoding="utf-8")
    try:
        return read.read_saved(text)
    except ValueError as error:
        raise ValueError(
            f"{path} holds settings that this version does not take: {error}\nCorrect them in that "
            "file, or use the version of early_exit that wrote it"
        ) from error


def kept_data(workdir: Path) -> dict[str, Any] | None:
    """`Tuned.data` of a run, or of what it was exported to; None, too, where there is neither."""
    if artefact.is_in(workdir):
        return artefact.describe(workdir).data
    if checkpoint.latest_step(workdir / CHECKPOINTS) is None:
        return None
    return checkpoint.metadata(workdir / CHECKPOINTS).get("data")


def data_of_source(config: Settings) -> dict[str, Any] | None:
    """The classes that a frozen backbone answers with, where it comes from a run that kept them."""
    model = config.model
    if config.tune.train == "all" or not model.source or "num_classes" in model.changes:
        return None
    data = kept_data(buckets.place(model.source)) or {}
    return {"classes": data["classes"]} if "classes" in data else None


def tell_no_data_kept(workdir: Path, network: base.BackboneConfig) -> None:
    """For runs of versions that kept nothing of their data."""
    if network.classifies:
        unknown = "which classes it was trained with; those of today's data are taken for them"
    else:
        unknown = (
            "what text it was tuned on; a single text file was cut into other pieces then, and "
            "some of what it is calibrated and tested on now was tuned on"
        )
    logging.warning("%s does not say %s; tune anew to be sure", workdir, unknown)
