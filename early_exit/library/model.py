"""A multi-exit model in hand: loaded, given exits, saved.

The one idea: a `Model` is a small frozen value, and every function returns a new one. Nothing is
kept anywhere but where the caller says so.
"""

import dataclasses
import functools
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from early_exit import policy as policies
from early_exit import sharding, tree
from early_exit.backbones import base
from early_exit.classifying.classify import Classifier
from early_exit.data import tokenising, transforms
from early_exit.data.parts import GIVEN
from early_exit.exits import artefact
from early_exit.exits.heads import ExitConfig
from early_exit.exits.multi_exit import MultiExit
from early_exit.policy import ExitPolicy
from early_exit.pretrained.generation import Generation
from early_exit.pretrained.load import Pretrained
from early_exit.runs import assemble, checkpoint, images, layout
from early_exit.settings.read import changed, read
from early_exit.settings.sections import DataSettings, MeshSettings, Settings, TuneSettings
from early_exit.storage import buckets

# Of a network that was not tuned.
_NO_DATA = {"source": f"{GIVEN}nothing"}


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class Model:
    """A network with exits, and when to leave at them.

    `load` and `attach` make one, `tune` and `calibrate` return another one. With a changed part, as
    in `dataclasses.replace(model, policy=None)`, which runs at full depth, it is another one too.

    Attributes:
      static: what it is made of, without arrays: hashable, safe to close a `jax.jit` over.
      backbone: the network without its exits: its config, parameters and tokenizer.
      heads: the parameters of the exits, by the block that each stands after, as text.
      token_ids: int32 [R], the tokens that reduced heads predict; None where they predict all.
      policy: when to leave; None where nothing has been calibrated, and all blocks are run.
      settings: of the run, or the calls, that made it.
      data: what is kept of the data that it was tuned on, such as the names of the classes.
      step: how many steps its exits have been tuned.

    Example:
      >>> tuned.points, tuned.depth, tuned.policy
      ((2, 4), 6, None)
      >>> dataclasses.replace(tuned, policy=ee.make_policy([0.9, 0.8])).policy.confidence
      'max_prob'
    """

    static: MultiExit
    backbone: Pretrained
    heads: base.Params
    token_ids: jax.Array | None
    policy: ExitPolicy | None
    settings: Settings
    data: Mapping[str, Any] | None = None
    step: int = 0

    @classmethod
    def of(
        cls,
        config: base.BackboneConfig,
        params: base.Params,
        tokenizer: Any = None,
        *,
        stop_ids: Sequence[int] = (),
    ) -> "Model":
        """A network of one's own, without exits yet.

        Args:
          config: describes and builds it (`early_exit.backbones.base.BackboneConfig`).
          params: its parameters, as `config.build` has them.
          tokenizer: a `transformers` fast tokenizer, for texts.
          stop_ids: tokens that end an answer.

        Raises:
          ValueError: a network without an output matrix.

        Example:
          >>> from early_exit.backbones import base
          >>> params = base.init(model.static.config, jax.random.key(0))
          >>> ee.Model.of(model.static.config, params, model.tokenizer).points
          ()
        """
        source, generation = f"{GIVEN}network", Generation(tuple(sorted(stop_ids)))
        network = Pretrained(config, params, tokenizer, source, generation)
        dtype = str(jax.tree.leaves(params)[0].dtype)
        settings = _settings({"source": source, "dtype": dtype}, config)
        return cls(MultiExit(config, ExitConfig(())), network, {}, None, None, settings)

    def __repr__(self) -> str:
        exits = self.static.exits
        after = f"{exits.head} exits after {exits.points}" if exits.points else "no exits"
        if exits.recurrent_taps:
            after += f", a recurrent exit that reads {exits.recurrent_taps}"
        leaving = f"leaves by {self.policy.confidence}" if self.policy else "no policy"
        return f"Model({self.backbone.source!r}, {self.depth} blocks, {after}, {leaving})"

    @property
    def params(self) -> base.Params:
        """All arrays, nested dicts: `backbone`, `exits` and, for reduced heads, `token_ids`."""
        reduced = {} if self.token_ids is None else {"token_ids": self.token_ids}
        return {"backbone": self.backbone.params, "exits": self.heads, **reduced}

    @property
    def tokenizer(self) -> Any:
        """A `transformers` fast tokenizer; None where there is none."""
        return self.backbone.tokenizer

    @property
    def stop_ids(self) -> list[int]:
        """Tokens that end an answer."""
        return list(self.backbone.generation.stop_ids)

    @property
    def points(self) -> tuple[int, ...]:
        """The blocks (from 1) after which there are exits."""
        return self.static.exits.points

    @property
    def depth(self) -> int:
        """How many blocks there are."""
        return self.static.config.depth

    @property
    def classes(self) -> tuple[str, ...]:
        """What a classifier's answers are called; numbers where nobody has said."""
        named = (self.data or {}).get("classes")
        return tuple(named or map(str, range(self.static.config.num_classes)))

    @functools.cached_property
    def metadata(self) -> dict[str, Any]:
        """What anything derived from it is marked with; reads every weight, the first time."""
        heads = tree.fingerprint(self.heads, sharding.whole)
        return {"backbone": str(self.backbone.identity), "heads": heads, "step": self.step}

    @functools.cached_property
    def classifier(self) -> Classifier:
        """What answers inputs by its policy; it keeps the programs of one row alone."""
        return Classifier(self.static, self.params, self.policy)


