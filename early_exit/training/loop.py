"""The tuning run: data in, tuned exits and their checkpoints out, resumable at any moment.

The one idea: a run is a function of (config, data, weights). All that changes is the state and
the data iterator, saved together, so a killed run goes on bit-equal to one never killed.
"""

import functools
import math
from pathlib import Path

import jax
import jax.numpy as jnp
import optax

from early_exit import assemble, checkpoint, sharding, tree
from early_exit import feed as feeds
from early_exit.assemble import CHECKPOINTS
from early_exit.config import ConfigDict
from early_exit.data import transforms
from early_exit.data.stream import TrainingBatches
from early_exit.evaluation import exits as evaluation
from early_exit.metrics import MetricsWriter, progress
from early_exit.training import optimizer as optimizers
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
    """
    total, first = config.tune.steps, checkpoint.latest_step(workdir / CHECKPOINTS) or 0
    run = Run(config, workdir)
    size = run.feed.per_batch
    state, batches = run.state(), run.batches()
    if first:
        state, iterator_state = checkpoint.restore(workdir / CHECKPOINTS, state, first)
        batches.set_state(iterator_state)

    rows = None
    with (
        checkpoint.Saver(workdir / CHECKPOINTS, keep=config.tune.keep_checkpoints) as saver,
        MetricsWriter(workdir, resumed_step=first or None) as writer,
        progress(total * size, unit=run.feed.unit, done=first * size) as bar,
    ):

        def settle(step: int, metrics: dict) -> None:
            """Waits for a step's metrics and refuses what is not finite."""
            scalars = {name: float(value) for name, value in metrics.items()}
            if not math.isfinite(scalars["loss"] + scalars["grad_norm"]):
                raise FloatingPointError(
                    f"step {step}: the loss is {scalars['loss']} and the gradient norm "
                    f"{scalars['grad_norm']}. The last good checkpoint is kept; lower "
                    "tune.learning_rate, or look for broken text"
                )
            writer.write(step, scalars | {"learning_rate": float(run.schedule(step - 1))})
            bar.set_postfix_str(f"loss {scalars['loss']:.3f}", refresh=False)
            bar.update(size)

        unsettled = None
        for step in range(first + 1, total + 1):
            state, metrics = run.step(state, run.frozen, run.place_batch(next(batches)))
            if unsettled:  # read while this step runs
                settle(*unsettled)
            unsettled = step, metrics
            saves = step == total or step % config.tune.checkpoint_every == 0
            validates = step == total or step % config.tune.validate_every == 0
            if saves or validates:
                settle(*unsettled)
                unsettled = None
            if validates:
                rows = run.validate(state["params"])
                for row in rows:
                    name = f"exit_{row['exit']}"
                    writer.write(step, {f"validation/{k}/{name}": v for k, v in row.items()})
            if saves:  # last: a checkpoint stands for all that was written before it
                saver.save(step, state, batches.get_state(), run.metadata)
    batches.close()
    return run.validate(state["params"]) if rows is None else rows


class Run:
    """Everything of a tuning run that stays the same from its first step to its last.

    Attributes:
      frozen: the model's parameters that are not trained, placed on the mesh.
      feed: what it reads.
      step: the jitted `tune_step`; donates the state.
      metadata: what the heads belong to, saved with them: the backbone's fingerprint and, for
        reduced heads, the tokens they can predict.
    """

    def __init__(self, config: ConfigDict, workdir: Path):
        weights = steps.exit_weights(config.tune.weights, config.exits.points)
        recipe = steps.Recipe(config.tune.loss, weights, config.tune.train)
        self.config = config
        self.schedule = optimizers.learning_rate(config.tune)
        self.optimizer = optimizers.make_optimizer(config.tune)
        self.mesh = sharding.make_mesh(config.mesh)
        assemble.save_config(config, workdir)
        self.pretrained, self.model = assemble.load_backbone(config)
        self.feed = feeds.make(config, self.model.config, self.pretrained.tokenizer)
        self.metadata = self._metadata(workdir)
        tandem = recipe.train == "all"
        self.frozen = {} if tandem else self._place({"backbone": self.pretrained.params})
        if self.metadata["token_ids"]:
            ids = {"token_ids": jnp.array(self.metadata["token_ids"], jnp.int32)}
            self.frozen |= self._place(ids)
        self.step = jax.jit(
            functools.partial(
                steps.tune_step, model=self.model, recipe=recipe, optimizer=self.optimizer
            ),
            donate_argnums=0,
            out_shardings=(self._state_shardings(), sharding.replicated(self.mesh)),
        )

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
            params["backbone"] = jax.tree.map(jnp.copy, self.pretrained.params)
        if not jax.tree.leaves(params):
            raise ValueError(
                "there is nothing to tune: no exits, or embedding heads that share the backbone's "
                "output matrix; choose exits.output=own or another exits.head"
            )
        return jax.device_put(
            steps.init_state(params, self.optimizer), self._state_shardings(), donate=True
        )

    def batches(self) -> TrainingBatches:
        """The endless training data of this process."""
        return self.feed.training(self.config.seed, jax.process_index(), jax.process_count())

    def place_batch(self, batch: dict) -> dict:
        rows = sharding.batch_sharding(self.mesh)
        return {
            name: jax.make_array_from_process_local_data(rows, array)
            for name, array in batch.items()
        }

    def validate(self, params: dict) -> list[dict]:
        """A row per exit on the first held-out batches (`evaluation.exits.summary`)."""
        records = evaluation.record(
            self.model,
            self.frozen | params,
            map(self.place_batch, self._validation_batches),
        )
        return evaluation.summary(records)

    @functools.cached_property
    def _validation_batches(self) -> list[dict]:
        return list(self.feed.held_out("validation", self.config.tune.validation_batches))

    def _place(self, params: dict) -> dict:
        return jax.device_put(params, sharding.shardings(params, self.mesh))

    def _state_shardings(self) -> steps.TuneState:
        params = assemble.abstract_trained(self.config, self.model)
        init = functools.partial(steps.init_state, optimizer=self.optimizer)
        state = jax.eval_shape(init, params)
        placed, everywhere = sharding.shardings(params, self.mesh), sharding.replicated(self.mesh)
        opt_state = optax.tree_map_params(
            self.optimizer,
            lambda _, spec: spec,
            state["opt_state"],
            placed,
            transform_non_params=lambda _: everywhere,
        )
        return {"params": placed, "opt_state": opt_state, "step": everywhere}

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
