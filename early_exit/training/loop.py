"""The tuning run: data in, tuned exits and their checkpoints out, resumable at any moment.

The one idea: a run is a function of (config, data, weights). All that changes is the state and
the data iterator, saved together, so a killed run goes on bit-equal to one never killed.
"""

import contextlib
import functools
import math
from pathlib import Path

import jax
import jax.numpy as jnp

from early_exit import assemble, checkpoint, sharding, tree
from early_exit import feed as feeds
from early_exit.assemble import CHECKPOINTS
from early_exit.backbones import base
from early_exit.config import ConfigDict
from early_exit.data import transforms
from early_exit.data.stream import TrainingBatches
from early_exit.evaluation import exits as evaluation
from early_exit.metrics import MetricsWriter, progress
from early_exit.training import optimizer as optimizers
from early_exit.training import plan, preemption, states
from early_exit.training import step as steps


def tune(config: ConfigDict, workdir: Path) -> list[dict]:
    """Tunes the exits of the config's model; returns a row per exit on the validation split.

    In tandem with the backbone, or a backbone alone, where the config says so (`tune.train`). Goes
    on from the newest checkpoint in `workdir` if there is one. At the end, the last checkpoint
    there holds what was tuned.

    Raises:
      ValueError: settings that do not fit the model, the text, the mesh or the run in `workdir`.
      FloatingPointError: the loss is not finite; the last good checkpoint is kept.
      OSError: a checkpoint cannot be written.
      preemption.Preempted: asked to leave by SIGTERM; saved after the step that was running.
    """
    total, first = config.tune.steps, checkpoint.latest_step(workdir / CHECKPOINTS) or 0
    run = Run(config, workdir)
    size = run.feed.per_batch
    state, batches = run.state(), run.batches()
    if first:
        state, iterator_state = checkpoint.restore(workdir / CHECKPOINTS, state, first)
        batches.set_state(iterator_state)

    rows, first_process = None, jax.process_index() == 0
    with contextlib.ExitStack() as stack:
        asked_to_leave = stack.enter_context(preemption.watch())
        keep = config.tune.keep_checkpoints
        saver = stack.enter_context(checkpoint.Saver(workdir / CHECKPOINTS, keep=keep))
        if first_process:
            writer = stack.enter_context(MetricsWriter(workdir, resumed_step=first or None))
            bar = progress(total * size, unit=run.feed.unit, done=first * size)
            stack.enter_context(bar)

        def settle(step: int, metrics: dict) -> None:
            """Waits for a step's metrics and refuses what is not finite."""
            scalars = {name: float(value) for name, value in metrics.items()}
            if not math.isfinite(scalars["loss"] + scalars["grad_norm"]):
                raise FloatingPointError(
                    f"step {step}: the loss is {scalars['loss']} and the gradient norm "
                    f"{scalars['grad_norm']}. The last good checkpoint is kept; lower "
                    "tune.learning_rate, or look for broken text"
                )
            if not first_process:
                return
            writer.write(step, scalars | {"learning_rate": float(run.schedule(step - 1))})
            bar.set_postfix_str(f"loss {scalars['loss']:.3f}", refresh=False)
            bar.update(size)

        unsettled = None
        for step in range(first + 1, total + 1):
            state, metrics = run.step(state, run.given, run.place_batch(next(batches)))
            if unsettled:  # read while this step runs
                settle(*unsettled)
            unsettled = step, metrics
            leaves = asked_to_leave(step) and step < total
            saves = leaves or step == total or step % config.tune.checkpoint_every == 0
            validates = step == total or step % config.tune.validate_every == 0
            if saves or validates:
                settle(*unsettled)
                unsettled = None
            if validates:
                rows = run.validate(state["params"])
                for row in rows if first_process else ():
                    name = f"exit_{row['exit']}"
                    writer.write(step, {f"validation/{k}/{name}": v for k, v in row.items()})
            if saves:  # last: a checkpoint stands for all that was written before it
                saver.save(step, state, batches.get_state(), run.metadata)
            if leaves:
                batches.close()
                raise preemption.Preempted(f"asked to leave, saved after step {step} of {total}")
    batches.close()
    return run.validate(state["params"]) if rows is None else rows


