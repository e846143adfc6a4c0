"""From a config to the model it names, and from a run's folder back to its tuned model.

    workdir/config.json  checkpoints/  records.npz  policy.json  evaluation.json
            metrics.jsonl  speed.jsonl  tensorboard/  report.html  bad_batch_<step>.npz
            in_use.json    as long as a command writes there (see `lock`)

The one idea: a run is its folder. Every command after `tune` needs only the folder, because the
config and the backbone's fingerprint are in it, and refuses one that does not fit the weights.
What a run was exported to stands for it (see `exits.artefact`): heads and policy, with the
backbone beside them as `transformers` has it, or without.
"""

import dataclasses
import functools
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from early_exit import policy as policies
from early_exit import sharding, tree
from early_exit.backbones import base
from early_exit.backbones.decoder import DecoderConfig
from early_exit.backbones.encoder import EncoderConfig
from early_exit.backbones.resnet import ResNetConfig
from early_exit.exits import artefact
from early_exit.exits.heads import ExitConfig
from early_exit.exits.multi_exit import MultiExit
from early_exit.policy import ExitPolicy
from early_exit.pretrained import chat
from early_exit.pretrained.describe import describe
from early_exit.pretrained.export import write_backbone
from early_exit.pretrained.load import Pretrained, load
from early_exit.runs import checkpoint
from early_exit.settings import overrides
from early_exit.settings.overrides import ConfigDict
from early_exit.storage import files

CHECKPOINTS = "checkpoints"
POLICY = "policy.json"

# What the tuned heads depend on; the other sections may change from command to command.
TUNED_BY = ("seed", "model", "exits", "data", "tune")


@dataclasses.dataclass(frozen=True)
class Tuned:
    """A multi-exit model ready to run.

    Attributes:
      model: the static description.
      params: `backbone`, `exits` and, for reduced heads, `token_ids`.
      tokenizer: the backbone's.
      config: the run's.
      workdir: the folder of the run, or of what it was exported to.
      metadata: what anything derived from the model is marked with: the fingerprints of the
        `backbone` and the `heads`, and the `step` of the checkpoint.
    """

    model: MultiExit
    params: base.Params
    tokenizer: Any
    config: ConfigDict
    workdir: Path
    metadata: dict[str, Any]

    @functools.cached_property
    def stop_ids(self) -> list[int]:
        """Tokens that end an answer."""
        return chat.stop_ids(self.tokenizer)

    def chat(self, question: str) -> list[int]:
        """Token ids of a user's turn in the model's chat template.

        Raises:
          ValueError: the tokenizer has no chat template.
        """
        return chat.prompt(self.tokenizer, question)


def exit_config(config: ConfigDict) -> ExitConfig:
    return ExitConfig(
        points=tuple(config.exits.points),
        head=config.exits.head,
        output=config.exits.output,
        classes=config.exits.classes,
        gate=config.exits.gate,
        cascade=config.exits.get("cascade", False),
        ensemble=config.exits.get("ensemble", False),
    )


def load_backbone(
    config: ConfigDict, shardings: Callable[[base.Params], Any] | None = None
) -> tuple[Pretrained, MultiExit]:
    """The network that the config's exits are attached to, and the multi-exit model of both.

    `model.source` names pretrained weights, or the folder of a run that trained a backbone; empty,
    the network is drawn at random, as `model.new` describes it. `model.changes` are settings that
    the source leaves open, such as `num_classes` of an encoder; what they add is drawn at random.

    Args:
      shardings: the parameters' shapes → a tree of shardings like them. Weights are read straight
        to their devices, one after the other; what is drawn, or comes from a run, is moved there.

    Raises:
      ValueError: weights that do not load, settings that make no network, or exits that do not
        fit it.
    """
    model, dtype = config.model, jnp.dtype(config.model.dtype)
    source, new = model.source, model.get("new")
    if bool(source) == bool(new):
        raise ValueError("give either model.source, where weights are, or model.new")
    if new:
        network = _new(new)
        if network.reads != "images":
            raise ValueError(
                f"a {new['family']} reads text, and a new one has no tokenizer for it; "
                "give model.source, where weights are"
            )
        pretrained = _drawn(network, {}, config, None)
    elif checkpoint.latest_step(Path(source) / CHECKPOINTS) is not None:
        tuned = load_tuned(Path(source))
        backbone = tuned.params["backbone"]
        pretrained = Pretrained(tuned.model.config, backbone, tuned.tokenizer, source)
    else:
        pretrained = load(source, dtype, shardings)
    if changes := model.get("changes"):
        try:
            changed = dataclasses.replace(pretrained.config, **changes)
        except TypeError as error:
            raise ValueError(f"model.changes do not fit the network: {error}") from error
        pretrained = _drawn(changed, pretrained.params, config, pretrained.tokenizer)
    if shardings is not None:
        params = sharding.place(pretrained.params, shardings(pretrained.params))
        pretrained = dataclasses.replace(pretrained, params=params)
    return pretrained, MultiExit(pretrained.config, exit_config(config))


