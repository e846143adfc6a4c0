"""The tuning run: data in, tuned exits and their checkpoints out, resumable at any moment.

The one idea: a run is a function of (config, data, weights). All that changes is the state and
the data iterator, saved together, so a killed run goes on bit-equal to one never killed. With
another number of processes or devices it goes on equal to rounding: they sum in another order.
"""

import contextlib
import dataclasses
import functools
import math
from collections.abc import Callable, Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
from absl import logging

from early_exit import sharding
from early_exit.backbones import base
from early_exit.data import feed as feeds
from early_exit.data import transforms
from early_exit.data.stream import Rank, TrainingBatches
from early_exit.distillation import hidden_states
from early_exit.evaluation import drafts
from early_exit.evaluation import exits as evaluation
from early_exit.exits.multi_exit import MultiExit
from early_exit.pretrained.load import Pretrained
from early_exit.runs import assemble, checkpoint, images, layout, lock
from early_exit.runs.layout import CHECKPOINTS
from early_exit.runs.progress import Progress, waiting
from early_exit.settings.read import changed
from early_exit.settings.sections import Settings
from early_exit.training import fitting, keeping, pace, plan, preemption
from early_exit.training import optimizer as optimizers
from early_exit.training import step as steps


@dataclasses.dataclass(frozen=True)
class Given:
    """A model and data in hand, in place of those that the settings name.

    Attributes:
      pretrained: the network. Its arrays stay the caller's.
      exits: the heads to begin with.
      token_ids: what reduced heads predict; empty for all tokens.
      feed: training data, and held-out data where the run is to validate.
      validates: whether there is held-out data.
      told: called after each step with its number and its metrics.
      shows: whether to show progress.
    """

    pretrained: Pretrained
    exits: base.Params
    token_ids: Sequence[int]
    feed: feeds.Feed
    validates: bool
    told: Callable[[int, dict[str, float]], None] | None = None
    shows: bool = True


def tune(
    config: Settings,
    workdir: Path,
    profile: tuple[int, int] | None = None,
    tell: Callable[[str], None] = lambda _: None,
) -> list[dict]:
    """Tunes the exits of the config's model; returns what `Run.validate` says of them.

    Jointly with the backbone, or a backbone alone, where the config says so (`tune.train`). Goes
    on from the newest checkpoint in `workdir` if there is one. At the end, the last checkpoint
    there holds what was tuned.

    Args:
      profile: the first and the last step to trace with `jax.profiler`, into `tensorboard/`.
      tell: is told how long the steps will take, where they are fitted to that (`tune.minutes`).

    Raises:
      ValueError: settings that do not fit the model, the text, the mesh or the run in `workdir`,
        data without a split that is needed later, steps to trace that are not run, or a place that
        keeps no checkpoints.
      RuntimeError: another command is at work in `workdir`; or the step was compiled more than
        once, which on a pod costs more than it trains.
      FloatingPointError: the loss or a gradient is not finite; the last good checkpoint is kept,
        and the batch beside it (see `replay`).
      OSError: a checkpoint cannot be written.
      preemption.Preempted: asked to leave by SIGTERM; saved after the step that was running, or
        nothing to save yet.
    """
    checkpoint.check_place(workdir)
    with preemption.watch() as leaving:
        config = images.settled(config)  # which reads files, before there is a folder
        with lock.held(workdir) as own:
            kept = keeping.InFolder(workdir, own)
            _, _, rows = _tune(config, workdir, kept, leaving, profile, tell=tell)
    return rows


def tune_given(
    config: Settings, given: Given, workdir: Path | None = None
) -> tuple[base.Params, Settings]:
    """The same of a model and data in hand; returns what was trained, and the settings of the run.

    They are those given but for `tune.steps`, where `tune.minutes` leaves no time for all.

    Args:
      config: what `given` does not replace.
      workdir: where the run is kept, and goes on from; None keeps nothing.

    Raises:
      as `tune`.
    """
    if workdir is None:
        leaving = preemption.Watch(distributed=False)  # signals are the caller's
        params, config, _ = _tune(config, None, keeping.Nothing(), leaving, None, given)
    else:
        checkpoint.check_place(workdir)
        with preemption.watch() as leaving, lock.held(workdir) as own:
            kept = keeping.InFolder(workdir, own)
            params, config, _ = _tune(config, workdir, kept, leaving, None, given)
    return assemble.as_used(config, params), config


