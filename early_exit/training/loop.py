"""The tuning run: text in, tuned exits and their checkpoints out, resumable at any moment.

The one idea: a run is a function of (config, text, weights). All that changes is the state and
the data iterator, saved together, so a killed run goes on bit-equal to one never killed.
"""

import functools
import math
from pathlib import Path

import jax
import jax.numpy as jnp
import optax

from early_exit import assemble, checkpoint, sharding, tree
from early_exit.assemble import CHECKPOINTS
from early_exit.config import ConfigDict
from early_exit.data import pipeline, sources, transforms
from early_exit.evaluation import exits as evaluation
from early_exit.metrics import MetricsWriter, progress
from early_exit.training import optimizer as optimizers
from early_exit.training import step as steps


def tune(config: ConfigDict, workdir: Path) -> list[dict]:
    """Tunes the exits of the config's model; returns a row per exit on the validation text.

    Goes on from the newest checkpoint in `workdir` if there is one. At the end, the last
    checkpoint there holds the tuned exits.

    Raises:
      ValueError: settings that do not fit the model, the text, the mesh or the run in `workdir`.
      FloatingPointError: the loss is not finite; the last good checkpoint is kept.
      OSError: a checkpoint cannot be written.
    """
    total, first = config.tune.steps, checkpoint.latest_step(workdir / CHECKPOINTS) or 0
    run = Run(config, workdir)
    state, batches = run.state(), run.batches()
    if first:
        state, iterator_state = checkpoint.restore(workdir / CHECKPOINTS, state, first)
        batches.set_state(iterator_state)

    rows = None
    with (
        checkpoint.Saver(workdir / CHECKPOINTS, keep=config.tune.keep_checkpoints) as saver,
        MetricsWriter(workdir, resumed_step=first or None) as writer,
        progress(total * run.tokens_per_step, done=first * run.tokens_per_step) as bar,
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
            bar.update(run.tokens_per_step)

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
                rows = run.validate(state["exits"])
                for row in rows:
                    name = f"exit_{row['exit']}"
                    writer.write(step, {f"validation/{k}/{name}": v for k, v in row.items()})
            if saves:  # last: a checkpoint stands for all that was written before it
                saver.save(step, state, batches.get_state(), run.metadata)
    batches.close()
    return run.validate(state["exits"]) if rows is None else rows


class Run:
    """Everything of a tuning run that stays the same from its first step to its last.

    Attributes:
      frozen: the model's parameters without the exits, placed on the mesh.
      step: the jitted `tune_step`; donates the state.
      metadata: what the heads belong to, saved with them: the backbone's fingerprint and, for
        reduced heads, the tokens they can predict.
    """

    def __init__(self, config: ConfigDict, workdir: Path):
        weights = steps.exit_weights(config.tune.weights, config.exits.points)
        recipe = steps.Recipe(config.tune.loss, weights)
        self.config = config
        self.schedule = optimizers.learning_rate(config.tune)
        self.optimizer = optimizers.make_optimizer(config.tune)
        self.mesh = sharding.make_mesh(config.mesh)
        assemble.save_config(config, workdir)
        self.pretrained, self.model = assemble.load_backbone(config)
        self.tokens_per_step = config.data.batch_size * config.data.sequence_length
        self.metadata = self._metadata(workdir)
        self.frozen = self._place({"backbone": self.pretrained.params})
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
        if not jax.tree.leaves(exits):
            raise ValueError(
                "these exits have no parameters to tune: an embedding head that shares the "
                "backbone's output matrix; choose exits.output=own or another exits.head"
            )
        return jax.device_put(
            steps.init_state(exits, self.optimizer), self._state_shardings(), donate=True
        )

    def batches(self) -> pipeline.TrainingBatches:
        """The endless training text of this process."""
        return pipeline.training_batches(
            sources.documents(self.config.data.source, "train"),
            seed=self.config.seed,
            process_index=jax.process_index(),
            process_count=jax.process_count(),
            **assemble.packing(self.config, self.pretrained.tokenizer),
        )

    def place_batch(self, batch: dict) -> dict:
        rows = sharding.batch_sharding(self.mesh)
        return {
            name: jax.make_array_from_process_local_data(rows, array)
            for name, array in batch.items()
        }

    def validate(self, exits: dict) -> list[dict]:
        """A row per exit on the first held-out batches (`evaluation.exits.summary`)."""
        records = evaluation.record(
            self.model,
            self.frozen | {"exits": exits},
            map(self.place_batch, self._validation_batches),
        )
        return evaluation.summary(records)

    @functools.cached_property
    def _validation_batches(self) -> list[dict]:
        return assemble.first_batches(
            self.config,
            self.pretrained.tokenizer,
            "validation",
            self.config.tune.validation_batches,
        )

    def _place(self, params: dict) -> dict:
        return jax.device_put(params, sharding.shardings(params, self.mesh))

    def _state_shardings(self) -> steps.TuneState:
        exits = self.model.abstract_exits(self.config.model.dtype)
        state = jax.eval_shape(functools.partial(steps.init_state, optimizer=self.optimizer), exits)
        placed, everywhere = sharding.shardings(exits, self.mesh), sharding.replicated(self.mesh)
        opt_state = optax.tree_map_params(
            self.optimizer,
            lambda _, spec: spec,
            state["opt_state"],
            placed,
            transform_non_params=lambda _: everywhere,
        )
        return {"exits": placed, "opt_state": opt_state, "step": everywhere}

    def _metadata(self, workdir: Path) -> dict:
        backbone = tree.fingerprint(self.pretrained.params)
        if checkpoint.latest_step(workdir / CHECKPOINTS) is not None:
            saved = checkpoint.metadata(workdir / CHECKPOINTS)
            assemble.check_fingerprint(saved["backbone"], backbone, workdir)
            return saved
        token_ids = []
        if self.config.exits.classes:
            sample = assemble.first_batches(
                self.config, self.pretrained.tokenizer, "train", self.config.data.frequency_batches
            )
            token_ids = transforms.frequent_tokens(
                sample, self.pretrained.config.vocab_size, self.config.exits.classes
            ).tolist()
        return {"backbone": backbone, "token_ids": token_ids}
