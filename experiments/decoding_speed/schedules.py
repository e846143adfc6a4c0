"""Which segment should run next for a batch whose rows leave at different exits? A simulation.

    python -m experiments.decoding_speed.schedules --check

Passes count, weighted by the blocks of their segment, for they cost about the same for one row and
for several. `in lockstep`, as the engine does it, every row has its next token before the next step
begins. The others run one segment after the other, whichever most rows wait for; rows are counted,
or count more the more tokens they have to go.
"""

import itertools

import numpy as np
from absl import flags

from early_exit.runs.metrics import table
from experiments import bars

SEEDS = flags.DEFINE_integer("seeds", 8, "Simulations of each case.", lower_bound=1)

BLOCKS = np.array([8, 14, 6, 2])  # of the segments of SmolLM2 with exits after 8, 22 and 28
# Shares of tokens that leave at each exit, the full model last.
LEAVING = {
    "few leave": (0.05, 0.05, 0.1, 0.8),
    "half leave": (0.1, 0.2, 0.2, 0.5),
    "most leave": (0.3, 0.2, 0.2, 0.3),
    "most leave first": (0.6, 0.2, 0.1, 0.1),
}
TOKENS = 64
# (what a row counts by the tokens it has to go and the fewest of any row, factor for each segment)
RULES = {
    "rows counted": (lambda to_go, fewest: np.ones(len(to_go)), 1.0),
    "laggards count more": (lambda to_go, fewest: 1 + 0.5 * (to_go - fewest), 1.5),
    "by tokens to go": (lambda to_go, fewest: to_go, 1.0),
}


def main(argv):
    del argv
    rows, ratios = [], {}
    for (name, shares), batch, queue in itertools.product(LEAVING.items(), (4, 8), (0, 16)):
        lockstep = _mean(None, shares, batch, queue)
        found = {rule: _mean(rule, shares, batch, queue) / lockstep for rule in RULES}
        rows.append((name, batch, queue, *found.values()))
        ratios |= {(name, batch, queue, rule): x for rule, x in found.items()}
    print("passes ÷ those in lockstep")
    print(table(rows, header=("tokens", "rows", "waiting", *RULES)))
    best = min(ratios.values())
    bars.conclude(
        {"rows": rows}, [bars.Bar("best of all others ÷ lockstep, at least", best, 0.85, True)]
    )


def _mean(rule: str | None, shares, batch: int, queue: int) -> float:
    found = [
        _passes(rule, shares, batch, queue, np.random.default_rng(seed))
        for seed in range(SEEDS.value)
    ]
    return float(np.mean(found))


def _passes(rule: str | None, shares, batch: int, queue: int, rng: np.random.Generator) -> float:
    """Passes until all rows have ended, in full passes.

    Args:
      rule: None for lockstep.
      queue: prompts that wait for a row to end.
    """
    count = len(BLOCKS)

    def length():
        return int(rng.integers(TOKENS // 2, TOKENS + 1)) if queue else TOKENS

    to_go = np.array([length() for _ in range(batch)])
    needs, stage = rng.choice(count, batch, p=shares), np.zeros(batch, int)
    passes, waiting = 0.0, queue
    while (running := to_go > 0).any():
        segments = range(count)
        if rule is not None:
            weight, deeper = RULES[rule]
            counted = np.where(running, weight(to_go, to_go[running].min()), 0)
            crowd = [counted[stage == e].sum() * deeper**e + 1e-9 * e for e in segments]
            segments = [int(np.argmax(crowd))]
        for e in segments:
            active = running & (stage == e)
            passes += BLOCKS[e] / BLOCKS.sum() * active.any()
            leaves = active & (needs == e)
            stage = np.where(leaves, 0, stage + active)
            to_go = to_go - leaves
            needs = np.where(leaves, rng.choice(count, batch, p=shares), needs)
            running &= ~leaves  # its next token is the next step's
        for row in np.flatnonzero((to_go == 0) & (waiting > 0)):
            if waiting:
                waiting, to_go[row] = waiting - 1, length()
    return passes


if __name__ == "__main__":
    bars.run(main)