def _tune(
    config: Settings,
    workdir: Path | None,
    kept: keeping.Nothing,
    leaving: preemption.Watch,
    profile: tuple[int, int] | None,
    given: Given | None = None,
    tell: Callable[[str], None] = lambda _: None,
) -> tuple[base.Params, Settings, list[dict]]:
    """(what was trained, the settings of the run, what the last validation says)."""
    if kept.first:  # with as many steps as it began with
        config = layout.as_fitted(config, workdir) or config
    total, first = config.tune.steps, kept.first
    if profile and not first < profile[0] <= profile[1] <= total:
        raise ValueError(
            f"the steps to profile, {profile[0]}:{profile[1]}, do not rise, or are not among those "
            f"that are to be run: {f'{first + 1} to {total}' if first < total else 'none are left'}"
        )
    fits = bool(config.tune.minutes) and not first
    if workdir is not None and not fits:
        layout.save_config(config, workdir)
    with waiting("loading the model and the data"):
        run = Run(config, workdir, given)
        run.check_splits()
    rows, first_process = None, jax.process_index() == 0
    with contextlib.ExitStack() as stack:
        size, batches = run.feed.per_batch, run.batches()
        stack.callback(batches.close)  # or its threads go on, whatever ends the run
        if (state := kept.restored(run.like(), batches)) is None:
            state = run.state()
        run.loaded = None
        if fits:
            config = run.fit(state, tell)
            total = config.tune.steps
            if workdir is not None:
                layout.save_config(config, workdir)
        kept.opened(stack, config.tune.keep_checkpoints)
        shows = first_process and (given is None or given.shows)
        done = first * size
        bar = Progress(total * size, run.feed.unit, done=done, description="tuning")
        if shows:
            stack.enter_context(bar)

        def settle(step: int, metrics: dict, batch: dict, lap: dict | None) -> None:
            """Waits for a step's metrics and refuses what is not finite.

            Args:
              lap: `pace.Pace.lap`, if the step had ended before it came to this.
            """
            scalars = {name: float(value) for name, value in metrics.items()}
            if not math.isfinite(scalars["loss"] + scalars["grad_norm"]):
                raise FloatingPointError(
                    f"step {step}: the loss is {scalars['loss']} and the gradient norm "
                    f"{scalars['grad_norm']}. {kept.keep(step, batch)}; then lower "
                    "tune.learning_rate, or look for broken data"
                )
            if not first_process:
                return
            # An exit that was left out at this step has no loss.
            known = {name: x for name, x in scalars.items() if not math.isnan(x)}
            known |= {"learning_rate": float(run.schedule(step - 1))}
            kept.write(step, known)
            kept.write_speed(step, lap or clock.lap())
            if given is not None and given.told is not None:
                given.told(step, known)
            if shows:
                bar.update(size, f"loss {scalars['loss']:.3f}")

        trace = stack.enter_context(contextlib.ExitStack())
        unsettled, clock = None, None
        leaving.begin()
        for step in range(first + 1, total + 1):
            batch = run.place_batch(next(batches))
            clock = clock or run.clock(state, batch)
            if profile and step == profile[0]:
                if unsettled:  # no step but those asked for
                    settle(*unsettled)
                    unsettled = None
                trace.enter_context(kept.trace())
            with jax.profiler.StepTraceAnnotation("tune", step_num=step):
                state, metrics = run.step(state, run.given, batch)
            # Where steps are not run behind this one's back, as on a CPU, it has ended by now.
            lap = clock.lap() if metrics["loss"].is_ready() else None
            if unsettled:  # read while this step runs
                settle(*unsettled)
            unsettled = step, metrics, batch, lap
            leaves = leaving.asked(step) and step < total
            saves = leaves or step == total or step % config.tune.checkpoint_every == 0
            validates = step == total or step % config.tune.validate_every == 0
            traced = profile is not None and step == profile[1]
            if saves or validates or traced:
                settle(*unsettled)
                unsettled = None
            if traced:
                trace.close()
            if validates:
                rows = run.validate(state["params"])
                for row in rows if first_process else ():
                    kind = next(iter(row))
                    name = f"{kind}_{row[kind]}"
                    kept.write(step, {f"validation/{k}/{name}": v for k, v in row.items()})
            if saves:  # last: a checkpoint stands for all that was written before it
                kept.save(step, state, batches, run.metadata)
            if saves or validates:
                run.check_compiled_once(step)
            if saves or validates or traced:
                clock.start()
            if leaves:
                raise preemption.Preempted(f"asked to leave, saved after step {step} of {total}")
        rows = run.validate(state["params"]) if rows is None else rows
    return state["params"], config, rows


