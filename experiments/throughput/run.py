"""How near is decoding to what the machine allows, from 1 row to 64; and what is each mode worth?

    python -m experiments.throughput.run --workdir=runs/demo --check

The bound of n rows is the slower of two things that no decoding escapes: reading the weights once
and each row's keys and values, at the rate of a matrix-vector product; and the multiply-adds of n
tokens, at the rate of a large product. Both rates are measured in the same run.
"""

import dataclasses
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags

from early_exit.cost import multiply_adds
from early_exit.cost.traffic import traffic
from early_exit.decoding import measure
from early_exit.decoding.decoder import Decoder
from early_exit.decoding.mode import DEFERRED, LOSSY, VERIFIED, served, verified
from early_exit.runs import assemble
from early_exit.runs.metrics import table
from experiments import bars
from experiments.decoding_speed import prompts
from experiments.decoding_speed.timing import Turns, decode_case

WORKDIR = flags.DEFINE_string("workdir", None, "Folder of a tuned run.", required=True)
ROWS = flags.DEFINE_multi_integer("rows", [1, 4, 8, 16, 32, 64], "Rows decoded together.")
MODES_AT = flags.DEFINE_multi_integer("modes_at", [4, 16], "Rows at which modes are compared.")
NEW = flags.DEFINE_integer("new_tokens", 64, "Tokens of an answer.", lower_bound=2)
ROUNDS = flags.DEFINE_integer("rounds", 3, "Turns on the clock.", lower_bound=1)

FULL = "full model"
SLOTS = 256
# Least share of the bound, up to so many rows and beyond.
FEW, OF_FEW, OF_MANY = 8, 0.75, 0.6


@dataclasses.dataclass(frozen=True)
class Machine:
    """What was measured: bytes and multiply-adds a second."""

    bytes: float
    multiply_adds: float

    @classmethod
    def measured(cls, size: int, rounds: int = 9) -> "Machine":
        """By a matrix-vector product over `size` bytes, and by a product of large matrices."""
        matrix, vector = jnp.ones((size // 4 // 4096, 4096)), jnp.ones(4096)
        square = jnp.ones((2048, 2048))
        product = jax.jit(jnp.matmul)
        return cls(
            matrix.nbytes / _seconds(product, (matrix, vector), rounds),
            2048**3 / _seconds(product, (square, square), rounds),
        )

    def seconds(self, read: float, multiply_adds: float) -> float:
        return max(read / self.bytes, multiply_adds / self.multiply_adds)


def _seconds(product, arguments, rounds: int) -> float:
    """The least of a few, after one that compiles: nothing can be faster."""
    taken = []
    for _ in range(rounds + 1):
        began = time.perf_counter()
        product(*arguments).block_until_ready()
        taken.append(time.perf_counter() - began)
    return min(taken[1:])


def main(argv):
    del argv
    new_tokens, rounds = (8, 1) if bars.QUICK.value else (NEW.value, ROUNDS.value)
    rows_of, modes_at = ROWS.value, MODES_AT.value
    if bars.QUICK.value:
        rows_of, modes_at = [1, 4], [4]
    tuned = assemble.load_tuned(Path(WORKDIR.value))
    machine = Machine.measured(traffic(tuned.model, tuned.params).full)
    print(
        f"{machine.bytes / 1e9:.1f} GB/s, {machine.multiply_adds / 1e9:.0f} G multiply-adds/s",
        flush=True,
    )
    reached = _of_the_bound(tuned, machine, rows_of, new_tokens, rounds)
    worth = _modes(tuned, modes_at, new_tokens, rounds)
    checks = [
        bars.Bar(
            f"full model, {rows} rows ÷ bound", share, OF_FEW if rows <= FEW else OF_MANY, True
        )
        for rows, share in reached.items()
    ]
    for rows in modes_at:
        for mode in {mode for _, n, mode in worth if n == rows}:
            of_mode = {kind: x for (kind, n, m), x in worth.items() if (n, m) == (rows, mode)}
            slowest = min(of_mode, key=of_mode.get)
            name = f"{mode}, {rows} rows, slowest ({slowest})"
            checks.append(bars.Bar(name, of_mode[slowest], 0.97, True))
    figures = {
        "machine": dataclasses.asdict(machine),
        "of_the_bound": {str(rows): share for rows, share in reached.items()},
        "modes": [(*key, x) for key, x in worth.items()],
    }
    bars.conclude(figures, checks)


def _of_the_bound(tuned, machine: Machine, rows_of, new_tokens: int, rounds: int):
    """The full model's rate ÷ what the machine allows, by number of rows."""
    config, decoder = tuned.model.config, Decoder(tuned.model, tuned.params, None, (), LOSSY)
    reads = traffic(tuned.model, tuned.params)
    token = multiply_adds.backbone(config, jax.tree.leaves(tuned.params["backbone"])[0].dtype)
    length = min(64, config.context_length // 2)
    rng = np.random.default_rng(0)
    cases = {}
    for rows in rows_of:
        texts = rng.integers(0, config.vocab_size, (rows, length)).tolist()
        cases[rows] = [decode_case(decoder, texts, new_tokens, SLOTS)]
    turns = Turns(cases, rounds)
    told, reached = [], {}
    for rows in rows_of:
        # In the middle of the answer.
        cached = rows * (length + new_tokens / 2) * float(reads.cached.sum())
        bound = machine.seconds(reads.full + cached, rows * token.full.multiply_adds)
        taken = turns.median(rows) / new_tokens
        reached[rows] = bound / taken
        told.append((rows, rows / taken, 1e3 * taken, 1e3 * bound, reached[rows]))
    header = ("rows", "tokens/s", "ms a step", "ms at best", "of the bound")
    print(table(told, header=header), flush=True)
    return reached


def _modes(tuned, modes_at, new_tokens: int, rounds: int) -> dict[tuple[str, int, str], float]:
    """Speed-ups by kind of text, number of rows and mode."""
    policy = assemble.load_policy(tuned)
    chosen = [LOSSY, DEFERRED] if tuned.model.exits.points else []
    chosen += [verified("lookup"), served(VERIFIED, tuned.model)]
    chosen = list(dict.fromkeys(chosen))
    worth = {}
    for rows in modes_at:
        for kind, texts in prompts.load(tuned, 16).items():
            texts = [texts[i % len(texts)] for i in range(rows)]
            full = Decoder(tuned.model, tuned.params, None, (), LOSSY)
            cases = {FULL: [decode_case(full, texts, new_tokens, SLOTS)]}
            for mode in chosen:
                decoder = Decoder(tuned.model, tuned.params, policy, (), mode)
                decoder = measure.measured(decoder, SLOTS) if mode.verified else decoder
                cases[mode.name] = [decode_case(decoder, texts, new_tokens, SLOTS)]
            turns = Turns(cases, rounds)
            told = []
            for name in cases:
                speedup = 1 / turns.ratio(name, FULL)
                told.append((kind, rows, name, rows * new_tokens / turns.median(name), speedup))
                if name != FULL:
                    worth[kind, rows, name] = speedup
            print(table(told, header=("text", "rows", "mode", "tokens/s", "speed-up")), flush=True)
    return worth


if __name__ == "__main__":
    bars.run(main)
