"""What `modes` claims, mode by mode: none keeps a bar of another."""

import numpy as np

from early_exit.decoding.mode import verified
from experiments import bars

# The modes whose answer is the full model's.
CHECKED = (verified("exits"), verified("lookup"), verified("exits", "lookup"))


def of(speedups: dict[tuple[str, int, str], float]) -> list[bars.Bar]:
    """For each mode that checks its drafts: what it gains, and that it loses nothing elsewhere.

    Args:
      speedups: by kind of text, batch and `Mode.name`, beside the full model.
    """
    checks = []
    for batch in sorted({batch for _, batch, _ in speedups}):
        for mode in CHECKED:
            found = {
                k: s for (k, b, name), s in speedups.items() if (b, name) == (batch, mode.name)
            }
            slowest = min(found, key=found.get)
            name = f"{mode.name}, batch {batch}, slowest ({slowest})"
            checks.append(bars.Bar(name, found[slowest], 0.97, True))
    by_exits, by_lookup, by_both = (mode.name for mode in CHECKED)
    one_by_one = {(kind, name): s for (kind, batch, name), s in speedups.items() if batch == 1}
    kinds = {kind for kind, _ in one_by_one}
    mean = float(np.exp(np.mean([np.log(one_by_one[kind, by_exits]) for kind in kinds])))
    checks += [
        bars.Bar(f"{by_exits}, mean of all texts (geometric)", mean, 1.0, True),
        bars.Bar(f"{by_lookup}, on code", one_by_one["code", by_lookup], 1.25, True),
        bars.Bar(f"{by_lookup}, on copy", one_by_one["copy", by_lookup], 1.8, True),
        bars.Bar(f"{by_both}, on code", one_by_one["code", by_both], 1.25, True),
        bars.Bar(
            f"{by_both} ÷ {by_lookup}, on code: what exits add",
            one_by_one["code", by_both] / one_by_one["code", by_lookup],
            1.0,
            True,
        ),
    ]
    if ("code", "transformers") in one_by_one:
        speedup = 1 / one_by_one["code", "transformers"]
        checks.append(bars.Bar("full model ÷ transformers", speedup, 2.0, True))
    return checks