def load(
    source: str | Path,
    *,
    dtype: str = "float32",
    changes: Mapping[str, Any] | None = None,
    mesh: Mapping[str, int] | None = None,
) -> Model:
    """A model from a run's folder, from what was exported or saved, or a pretrained network.

    Args:
      source: the folder of a run or of a saved model, with its exits and its policy; or pretrained
        weights without exits: a folder (safetensors and `config.json`), a `.gguf` file, a hub id
        `org/name`, or a package `pip:NAME==VERSION#sha256=…`.
      dtype: what pretrained weights are computed in: `float32`, `bfloat16` or `float16`.
      changes: what pretrained weights leave open, such as `{"num_classes": 5}` of an encoder; what
        that adds is drawn at random.
      mesh: how all devices share the model, as `{"tensor": 8}` (`launch.inspect --settings`,
        section `mesh`): weights are read straight to their shards, and all that is done with the
        model is done there. None for one device.

    Raises:
      FileNotFoundError, RuntimeError: the source cannot be had.
      ValueError: it is damaged, of a kind that is not known, its parts do not belong together, or a
        mesh that does not use exactly the devices that there are.

    Example:
      >>> model = ee.load(folder)
      >>> model.depth, model.points
      (6, ())
    """
    folder, axes = buckets.place(source), MeshSettings(**mesh or {})
    on = None if mesh is None else sharding.make_mesh(axes)
    if artefact.is_in(folder) or checkpoint.latest_step(folder / layout.CHECKPOINTS) is not None:
        tuned = assemble.load_tuned(folder, mesh=on)
        calibrated = (folder / layout.POLICY).exists()
        model = of_run(tuned, assemble.load_policy(tuned) if calibrated else None)
        if mesh is None:
            return model
    else:
        given = {"source": str(source), "dtype": dtype, "changes": dict(changes or {})}
        model = network(given, on)
    return dataclasses.replace(model, settings=dataclasses.replace(model.settings, mesh=axes))


def network(given: Mapping[str, Any], mesh: Mesh | None = None) -> Model:
    """The network that settings of the section `model` name, without exits.

    Args:
      mesh: where its parameters are to lie; on one device if not given.

    Raises:
      as `load`.
    """
    where = None if mesh is None else functools.partial(sharding.shardings, mesh=mesh)
    pretrained, static = assemble.load_backbone(read({"model": given, "data": _NO_DATA}), where)
    if mesh is None:
        params = beside(pretrained.params, pretrained.params)
        pretrained = dataclasses.replace(pretrained, params=params)
    return Model(static, pretrained, {}, None, None, _settings(given, static.config))


def beside(model: base.Params, arrays: Any) -> Any:
    """A tree of arrays where a model's parameters are: on their mesh, or their one device.

    Committed to it: a mixture makes programs compile twice.
    """
    mesh = sharding.mesh_of(model)
    if mesh is None:
        return jax.device_put(arrays, jax.local_devices()[0])
    return sharding.place(arrays, sharding.shardings(arrays, mesh))


def _settings(model: Mapping[str, Any], network: base.BackboneConfig) -> Settings:
    """Of a network without exits, with rows that it has positions for."""
    longest = getattr(network, "context_length", None) or DataSettings.sequence_length
    length = min(longest, DataSettings.sequence_length)
    found = read({"model": model, "data": {**_NO_DATA, "sequence_length": length}})
    return images.settled(found) if network.reads == "images" else found


def of_run(tuned: assemble.Tuned, policy: ExitPolicy | None) -> Model:
    """The model of a run's folder."""
    return Model(
        static=tuned.model,
        backbone=tuned.backbone,
        heads=tuned.params["exits"],
        token_ids=tuned.params.get("token_ids"),
        policy=policy,
        settings=tuned.config,
        data=tuned.data,
        step=tuned.metadata["step"],
    )


