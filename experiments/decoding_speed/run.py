"""Is a skipped block saved time? SmolLM2-135M, float32, batch 1, forced depths.

    python -m experiments.decoding_speed.run            # about two minutes on 2 cores
    python -m experiments.decoding_speed.run --check    # exits 1 if a bar falls short

All cases take turns in one process and are reported as ratios to the full model, medians over
rounds. Beside each stands the ratio of the bytes that a token must read (weights; at batch 1 the
cache is small beside them): what the ratio would be if nothing but memory traffic cost time.
"""

import time

import jax
import jax.numpy as jnp
import numpy as np

from configs.smollm2_135m import SOURCE
from early_exit import policy as policies
from early_exit import tree
from early_exit.exits.heads import ExitConfig
from early_exit.exits.multi_exit import MultiExit
from early_exit.inference.decode import decode, prefill
from early_exit.inference.sampling import GREEDY
from early_exit.inference.state import initial_state
from early_exit.metrics import table
from early_exit.pretrained.load import load
from experiments import bars

DEPTHS = (5, 10, 20)


def main(argv):
    del argv
    rounds, tokens = (3, 24) if bars.QUICK.value else (9, 64)
    pretrained = load(SOURCE)
    # A norm head that reads the backbone's output matrix: it costs what the final exit costs, so
    # the ratios are about blocks alone.
    model = MultiExit(pretrained.config, ExitConfig(DEPTHS, head="norm", output="shared"))
    exits = model.init_exits(jax.random.key(0), pretrained.params, "copy", None)
    params = {"backbone": pretrained.params, "exits": exits}

    def seconds_per_token(policy, slots, prompt_length):
        state = initial_state(
            model,
            [list(range(100, 100 + prompt_length))],
            tokens + 1,
            key=jax.random.key(0),
            slots=slots,
        )
        no_stop = jnp.array([-1])
        state = prefill(params, state, no_stop, model=model, sampling=GREEDY)
        jax.block_until_ready(state)
        began = time.perf_counter()
        state = decode(
            params, state, policy, no_stop, jnp.int32(tokens), model=model, sampling=GREEDY
        )
        jax.block_until_ready(state)
        return (time.perf_counter() - began) / tokens

    read = _bytes_per_token(params, model)
    stream_bytes = _memory_bound(read[model.config.depth])
    cases = {
        "memory bound": stream_bytes,
        "full": lambda: seconds_per_token(None, 256, 64),
        "no exit fires": lambda: seconds_per_token(policies.never(len(DEPTHS)), 256, 64),
        "cache 256, 128 filled": lambda: seconds_per_token(None, 256, 128),
        "cache 2048, 128 filled": lambda: seconds_per_token(None, 2048, 128),
    }
    for e, depth in enumerate(DEPTHS):
        policy = policies.forced(len(DEPTHS), e)
        cases[f"depth {depth}"] = lambda policy=policy: seconds_per_token(policy, 256, 64)

    times = {name: [] for name in cases}
    for index in range(rounds + 1):  # the first round compiles
        for name, case in cases.items():
            seconds = case()
            if index:
                times[name].append(seconds)

    def ratio(name, to="full"):
        """Median over rounds of the ratio within a round: the machine's drift cancels."""
        return float(np.median(np.divide(times[name], times[to])))

    ideal = {f"depth {depth}": read[depth] / read[model.config.depth] for depth in DEPTHS}
    rows = [
        (name, 1e3 * float(np.median(times[name])), ratio(name), ideal.get(name)) for name in cases
    ]
    print(table(rows, header=("case", "ms/token", "÷ full", "bytes ÷ full")))
    limits = {20: 0.80, 10: 0.53, 5: 0.40}
    bars.conclude(
        {name: {"ms": ms, "ratio": r, "bytes_ratio": b} for name, ms, r, b in rows},
        [
            bars.Bar("full model ÷ memory-bound rate", ratio("memory bound"), 0.75, at_least=True),
            *(
                bars.Bar(f"depth {d} of 30: time ÷ full", ratio(f"depth {d}"), limits[d])
                for d in sorted(DEPTHS, reverse=True)
            ),
            bars.Bar(
                "cache 2048 ÷ 256 allocated, 128 filled: time",
                ratio("cache 2048, 128 filled", to="cache 256, 128 filled"),
                1.1,
            ),
        ],
    )


def _bytes_per_token(params, model) -> dict[int, int]:
    """Weight bytes read for a token that leaves after so many blocks, by depth."""
    backbone = params["backbone"]
    block = tree.size_in_bytes(backbone["blocks"]["0"])
    attention = backbone["blocks"]["0"]["attention"]
    propagated = tree.size_in_bytes((attention["key"], attention["value"]))
    head = tree.size_in_bytes(backbone["embedding"])
    full = model.config.depth
    return {d: d * block + (full - d) * propagated + head for d in (*DEPTHS, full)}


def _memory_bound(size: int):
    """A function that times one matrix-vector product over `size` bytes of float32 weights.

    Nothing that reads every weight once per token can be faster than this.
    """
    columns = 4096
    matrix = jnp.ones((size // 4 // columns, columns))
    vector = jnp.ones(columns)
    product = jax.jit(jnp.matmul)

    def seconds():
        repeats = 10
        began = time.perf_counter()
        for _ in range(repeats):
            product(matrix, vector).block_until_ready()
        return (time.perf_counter() - began) / repeats

    return seconds


if __name__ == "__main__":
    bars.run(main)
