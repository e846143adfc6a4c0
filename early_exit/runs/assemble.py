"""From a config to the model it names, and from a run's folder back to its tuned model.

The one idea: a run is its folder (`layout`). Every command after `tune` needs only the folder,
because the config and the backbone's fingerprint are in it, and refuses one that does not fit the
weights. What a run was exported to stands for it (see `exits.artefact`): heads and policy, with the
backbone beside them as `transformers` has it, or without.
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from early_exit import policy as policies
from early_exit import sharding, tree
from early_exit.backbones import base
from early_exit.backbones.identity import Identity
from early_exit.data import feed as feeds
from early_exit.data import tokenising
from early_exit.exits import artefact
from early_exit.exits.heads import ExitConfig
from early_exit.exits.multi_exit import MultiExit
from early_exit.policy import ExitPolicy
from early_exit.pretrained import chat, families
from early_exit.pretrained.describe import describe
from early_exit.pretrained.export import write_backbone
from early_exit.pretrained.generation import Generation
from early_exit.pretrained.load import Pretrained, announced, load
from early_exit.runs import checkpoint, layout, progress
from early_exit.settings import read
from early_exit.settings.sections import Settings
from early_exit.storage import buckets, copies, files
from early_exit.streams import stream

# Parameters' shapes → a tree of shardings like them.
Where = Callable[[base.Params], Any]


@dataclasses.dataclass(frozen=True)
class Tuned:
    """A multi-exit model ready to run.

    Attributes:
      model: the static description.
      params: `backbone`, `exits` and, for reduced heads, `token_ids`.
      tokenizer: the backbone's; None if it has none.
      generation: how the backbone's makers want it to write.
      config: the run's.
      workdir: the folder of the run, or of what it was exported to.
      data: what the run keeps of the data it was tuned on (`data.feed.About`); None for runs of
        versions that kept nothing.
      identity: of the backbone.
      metadata: what anything derived from the model is marked with: the fingerprints of the
        `backbone` and the `heads`, and the `step` of the checkpoint.
    """

    model: MultiExit
    params: base.Params
    tokenizer: Any
    generation: Generation
    config: Settings
    workdir: Path
    data: dict[str, Any] | None
    identity: Identity
    metadata: dict[str, Any]
    preprocessor: Mapping[str, Any] | None = None

    @functools.cached_property
    def feed(self) -> feeds.Feed:
        """The run's data, as it was when the run was tuned; what cannot be known of it is told."""
        if self.data is None:
            layout.tell_no_data_kept(self.workdir, self.model.config)
        return feeds.make(self.config, self.model.config, self.tokenizer, self.data)

    @property
    def backbone(self) -> Pretrained:
        """The network without its exits."""
        return Pretrained(
            self.model.config,
            self.params["backbone"],
            self.tokenizer,
            str(self.workdir),
            self.generation,
            self.identity,
            self.preprocessor,
        )

    @property
    def mesh(self) -> Mesh | None:
        """What its parameters lie on; None for one device."""
        return sharding.mesh_of(self.params)

    @property
    def stop_ids(self) -> list[int]:
        """Tokens that end an answer."""
        return list(self.generation.stop_ids)

    def encode(self, text: str) -> list[int]:
        """Token ids of a prompt that is continued as it stands; special tokens in it are special.

        Raises:
          ValueError: there is no tokenizer.
        """
        return tokenising.needed(self.tokenizer).encode(text)

    def chat(self, question: str) -> list[int]:
        """Token ids of a user's turn in the model's chat template; as it stands, for an encoder.

        Raises:
          ValueError: there is no tokenizer, no chat template, or one that fails.
        """
        if self.model.config.encodes_prompts:
            return self.encode(question)
        return chat.prompt(self.tokenizer, question)


def exit_config(config: Settings) -> ExitConfig:
    """What the config's exits are made of."""
    names = [field.name for field in dataclasses.fields(ExitConfig)]
    return ExitConfig(**{name: getattr(config.exits, name) for name in names})