def attach(
    model: Model,
    exits: ExitConfig | Sequence[int],
    *,
    init: str = "copy",
    token_ids: Sequence[int] | None = None,
    seed: int = 0,
) -> Model:
    """The model with new exits in place of those it has, not tuned yet, and without a policy.

    Args:
      exits: where they are and what their heads are made of, as
        `ExitConfig((8, 22, 28), head="mlp")`; or the blocks alone, each in 1 … depth − 1.
      init: the heads' first weights: `copy`, from the backbone where it has the like, or `random`.
      token_ids: which tokens heads with `ExitConfig.classes` predict (`frequent_tokens`).
      seed: of what is drawn.

    Raises:
      ValueError: exits that do not fit the network, an unknown `init`, parts of heads for which the
        backbone has nothing to copy, or `token_ids` for another number of classes.

    Example:
      >>> exits = ee.ExitConfig((2, 4), head="norm", output="shared")
      >>> ee.attach(model, exits).points
      (2, 4)
    """
    if not isinstance(exits, ExitConfig):
        exits = ExitConfig(tuple(exits))
    static = MultiExit(model.static.config, exits)
    if exits.classes and token_ids is None:
        raise ValueError(
            f"heads of {exits.classes} classes need to know which tokens these are; give "
            f"token_ids=frequent_tokens(model, texts, {exits.classes})"
        )
    ids = None if token_ids is None else jnp.asarray(token_ids, jnp.int32)
    heads = static.first_exits(seed, model.backbone.params, init, ids)
    heads, ids = (beside(model.backbone.params, x) for x in (heads, ids))
    named = {f"exits.{name}": value for name, value in dataclasses.asdict(exits).items()}
    fresh = dataclasses.replace(model.settings, tune=TuneSettings())  # its weights were of others
    return Model(
        static=static,
        backbone=model.backbone,
        heads=heads,
        token_ids=ids,
        policy=None,
        settings=changed(fresh, named | {"exits.init": init, "seed": seed}),
        data=model.data,
    )


def frequent_tokens(model: Model, texts: Iterable[str], count: int) -> np.ndarray:
    """The tokens that occur most often in some texts: what reduced heads are to predict.

    A head over 4096 of 49152 tokens costs a twelfth of one over all of them.

    Args:
      texts: read once.
      count: how many tokens.

    Returns:
      int32 [count], the most frequent first; where a token never occurs, by its number.

    Raises:
      ValueError: no tokenizer, or a count above the vocabulary.

    Example:
      >>> ids = ee.frequent_tokens(model, texts, 16)
      >>> ee.attach(model, ee.ExitConfig((3,), classes=16), token_ids=ids).params["token_ids"].shape
      (16,)
    """
    encode = tokenising.as_text(tokenising.needed(model.tokenizer))
    rows = (np.array([encode(text)], np.int32) for text in texts)
    batches = ({"tokens": row, "documents": np.ones_like(row)} for row in rows)
    return transforms.frequent_tokens(batches, model.static.config.vocab_size, count)


def save(model: Model, folder: str | Path, *, exits_only: bool = False) -> Path:
    """Writes a new folder with the network as `transformers` has it, the exits and the policy.

    `load` reads it, as every command does that takes `--workdir`. It appears whole or not at all.

    Args:
      exits_only: leave the network out; `load` then takes it from where it came from.

    Returns:
      the folder.

    Raises:
      FileExistsError: there is something under that name.
      ValueError: a network that `transformers` has no config for, or a policy of other exits.
      OSError: the folder cannot be written.

    Example:
      >>> saved = ee.save(tuned, folder_to_be)
      >>> ee.load(saved).points == tuned.points
      True
    """
    assemble.write_model(
        buckets.place(folder),
        model.static,
        model.params,
        model.backbone,
        model.settings,
        model.step,
        dict(model.data) if model.data is not None else None,
        None if (policy := model.policy) is None else _saving(model, policy),
        exits_only=exits_only,
    )
    return buckets.place(folder)


def _saving(model: Model, policy: ExitPolicy) -> Callable[[Path], Any]:
    """Writes the policy to a path."""
    return functools.partial(policies.save, _marked(model, policy))


def _marked(model: Model, policy: ExitPolicy) -> ExitPolicy:
    """The model's policy, saying which heads it is for.

    Raises:
      ValueError: it was fitted to others.
    """
    stated, heads = policy.provenance, model.metadata["heads"]
    policy.check(model.static.exit_depths, model.static.confidences)
    if stated.get("heads", heads) != heads:
        raise ValueError("the policy was fitted to other heads than the model's; calibrate again")
    return dataclasses.replace(policy, provenance={**stated, "heads": heads})