class Run:
    """Everything of a tuning run that stays the same from its first step to its last.

    Attributes:
      frozen: the model's parameters that are not trained, placed on the mesh.
      given: those of them that a step gets: all, or, from cached states, no blocks.
      feed: what it reads.
      step: the jitted `tune_step`; donates the state.
      metadata: what the heads belong to, saved with them: the backbone's fingerprint and, for
        reduced heads, the tokens they can predict.
    """

    def __init__(self, config: ConfigDict, workdir: Path):
        self.config = config
        self.schedule = optimizers.learning_rate(config.tune)
        self.optimizer = optimizers.make_optimizer(config.tune)
        self.mesh = sharding.make_mesh(config.mesh)
        self.recipe = plan.recipe(config, self.mesh)
        self._share = sharding.row_share(self.mesh, config.data.batch_size)
        self._states = states.opened(config)
        assemble.save_config(config, workdir)
        self.pretrained, model = assemble.load_backbone(config)
        self.model = assemble.for_tuning(config, model)
        self.feed = feeds.make(config, self.model.config, self.pretrained.tokenizer)
        self.metadata = self._metadata(workdir)
        if self._states:
            text = self.feed.data_hash("train")
            states.check(config, self._states, self.metadata["backbone"], text)
        tandem = config.tune.train == "all"
        self.frozen = {} if tandem else self._place({"backbone": self._backbone()})
        if self.metadata["token_ids"]:
            ids = {"token_ids": jnp.array(self.metadata["token_ids"], jnp.int32)}
            self.frozen |= self._place(ids)
        self.given = states.without_blocks(self.frozen) if self._states else self.frozen
        self.step = plan.step(config, self.model, self.mesh)

    def state(self) -> steps.TuneState:
        """The state before the first step."""
        exits = self.model.init_exits(
            jax.random.key(self.config.seed),
            self.pretrained.params,
            self.config.exits.init,
            self.frozen.get("token_ids"),
        )
        params = {"exits": exits}
        if self.config.tune.train == "all":
            # A copy: the state is donated from step to step, what was loaded is not.
            params["backbone"] = jax.tree.map(jnp.copy, self._backbone())
        if not jax.tree.leaves(params):
            raise ValueError(
                "there is nothing to tune: no exits, or embedding heads that share the backbone's "
                "output matrix; choose exits.output=own or another exits.head"
            )
        params = jax.tree.map(lambda x: x.astype(jnp.float32), params)
        state = steps.init_state(params, self.optimizer)
        where = plan.state(self.config, self.model, self.mesh)
        return sharding.place(state, jax.tree.map(lambda x: x.sharding, where), donate=True)

    def batches(self) -> TrainingBatches:
        """The endless training data of this process."""
        if self._states:
            return states.batches(self.config, self._states, self._share)
        return self.feed.training(self.config.seed, *self._share)

    def place_batch(self, batch: dict) -> dict:
        return sharding.place_batch(batch, self.mesh, self.config.data.batch_size)

    def validate(self, params: dict) -> list[dict]:
        """A row per exit on the first held-out batches (`evaluation.exits.summary`)."""
        records = evaluation.record(
            self.model,
            self.frozen | steps.computing(params, self.recipe),
            map(self.place_batch, self._validation_batches),
        )
        return evaluation.summary(records)

    @functools.cached_property
    def _validation_batches(self) -> list[dict]:
        return list(self.feed.held_out("validation", self.config.tune.validation_batches))

    def _place(self, params: dict) -> dict:
        return sharding.place(params, sharding.shardings(params, self.mesh))

    def _backbone(self) -> dict:
        """What was loaded, laid out as the model runs it."""
        loaded = self.pretrained.params
        return base.stack_blocks(loaded) if self.model.config.scan else loaded

    def _metadata(self, workdir: Path) -> dict:
        backbone = tree.fingerprint(self.pretrained.params)
        if checkpoint.latest_step(workdir / CHECKPOINTS) is not None:
            saved = checkpoint.metadata(workdir / CHECKPOINTS)
            assemble.check_fingerprint(saved["backbone"], backbone, workdir)
            return saved
        token_ids = []
        if self.config.exits.classes:
            sample = self.feed.held_out("train", self.config.data.frequency_batches)
            token_ids = transforms.frequent_tokens(
                sample, self.pretrained.config.vocab_size, self.config.exits.classes
            ).tolist()
        return {"backbone": backbone, "token_ids": token_ids}