@progress.waiting("loading the model")
def load_backbone(config: Settings, shardings: Where | None = None) -> tuple[Pretrained, MultiExit]:
    """The network that the config's exits are attached to, and the multi-exit model of both.

    `model.source` names pretrained weights, or the folder of a run that trained a backbone; empty,
    the network is drawn at random, as `model.new` describes it. `model.changes` are settings that
    the source leaves open, such as `num_classes` of an encoder; what they add is drawn at random.

    Args:
      shardings: the parameters' shapes → a tree of shardings like them. Weights are read, or drawn,
        straight to their devices, one after the other. Without it, one device has them all.

    Raises:
      ValueError: weights that do not load, settings that make no network, or exits that do not
        fit it.
    """
    pretrained = _network(config, shardings)
    return pretrained, MultiExit(pretrained.config, exit_config(config))


def _network(config: Settings, shardings: Where | None = None, weights: bool = True) -> Pretrained:
    """What `load_backbone` attaches exits to.

    Args:
      weights: whether to read them; without, all else is there, and what would be missed is told.
    """
    model, dtype = config.model, jnp.dtype(config.model.dtype)
    source = model.source
    if model.new:
        network = _new(model.new)
        if network.reads != "images":
            raise ValueError(
                f"a {model.new['family']} reads text, and a new one has no tokenizer for it; "
                "give model.source, where weights are"
            )
        pretrained = Pretrained(network, {}, None, source)
        if weights:
            pretrained = _drawn(network, pretrained, config, shardings)
    elif checkpoint.latest_step(buckets.place(source) / layout.CHECKPOINTS) is not None:
        run = layout.load_config(buckets.place(source))
        if weights:
            pretrained = _loaded(buckets.place(source), run, shardings).backbone
        else:
            pretrained = _network(run, weights=False)
    else:
        pretrained = load(source, dtype, shardings) if weights else announced(source)
    network = _changed(pretrained.config, model.changes)
    if not weights:
        return dataclasses.replace(pretrained, config=network)
    if model.changes:
        pretrained = _drawn(network, pretrained, config, shardings)
    return pretrained


def abstract_model(config: Settings) -> MultiExit:
    """The multi-exit model that `load_backbone` would give; reads headers at most, no weights.

    Raises:
      ValueError: as `load_backbone`.
    """
    source = config.model.source
    if config.model.new:
        network = _new(config.model.new)
    elif checkpoint.latest_step(buckets.place(source) / layout.CHECKPOINTS) is not None:
        network = abstract_model(layout.load_config(buckets.place(source))).config
    else:
        network = describe(source).config
    return MultiExit(_changed(network, config.model.changes), exit_config(config))


def _new(settings: Mapping[str, Any]) -> base.BackboneConfig:
    settings = dict(settings)
    family = settings.pop("family", None)
    known = families.new_networks()
    if family not in known:
        raise ValueError(f"unknown model.new.family {family!r}; choose one of {', '.join(known)}")
    try:
        return known[family](**settings)
    except TypeError as error:
        raise ValueError(f"model.new does not describe a {family}: {error}") from error


def _changed(network: base.BackboneConfig, changes: Mapping[str, Any]) -> base.BackboneConfig:
    try:
        return dataclasses.replace(network, **changes)
    except TypeError as error:
        raise ValueError(f"model.changes do not fit the network: {error}") from error


def _drawn(
    network: base.BackboneConfig, source: Pretrained, config: Settings, shardings: Where | None
) -> Pretrained:
    """`network` with those parameters of the source that it has, and the others drawn from the
    config's seed."""
    _, abstract = base.described(network)
    given, wanted = tree.flatten(source.params), tree.flatten(abstract)
    kept = {
        path: given[path]
        for path, leaf in wanted.items()
        if path in given and given[path].shape == leaf.shape
    }
    if len(kept) < len(wanted):
        key, dtype = stream(config.seed, "network"), jnp.dtype(config.model.dtype)
        if shardings is None:
            drawn = tree.flatten(base.init(network, key, dtype))
        else:  # only what is wanted, and each where it is to be
            places = tree.flatten(shardings(abstract))
            places = {path: place for path, place in places.items() if path not in kept}

            def draw(key):
                found = tree.flatten(base.init(network, key, dtype))
                return {path: found[path] for path in places}

            drawn = jax.jit(draw, out_shardings=places)(key)
        kept = drawn | kept
    return dataclasses.replace(source, config=network, params=tree.unflatten(kept), known=None)