def abstract_model(config: ConfigDict) -> MultiExit:
    """The multi-exit model that `load_backbone` would give; reads headers at most, no weights.

    Raises:
      ValueError: as `load_backbone`.
    """
    source, new = config.model.source, config.model.get("new")
    if new:
        network = _new(new)
    elif checkpoint.latest_step(Path(source) / CHECKPOINTS) is not None:
        network = abstract_model(load_config(Path(source))).config
    else:
        network = describe(source).config
    network = dataclasses.replace(network, **config.model.get("changes", {}))
    return MultiExit(network, exit_config(config))


# Networks that can be made anew, by the name in `model.new.family`.
FAMILIES = {
    "resnet_cifar": ResNetConfig.cifar,
    "resnet_imagenet": ResNetConfig.imagenet,
    "encoder": EncoderConfig,
    "decoder": DecoderConfig,
}


def _new(settings: ConfigDict) -> base.BackboneConfig:
    settings = dict(settings)
    family = settings.pop("family", None)
    if family not in FAMILIES:
        raise ValueError(
            f"unknown model.new.family {family!r}; choose one of {', '.join(FAMILIES)}"
        )
    try:
        return FAMILIES[family](**settings)
    except TypeError as error:
        raise ValueError(f"model.new does not describe a {family}: {error}") from error


def _drawn(
    network: base.BackboneConfig, params: base.Params, config: ConfigDict, tokenizer: Any
) -> Pretrained:
    """`network` with those of `params` that it has, and the others drawn from the config's seed."""
    _, abstract = base.abstract(network.build)
    given, wanted = tree.flatten(params), tree.flatten(abstract)
    kept = {
        path: given[path]
        for path, leaf in wanted.items()
        if path in given and given[path].shape == leaf.shape
    }
    if len(kept) < len(wanted):
        key, dtype = jax.random.key(config.seed), jnp.dtype(config.model.dtype)
        kept = tree.flatten(base.init(network, key, dtype)) | kept
    return Pretrained(network, tree.unflatten(kept), tokenizer, config.model.source)


def save_config(config: ConfigDict, workdir: Path) -> None:
    """Writes the run's config; a folder that holds a run must hold one with the same heads.

    Raises:
      ValueError: the folder belongs to a run with other settings, and those that differ are named;
        or a setting is NaN or infinite, which a file of settings cannot hold.
    """
    written = json.loads(config.to_json())
    if unfit := sorted(_differences(written, files.plain(written))):
        raise ValueError(f"settings are finite numbers; mend {unfit[0].partition(':')[0]}")
    if artefact.is_in(workdir):
        raise ValueError(f"{workdir} holds an exported model; use another --workdir")
    path = workdir / "config.json"
    # Settings that failed before anything was saved may be mended.
    if path.exists() and checkpoint.latest_step(workdir / CHECKPOINTS) is not None:
        _check_same_run(config, workdir)
    workdir.mkdir(parents=True, exist_ok=True)
    if jax.process_index() == 0:
        files.write_json(path, written)


def _check_same_run(config: ConfigDict, workdir: Path) -> None:
    before, after = (json.loads(c.to_json()) for c in (load_config(workdir), config))
    changed = [
        difference
        for section in TUNED_BY
        for difference in _differences({section: before[section]}, {section: after[section]})
    ]
    if changed:
        raise ValueError(
            f"{workdir} holds a run with other settings ({'; '.join(sorted(changed))}); "
            "use another --workdir, or the same settings to go on"
        )


def _differences(before: dict, after: dict, prefix: str = ""):
    for name in before.keys() | after.keys():
        old, new = before.get(name), after.get(name)
        if isinstance(old, dict) and isinstance(new, dict):
            yield from _differences(old, new, f"{prefix}{name}.")
        elif old != new:
            yield f"{prefix}{name}: {old} → {new}"


def load_config(workdir: Path) -> ConfigDict:
    """The config that a run, or what it was exported to, was tuned with.

    Raises:
      FileNotFoundError: no run in that folder.
    """
    if artefact.is_in(workdir):
        return overrides.ConfigDict(artefact.describe(workdir).config)
    path = workdir / "config.json"
    if not path.exists():
        raise FileNotFoundError(f"no run in {workdir} ({path} is missing); start with launch.tune")
    return overrides.ConfigDict(json.loads(path.read_text()))


def load_tuned(workdir: Path, config: ConfigDict | None = None) -> Tuned:
    """The tuned model of a run, from its newest checkpoint, or of what it was exported to.

    Args:
      config: settings for what follows tuning (`calibrate`, `evaluate`), instead of the run's.

    Raises:
      FileNotFoundError: no run, no checkpoint yet, or no backbone for heads exported without one.
      ValueError: `config` describes other heads than the run's, or the heads belong to another
        backbone than the config's source gives.
    """
    if config is None:
        config = load_config(workdir)
    else:
        _check_same_run(config, workdir)
    read = _exported if artefact.is_in(workdir) else _checkpointed
    model, params, tokenizer, provenance = read(workdir, config)
    # All committed to the device, as restored arrays are. A mixture makes a decode's state change
    # from one call to the next, and every program compile twice.
    params = jax.device_put(params, jax.local_devices()[0])
    provenance["heads"] = tree.fingerprint(params["exits"])
    return Tuned(model, params, tokenizer, config, workdir, provenance)


