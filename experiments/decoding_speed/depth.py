"""Is a skipped block saved time? SmolLM2-135M, float32, batch 1, forced exits.

    python -m experiments.decoding_speed.depth            # about four minutes on 2 cores
    python -m experiments.decoding_speed.depth --check    # exits 1 if a bar falls short

All cases take turns in one process and are reported as ratios to the full model, medians over
rounds. Beside each stands what the cost model (`early_exit.cost.traffic`) says: the bytes that
it reads, passes with several positions weighted by what such a pass of the full model costs, which
is measured in the same run as the time of a batch of as many rows.
"""

import time

import jax
import jax.numpy as jnp
import numpy as np

from configs.smollm2_135m import SOURCE
from early_exit import policy as policies
from early_exit.cost.traffic import traffic
from early_exit.decoding.decoder import Decoder
from early_exit.decoding.mode import LOSSY, Mode
from early_exit.exits.heads import ExitConfig
from early_exit.exits.multi_exit import MultiExit
from early_exit.pretrained.load import load
from early_exit.runs.metrics import table
from experiments import bars
from experiments.decoding_speed.timing import Timed, Turns, decode_case

# Where tokens leave, and the most time that this may take of the full model's.
LIMITS = {5: 0.40, 10: 0.53, 20: 0.80}
PROMPT = list(range(100, 164))


def main(argv):
    del argv
    rounds, tokens = (2, 24) if bars.QUICK.value else (7, 56)
    pretrained = load(SOURCE)
    depths, whole = tuple(LIMITS), pretrained.config.depth
    # A norm head that reads the backbone's output matrix: it costs what the final exit costs, so
    # the ratios are about blocks alone.
    model = MultiExit(pretrained.config, ExitConfig(depths, head="norm", output="shared"))
    exits = model.init_exits(jax.random.key(0), pretrained.params, "copy", None)
    params = {"backbone": pretrained.params, "exits": exits}

    def case(policy, mode=LOSSY, slots=256, prompts=(PROMPT,)):
        return [decode_case(Decoder(model, params, policy, (), mode), prompts, tokens, slots)]

    modes = {"full": LOSSY}
    cases = {
        "memory bound": [_memory_bound(traffic(model, params).full, tokens)],
        "full": case(None),
        "no exit fires": case(policies.never(len(depths))),
        "batch 4": case(None, prompts=[PROMPT] * 4),
        "batch 8": case(None, prompts=[PROMPT] * 8),
        "cache 256, 128 filled": case(None, prompts=[PROMPT * 2]),
        "cache 2048, 128 filled": case(None, prompts=[PROMPT * 2], slots=2048),
    }
    for e, depth in enumerate(depths):
        name = f"depth {depth}"
        cases[name], modes[name] = case(policies.forced(len(depths), e)), LOSSY
    # Exits shallow and deep in turns, and seven or three shallow ones before each deep one: a full
    # window forces the deep pass, which takes the waiting positions along.
    for e, depth in enumerate(depths[:2]):
        for window in (2, 4, 8):
            name = f"deferred: {window - 1} × {depth}, 1 × {whole}"
            mode = Mode("defer", pending=window)
            cases[name], modes[name] = case(policies.forced(len(depths), e), mode), mode
    turns = Turns(cases, rounds)

    # What a pass with several positions costs, relative to one: measured on the full model.
    measured = {1: 1.0, 4: turns.ratio("batch 4", "full"), 8: turns.ratio("batch 8", "full")}

    def factors(mode):
        return np.interp(mode.widths, list(measured), list(measured.values()))

    def modelled(name):
        (answer,) = turns.answers[name]
        mode = modes[name]
        return traffic(model, params).bytes_read(
            answer.counts,
            answer.exits[1:],
            propagates=mode.propagates,
            verifies=mode.verified,
            factors=factors(mode),
        )

    rows = []
    for name in cases:
        model_ratio = modelled(name) / modelled("full") if name in modes else None
        ms = 1e3 * turns.median(name) / tokens
        rows.append((name, ms, turns.ratio(name, "full"), model_ratio))
    print(table(rows, header=("case", "ms/token", "÷ full", "cost model ÷ full")))
    print(f"what another position adds to a pass: {(measured[8] - 1) / 7:.3f} of it")
    apart = {name: abs(r / m - 1) for name, _, r, m in rows if m is not None}
    worst = max(apart, key=apart.get)
    bars.conclude(
        {name: {"ms": ms, "ratio": r, "modelled": m} for name, ms, r, m in rows},
        [
            bars.Bar(
                "full model ÷ memory-bound rate",
                turns.ratio("memory bound", "full"),
                0.75,
                at_least=True,
            ),
            *(
                bars.Bar(
                    f"depth {d} of {whole}: time ÷ full", turns.ratio(f"depth {d}", "full"), limit
                )
                for d, limit in LIMITS.items()
            ),
            bars.Bar(
                "cache 2048 ÷ 256 allocated, 128 filled: time",
                turns.ratio("cache 2048, 128 filled", "cache 256, 128 filled"),
                1.1,
            ),
            bars.Bar(f"clock and cost model apart, at most ({worst})", apart[worst], 0.15),
            bars.Bar(
                "batch 8 ÷ batch 1: tokens a second",
                8 / turns.ratio("batch 8", "full"),
                3.5,
                at_least=True,
            ),
        ],
    )


def _memory_bound(size: int, repeats: int):
    """A case of matrix-vector products over `size` bytes of float32 weights, one per token.

    Nothing that reads every weight once per token can be faster than this.
    """
    columns = 4096
    matrix = jnp.ones((size // 4 // columns, columns))
    vector = jnp.ones(columns)
    product = jax.jit(jnp.matmul)

    def run():
        began = time.perf_counter()
        for _ in range(repeats):
            product(matrix, vector).block_until_ready()
        return Timed(time.perf_counter() - began)

    return run


if __name__ == "__main__":
    bars.run(main)