@progress.waiting("loading the model")
def load_tuned(workdir: Path, config: Settings | None = None, mesh: Mesh | None = None) -> Tuned:
    """The tuned model of a run, from its newest checkpoint, or of what it was exported to.

    Args:
      config: settings for what follows tuning (`calibrate`, `evaluate`), instead of the run's.
      mesh: where its parameters are to lie, each read straight to its shards; all that runs the
        model runs there. It need not be the one that it was tuned on. One device if not given.

    Raises:
      FileNotFoundError: no run, no checkpoint yet, or no backbone for heads exported without one.
      ValueError: `config` describes other heads than the run's, or the heads belong to another
        backbone than the config's source gives.
    """
    if config is None:
        config = layout.load_config(workdir)
    else:
        layout.check_same_run(config, workdir)
        config = layout.as_fitted(config, workdir) or config
    where = None if mesh is None else functools.partial(sharding.shardings, mesh=mesh)
    return _loaded(workdir, config, where)


def _loaded(workdir: Path, config: Settings, where: Where | None) -> Tuned:
    load_from = _exported if artefact.is_in(workdir) else _checkpointed
    model, params, pretrained, data, step = load_from(workdir, config, where)
    if where is None:
        # All committed to the device, as restored arrays are. A mixture makes a decode's state
        # change from one call to the next, and every program compile twice.
        params = jax.device_put(params, jax.local_devices()[0])
    else:  # where most are already
        params = sharding.place(params, where(params))
    known = pretrained.identity
    heads = tree.fingerprint(params["exits"], sharding.whole)
    return Tuned(
        model=model,
        params=params,
        tokenizer=pretrained.tokenizer,
        generation=pretrained.generation,
        preprocessor=pretrained.preprocessor,
        config=config,
        workdir=workdir,
        data=data,
        identity=known,
        metadata={"backbone": str(known), "heads": heads, "step": step},
    )


# What a folder holds: the model, its parameters, the network without its exits, what is kept of the
# data, and the step.
_Read = tuple[MultiExit, base.Params, Pretrained, dict[str, Any] | None, int]


def _checkpointed(workdir: Path, config: Settings, where: Where | None) -> _Read:
    checkpoints = workdir / layout.CHECKPOINTS
    step = checkpoint.latest_step(checkpoints)
    if step is None:
        raise FileNotFoundError(f"no checkpoint in {workdir}; let launch.tune finish a save")
    saved = checkpoint.metadata(checkpoints, step)
    frozen = config.tune.train == "exits"
    pretrained = _network(config, where, weights=frozen)
    model = MultiExit(pretrained.config, exit_config(config))
    if frozen:  # or the checkpoint has the backbone, too
        check_backbone(saved["backbone"], pretrained.identity, workdir)
    like = {"params": abstract_trained(config, model)}
    if where is not None:
        like = jax.tree.map(
            lambda x, place: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place),
            like,
            where(like),
        )
    params = as_used(config, checkpoint.restore(checkpoints, like, step)[0].pop("params"))
    if not frozen:  # it is another network since
        pretrained = dataclasses.replace(pretrained, params=params["backbone"], known=None)
    params = {"backbone": pretrained.params} | params
    if saved["token_ids"]:
        params["token_ids"] = jnp.array(saved["token_ids"], jnp.int32)
    return model, params, pretrained, saved.get("data"), step


def for_tuning(config: Settings, model: MultiExit) -> MultiExit:
    """The model as it is tuned: `model.scan` runs its blocks in a loop, over stacked parameters.

    `model.remat` says what their backward pass computes again (see `DecoderConfig`).

    Raises:
      ValueError: a network that is not run so.
    """
    if not config.model.scan and config.model.remat == "none":
        return model
    asked = {"scan": config.model.scan, "remat": config.model.remat}
    try:
        return dataclasses.replace(model, config=dataclasses.replace(model.config, **asked))
    except TypeError as error:
        raise ValueError("model.scan and model.remat are for decoders") from error


def abstract_trained(config: Settings, model: MultiExit) -> base.Params:
    """The parameters that the config's recipe trains, as shapes: float32, as it keeps them."""
    trained = {"exits": model.abstract_exits()}
    if config.tune.train == "all":
        _, trained["backbone"] = base.described(for_tuning(config, model).config)
    return trained


def as_used(config: Settings, trained: base.Params) -> base.Params:
    """Trained parameters as the model has them: of the config's type, blocks one by one.

    One parameter at a time: those that the caller does not keep are gone when the next is made.
    """
    leaves, structure = jax.tree.flatten(trained)
    del trained
    for i, leaf in enumerate(leaves):
        leaves[i] = leaf.astype(config.model.dtype)
    params = jax.tree.unflatten(structure, leaves)
    if "backbone" in params and config.model.scan:
        stacks, blocks = tree.flatten(params["backbone"].pop("blocks")), {}
        del leaf, leaves
        while stacks:
            name, stack = stacks.popitem()
            blocks |= {f"{i}/{name}": stack[i] for i in range(len(stack))}
        params["backbone"]["blocks"] = tree.unflatten(blocks)
    return params


