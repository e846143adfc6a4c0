"""Does tuning pay for the heads alone? Time and memory of one step, SmolLM2-135M, float32.

    python -m experiments.tuning_step.run            # about eight minutes on 2 cores
    python -m experiments.tuning_step.run --check    # exits 1 if a bar falls short

Time: the step, of three exits and of a recurrent one with three steps unrolled, beside its two
parts run apart, the backbone's forward pass and the heads' forward and backward pass; and an epoch
of a run from cached hidden states beside one with the backbone; all in turns, medians over rounds.
Memory: what XLA allocates for temporaries (`memory_analysis`), which is exact.
"""

import functools
import tempfile
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from configs import smollm2_recurrent
from configs.smollm2_135m import SOURCE, get_config
from early_exit import sharding
from early_exit.backbones import base
from early_exit.backbones.decoder import DecoderConfig
from early_exit.distillation import hidden_states
from early_exit.exits.heads import ExitConfig
from early_exit.exits.multi_exit import MultiExit
from early_exit.pretrained.load import load
from early_exit.runs import assemble
from early_exit.runs.metrics import table
from early_exit.settings.read import changed, read
from early_exit.settings.sections import Settings
from early_exit.training import loop, plan
from early_exit.training import step as steps
from early_exit.training.observe import observe
from early_exit.training.optimizer import make_optimizer
from early_exit.training.recipe import Recipe
from early_exit.training.schedule import ExitWeights
from experiments import bars

ROWS, LENGTH = 4, 512


def main(argv):
    del argv
    pretrained, rounds = load(SOURCE), 2 if bars.QUICK.value else 5
    times = {
        "three exits": _times(pretrained, read(get_config()), rounds),
        "recurrent exit": _times(pretrained, read(smollm2_recurrent.get_config()), rounds),
    }
    ratios = {
        name: float(np.median(np.array(of["step"]) / (np.array(of["backbone"]) + of["heads"])))
        for name, of in times.items()
    }
    seconds = [
        (name, *[float(np.median(taken)) for taken in of.values()], ratios[name])
        for name, of in times.items()
    ]
    header = ("seconds", *times["three exits"], "step ÷ the others")
    print(table(seconds, header=header))

    memory = {
        (exits, vocabulary): _temporary_bytes(pretrained.config, exits, vocabulary)
        for exits, vocabulary in ((1, 49152), (8, 49152), (1, 12288), (1, 98304))
    }
    epochs, cache = _epochs(rounds=2 if bars.QUICK.value else 5)
    faster = np.median(np.array(epochs["backbone"]) / np.array(epochs["cached states"]))
    print()
    shown = [(name, float(np.median(seconds))) for name, seconds in epochs.items()]
    print(table(shown, header=(f"epoch of {cache['tokens']} tokens", "seconds")))
    print(f"cached states: {cache['bytes_per_token']:.0f} bytes per token")
    rows = [(exits, vocabulary, size / 2**20) for (exits, vocabulary), size in memory.items()]
    print()
    print(table(rows, header=("norm exits", "vocabulary", "temporaries, MiB")))
    bars.conclude(
        {"seconds": times, "epochs": epochs, "cache": cache, "temporary_mib": rows},
        [
            *[
                bars.Bar(f"{name}: step ÷ (backbone forward + heads)", ratio, limit)
                for (name, ratio), limit in zip(ratios.items(), (1.1, 1.15), strict=True)
            ],
            bars.Bar("epoch with the backbone ÷ cached", float(faster), 3.0, at_least=True),
            bars.Bar("temporaries, 8 norm exits ÷ 1", memory[8, 49152] / memory[1, 49152], 1.25),
            bars.Bar(
                "temporaries, vocabulary 98304 ÷ 12288", memory[1, 98304] / memory[1, 12288], 1.02
            ),
        ],
    )


def _batch(vocab_size: int) -> dict:
    tokens = np.random.default_rng(0).integers(0, vocab_size, (ROWS, LENGTH))
    return {
        "tokens": jnp.array(tokens, jnp.int32),
        "documents": jnp.ones((ROWS, LENGTH), jnp.int32),
        "positions": jnp.broadcast_to(jnp.arange(LENGTH), (ROWS, LENGTH)),
    }