def _checkpointed(workdir: Path, config: ConfigDict):
    checkpoints = workdir / CHECKPOINTS
    step = checkpoint.latest_step(checkpoints)
    if step is None:
        raise FileNotFoundError(f"no checkpoint in {workdir}; let launch.tune finish a save")
    saved = checkpoint.metadata(checkpoints, step)
    pretrained, model = load_backbone(config)
    check_fingerprint(saved["backbone"], tree.fingerprint(pretrained.params), workdir)
    trained = checkpoint.restore(checkpoints, {"params": abstract_trained(config, model)}, step)
    params = jax.tree.map(lambda x: x.astype(config.model.dtype), trained[0]["params"])
    if "backbone" in params and config.model.get("scan"):
        params["backbone"] = base.unstack_blocks(params["backbone"])
    params = {"backbone": pretrained.params} | params
    if saved["token_ids"]:
        params["token_ids"] = jnp.array(saved["token_ids"], jnp.int32)
    provenance = {"backbone": tree.fingerprint(params["backbone"]), "step": step}
    return model, params, pretrained.tokenizer, provenance


def for_tuning(config: ConfigDict, model: MultiExit) -> MultiExit:
    """The model as it is tuned: `model.scan` runs its blocks in a loop, over stacked parameters.

    `model.remat` says what their backward pass computes again (see `DecoderConfig`).

    Raises:
      ValueError: a network that is not run so.
    """
    asked = {name: config.model[name] for name in ("scan", "remat") if config.model.get(name)}
    try:
        return dataclasses.replace(model, config=dataclasses.replace(model.config, **asked))
    except TypeError as error:
        raise ValueError(f"model.{' and model.'.join(asked)} are for decoders") from error


def abstract_trained(config: ConfigDict, model: MultiExit) -> base.Params:
    """The parameters that the config's recipe trains, as shapes: float32, as it keeps them."""
    trained = {"exits": model.abstract_exits()}
    if config.tune.train == "all":
        _, trained["backbone"] = base.abstract(for_tuning(config, model).config.build)
    return trained


def _exported(workdir: Path, config: ConfigDict):
    described = artefact.describe(workdir)
    beside = [workdir / name for name in ("config.json", "model.safetensors")]
    if any(path.exists() for path in beside):
        source = str(workdir)
    elif not isinstance(source := config.get("model", {}).get("source"), str):
        raise ValueError(f"{workdir / artefact.DESCRIPTION} names no backbone in config.model")
    pretrained = load(source, described.dtype)
    model, params = artefact.attach(workdir, pretrained.config, pretrained.params)
    provenance = {"backbone": described.backbone, "step": described.step}
    return model, params, pretrained.tokenizer, provenance


def export(tuned: Tuned, folder: Path, *, exits_only: bool = False) -> None:
    """Writes a new folder with the backbone, as `transformers` has it, the heads and the policy.

    It loads with `load_tuned`, and its backbone with `transformers`. It appears whole or not at
    all; with `exits_only`, it has no backbone, and goes with the one that the config names.

    Raises:
      FileExistsError: there is something under that name.
      ValueError: a backbone that `transformers` has no config for, or a policy of other heads.
      OSError: the folder cannot be written.
    """
    policy = tuned.workdir / POLICY
    with files.new_folder(folder) as inside:
        if policy.exists():
            load_policy(tuned)  # refuses one that does not fit
            shutil.copyfile(policy, inside / POLICY)
        if not exits_only:
            write_backbone(inside, tuned.model.config, tuned.params["backbone"], tuned.tokenizer)
        config, step = json.loads(tuned.config.to_json()), tuned.metadata["step"]
        artefact.write(inside, tuned.model, tuned.params, config, step)


def load_policy(tuned: Tuned, path: Path | None = None) -> ExitPolicy | None:
    """A policy, the run's own by default; None where it is switched off.

    Raises:
      FileNotFoundError: no such file.
      ValueError: not a policy, or one fitted to other heads.
    """
    path = tuned.workdir / POLICY if path is None else path
    policy = policies.load(path, exit_depths=tuned.model.exit_depths)
    if policy is not None and policy.provenance.get("heads") != tuned.metadata["heads"]:
        raise ValueError(
            f"{path} was fitted to other heads than those of step {tuned.metadata['step']} in "
            f"{tuned.workdir}; run launch.calibrate again"
        )
    return policy


def check_fingerprint(expected: str, found: str, workdir: Path) -> None:
    """Raises ValueError where heads were tuned on other weights than the ones loaded."""
    if expected != found:
        raise ValueError(
            f"the heads in {workdir} were tuned on a backbone with fingerprint {expected[:12]}…, "
            f"but model.source gives {found[:12]}…; name the backbone they were tuned on, "
            "or tune again in another --workdir"
        )