def _exported(workdir: Path, config: Settings, where: Where | None) -> _Read:
    workdir = copies.fetched(workdir)  # safetensors are read from files of this machine
    described = artefact.describe(workdir)
    beside = [workdir / name for name in ("config.json", "model.safetensors")]
    if any(path.exists() for path in beside):
        pretrained = load(str(workdir), described.dtype, where)
    elif not config.model.source:
        raise ValueError(f"{workdir / artefact.DESCRIPTION} names no backbone in config.model")
    else:
        pretrained = _network(config, where)
    if pretrained.config.reads == "tokens" and pretrained.tokenizer is None:
        raise FileNotFoundError(
            f"{pretrained.source} has no tokenizer.json, which every run on text has; put it back "
            "beside the weights, or export the run again"
        )
    model, params = artefact.attach(
        workdir, pretrained.config, pretrained.params, pretrained.identity, where
    )
    return model, params, pretrained, described.data, described.step


def export(tuned: Tuned, folder: Path, *, exits_only: bool = False) -> None:
    """Writes a new folder with the backbone, as `transformers` has it, the heads and the policy.

    It loads with `load_tuned`, and its backbone with `transformers`. It appears whole or not at
    all; with `exits_only`, it has no backbone, and goes with the one that the config names. Of
    several processes, all take part, and the first one writes.

    Raises:
      FileExistsError: there is something under that name.
      ValueError: a backbone that `transformers` has no config for, or a policy of other heads.
      OSError: the folder cannot be written.
    """
    policy, save_policy = tuned.workdir / layout.POLICY, None
    if policy.exists():
        load_policy(tuned)  # refuses one that does not fit
        save_policy = functools.partial(Path.write_bytes, data=policy.read_bytes())
    write_model(
        folder,
        tuned.model,
        tuned.params,
        tuned.backbone,
        tuned.config,
        tuned.metadata["step"],
        tuned.data,
        save_policy,
        exits_only=exits_only,
    )


def write_model(
    folder: Path,
    model: MultiExit,
    params: base.Params,
    backbone: Pretrained,
    config: Settings,
    step: int,
    data: dict[str, Any] | None,
    save_policy: Callable[[Path], Any] | None,
    *,
    exits_only: bool = False,
) -> None:
    """The body of `export`, of parts in hand.

    Args:
      save_policy: writes the policy to a path; None where there is none.

    Raises:
      as `export`.
    """
    first = jax.process_index() == 0
    new = files.new_folder(folder, last=artefact.DESCRIPTION) if first else nullcontext()
    with new as inside:
        if save_policy is not None and first:
            save_policy(inside / layout.POLICY)
        if not exits_only:
            parts = model.config, params["backbone"], backbone.tokenizer, backbone.generation
            write_backbone(inside, *parts, backbone.preprocessor)
        described = read.as_dict(config)
        artefact.write(inside, model, params, backbone.identity, described, step, data)


def load_policy(tuned: Tuned, path: Path | None = None) -> ExitPolicy | None:
    """A policy, the run's own by default; None where it is switched off.

    Raises:
      FileNotFoundError: no such file.
      ValueError: not a policy, or one fitted to other heads.
    """
    path = tuned.workdir / layout.POLICY if path is None else path
    policy = policies.load(path, exit_depths=tuned.model.exit_depths)
    if policy is not None and policy.provenance.get("heads") != tuned.metadata["heads"]:
        raise ValueError(
            f"{path} was fitted to other heads than those of step {tuned.metadata['step']} in "
            f"{tuned.workdir}; run launch.calibrate again"
        )
    return policy


def check_backbone(expected: str, found: Identity, workdir: Path) -> None:
    """Raises ValueError where heads were tuned on another network than the one loaded."""
    if not found.is_named(expected):
        raise ValueError(
            f"the heads in {workdir} were tuned on a backbone with fingerprint {expected[:12]}…, "
            f"but model.source gives {str(found)[:12]}…, by its weights or by its config; name the "
            "backbone they were tuned on, or tune again in another --workdir"
        )