class Run:
    """Everything of a tuning run that stays the same from its first step to its last.

    Attributes:
      loaded: the backbone before the first step, placed on the mesh. Drop it when the state is
        there, or a trained backbone is there twice.
      frozen: the model's parameters that are not trained, placed on the mesh.
      given: those of them that a step gets: all, or, from cached states, no blocks.
      feed: what it reads.
      step: the jitted `tune_step`; donates the state.
      metadata: what the heads belong to, saved with them: the backbone's fingerprint, what the
        data was (`data.feed.About`) and, for reduced heads, the tokens they can predict.
    """

    def __init__(self, config: Settings, workdir: Path | None, given: Given | None = None):
        self.config = config
        self.schedule = optimizers.learning_rate(config.tune)
        self.mesh = sharding.make_mesh(config.mesh)
        network = given.pretrained if given else assemble.abstract_model(config)
        self.recipe = plan.recipe(config, self.mesh, network.config)
        self._rank = Rank(*sharding.row_rank(self.mesh, config.data.batch_size))
        self._states = hidden_states.opened(config)
        self._in_hand = given
        pretrained, model = self._network()
        self.model = assemble.for_tuning(config, model)
        if given is None:
            known = layout.kept_data(workdir) or layout.data_of_source(config)
            self.feed = feeds.make(config, self.model.config, pretrained.tokenizer, known)
        else:
            self.feed = given.feed
        self.metadata = self._metadata(workdir, pretrained)
        if self._states:
            text = self.feed.data_hash("train")
            hidden_states.check(config, self._states, pretrained.identity, text)
        self.loaded = self._as_run(pretrained.params)
        self.frozen = {} if config.tune.train == "all" else {"backbone": self.loaded}
        if self.metadata["token_ids"]:
            ids = {"token_ids": jnp.array(self.metadata["token_ids"], jnp.int32)}
            self.frozen |= self._place(ids)
        self.given = hidden_states.without_blocks(self.frozen) if self._states else self.frozen
        self.step = plan.step(config, self.model, self.mesh)

    def fit(self, state: steps.TuneState, tell: Callable[[str], None]) -> Settings:
        """Leaves out the steps that `tune.minutes` has no time for; returns the settings since.

        Args:
          state: before the first step; it stays as it is.
          tell: is told how long the steps will take.
        """
        tune, batches = self.config.tune, self.batches()
        try:
            batch = self.place_batch(next(batches))
        finally:
            batches.close()  # the run begins with these batches, too
        with waiting("timing a step"):
            seconds = fitting.seconds_of(lambda state: self.step(state, self.given, batch), state)
        left = fitting.steps_for(tune, seconds)
        tell(fitting.told(tune, seconds, left))
        if left < tune.steps:  # another schedule, and so another program
            self.config = changed(self.config, {"tune.steps": left})
            self.schedule = optimizers.learning_rate(self.config.tune)
            self.step = plan.step(self.config, self.model, self.mesh)
        return self.config

    def _network(self) -> tuple[Pretrained, MultiExit]:
        """The network, placed on the mesh, and the multi-exit model of it."""
        where = functools.partial(sharding.shardings, mesh=self.mesh)
        if self._in_hand is None:
            return assemble.load_backbone(self.config, where)
        pretrained = self._in_hand.pretrained
        params = pretrained.params
        if self.config.tune.train == "all":  # the state is donated, and these are the caller's
            params = jax.tree.map(jnp.copy, params)
        placed = dataclasses.replace(pretrained, params=sharding.place(params, where(params)))
        return placed, MultiExit(pretrained.config, assemble.exit_config(self.config))

    def like(self) -> steps.TuneState:
        """The state as shapes with shardings."""
        return plan.state(self.config, self.model, self.mesh)

    def _first_exits(self) -> base.Params:
        """The heads before the first step."""
        if self._in_hand is not None:
            return jax.tree.map(jnp.copy, self._in_hand.exits)
        backbone = self.loaded
        if self.model.config.scan:
            read = {point - 1 for point in (*self.model.exits.points, self.model.config.depth)}
            backbone = base.unstack_blocks(backbone, read)
        return self.model.first_exits(
            self.config.seed,
            backbone,
            self.config.exits.init,
            self.frozen.get("token_ids"),
        )

    def state(self) -> steps.TuneState:
        """The state before the first step; a trained backbone is in it as `loaded`, not copied."""
        params = {"exits": self._first_exits()}
        if self.config.tune.train == "all":
            params["backbone"] = self.loaded
        if not jax.tree.leaves(params):
            raise ValueError(
                "there is nothing to tune: no exits, or embedding heads that share the backbone's "
                "output matrix; choose exits.output=own or another exits.head"
            )
        params = jax.tree.map(lambda x: x.astype(jnp.float32), params)
        state = steps.init_state(params, optimizers.make_optimizer(self.config.tune))
        where = jax.tree.map(lambda x: x.sharding, self.like())
        return sharding.place(state, where, donate=True)

    def batches(self) -> TrainingBatches:
        """The endless training data of this process."""
        if self._states:
            return hidden_states.training_batches(
                self._states,
                self.model.exits.observed,
                batch_size=self.config.data.batch_size,
                seed=self.config.seed,
                rank=self._rank,
            )
        return self.feed.training(self.config.seed, self._rank)

    def place_batch(self, batch: dict) -> dict:
        return sharding.place_batch(batch, self.mesh, self.config.data.batch_size)

    def clock(self, state: steps.TuneState, batch: dict) -> pace.Pace:
        """For steps like this one, which may be about to run for the first time."""
        utilised, devices = None, list(self.mesh.devices.flat)
        if (told := pace.unknown(devices)) and not jax.process_index():
            logging.warning("%s", told)
        if peak := pace.peak(devices):
            # The step is traced in any case, and only once.
            utilised = pace.flops(self.step.trace(state, self.given, batch)) / peak
        return pace.Pace(self.feed.unit, self.feed.per_batch, utilised)

    def check_compiled_once(self, step: int) -> None:
        programs = self.step._cache_size()
        if programs > 1:
            raise RuntimeError(
                f"by step {step} the tuning step has been compiled {programs} times: batches, or "
                "the state, changed their shape, type or place on the way. The data source must "
                "give batches that are alike; if it does, please report this"
            )

    def validate(self, params: dict) -> list[dict]:
        """On the first held-out batches: a row per exit, and per step of a recurrent one.

        See `evaluation.exits.summary` and `evaluation.drafts.summary`. None where no held-out data
        was given.
        """
        if not self._validates:
            return []
        params = self.frozen | steps.computing(params, self.recipe)
        batches = [self.place_batch(batch) for batch in self._validation_batches]
        rows = evaluation.summary(evaluation.record(self.model, params, batches))
        if self.model.exits.recurrent_taps:
            rows += drafts.summary(drafts.record(self.model, params, batches))
        return rows

    def check_splits(self) -> None:
        """Asks for the data that is needed later, so that nothing is trained before it is missed.

        Raises:
          ValueError: a split to validate, or to calibrate exits, on is empty or has no full row.
        """
        if self._validates:
            _ = self._validation_batches  # kept for every validation
        if self.model.head_names and self._in_hand is None:
            list(self.feed.calibration(1))

    @property
    def _validates(self) -> bool:
        return self._in_hand is None or self._in_hand.validates

    @functools.cached_property
    def _validation_batches(self) -> list[dict]:
        count = self.config.tune.validation_batches
        return list(self.feed.held_out("validation", count, self._rank))

    def _place(self, params: dict) -> dict:
        return sharding.place(params, sharding.shardings(params, self.mesh))

    def _as_run(self, loaded: base.Params) -> base.Params:
        """Laid out as the model runs it."""
        if not self.model.config.scan:
            return loaded
        _, shapes = base.described(self.model.config)
        return base.stack_blocks(loaded, sharding.shardings(shapes, self.mesh))

    def _metadata(self, workdir: Path | None, pretrained: Pretrained) -> dict:
        if workdir and checkpoint.latest_step(workdir / CHECKPOINTS) is not None:
            saved = checkpoint.metadata(workdir / CHECKPOINTS)
            if self.config.tune.train == "exits":  # or the checkpoint has the backbone, too
                assemble.check_backbone(saved["backbone"], pretrained.identity, workdir)
            return saved | {"data": self._data(saved.get("data"), workdir)}
        token_ids = list(self._in_hand.token_ids) if self._in_hand else []
        if self.config.exits.classes and not token_ids:
            sample = self.feed.held_out("train", self.config.data.frequency_batches)
            token_ids = transforms.frequent_tokens(
                sample, self.model.config.vocab_size, self.config.exits.classes
            ).tolist()
        return {
            "backbone": str(pretrained.identity),
            "token_ids": token_ids,
            "data": self.feed.about(),
        }

    def _data(self, before: dict | None, workdir: Path) -> dict:
        """What today's data is, which must be what the run began with."""
        now = self.feed.about()
        if before is None:
            layout.tell_no_data_kept(workdir, self.model.config)
        elif now != before:
            raise ValueError(
                f"{self.config.data.source} is not what the run in {workdir} began with; put it "
                "back as it was, or use another --workdir"
            )
        return now