def _times(pretrained, config: Settings, rounds: int) -> dict[str, list[float]]:
    """Seconds of a config's step and of its parts."""
    model = MultiExit(pretrained.config, assemble.exit_config(config))
    recipe = plan.recipe(config, sharding.make_mesh(config.mesh), pretrained.config)
    optimizer = make_optimizer(config.tune)
    frozen = {"backbone": pretrained.params, "token_ids": jnp.arange(model.exits.classes)}
    exits = model.init_exits(jax.random.key(0), pretrained.params, "copy", frozen["token_ids"])
    batch = _batch(pretrained.config.vocab_size)
    settings = {"model": model, "recipe": recipe}
    run_backbone = jax.jit(functools.partial(observe, **settings))
    heads = jax.jit(
        jax.value_and_grad(functools.partial(steps.heads_loss, step=0, **settings), has_aux=True)
    )
    step = jax.jit(functools.partial(steps.tune_step, optimizer=optimizer, **settings))
    state, observed = steps.init_state({"exits": exits}, optimizer), run_backbone(frozen, batch)
    cases = {
        "step": lambda: step(state, frozen, batch),
        "backbone": lambda: run_backbone(frozen, batch),
        "heads": lambda: heads(exits, frozen, observed),
    }
    times = {name: [] for name in cases}
    for index in range(rounds + 1):  # the first round compiles
        for name, case in cases.items():
            began = time.perf_counter()
            jax.block_until_ready(case())
            if index:
                times[name].append(time.perf_counter() - began)
    return times


def _epochs(rounds: int) -> tuple[dict[str, list[float]], dict[str, float]]:
    """(seconds of each epoch, the cache's size) of two runs of the default config, data included.

    An epoch is one shard of the cache, and the run with the backbone reads as many tokens.
    """
    count = hidden_states.BATCHES_IN_SHARD
    with tempfile.TemporaryDirectory() as folder:
        cache = Path(folder) / "states"
        hidden_states.fill(read(get_config()), cache, batches=count, top_k=64)
        settings = {"backbone": "", "cached states": str(cache)}
        runs, tuned, epochs = {}, {}, {name: [] for name in settings}
        for name, value in settings.items():
            config = changed(read(get_config()), {"tune.hidden_states": value})
            run = loop.Run(config, Path(folder) / name)
            runs[name] = run, run.batches()
            tuned[name], _ = run.step(run.state(), run.given, run.place_batch(next(runs[name][1])))
        for _ in range(rounds):
            for name, (run, batches) in runs.items():
                jax.block_until_ready(tuned[name])
                began = time.perf_counter()
                for _ in range(count):
                    batch = run.place_batch(next(batches))
                    tuned[name], _ = run.step(tuned[name], run.given, batch)
                jax.block_until_ready(tuned[name])
                epochs[name].append(time.perf_counter() - began)
        for _, batches in runs.values():
            batches.close()
        return epochs, hidden_states.size(cache)


def _temporary_bytes(config: DecoderConfig, exits: int, vocab_size: int) -> int:
    """Of a compiled step with so many norm heads that share the output matrix; nothing is run."""
    config = DecoderConfig(**{**vars(config), "vocab_size": vocab_size})
    points = tuple(np.linspace(config.depth // 6, config.depth - 1, exits).astype(int).tolist())
    model = MultiExit(config, ExitConfig(points, head="norm", output="shared"))
    optimizer = make_optimizer(read(get_config()).tune)
    _, backbone = base.abstract(config.build)
    state = jax.eval_shape(
        lambda heads: steps.init_state({"exits": heads}, optimizer), model.abstract_exits()
    )
    step = functools.partial(
        steps.tune_step,
        model=model,
        recipe=Recipe("kl", ExitWeights((1.0,) * exits)),
        optimizer=optimizer,
    )
    batch = jax.eval_shape(lambda: _batch(vocab_size))
    lowered = jax.jit(step, donate_argnums=0).lower(state, {"backbone": backbone}, batch)
    return lowered.compile().memory_analysis().temp_size_in_bytes


if __name__ == "__main__":
    bars.run(main)
