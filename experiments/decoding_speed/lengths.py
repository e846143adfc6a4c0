"""Does time follow the filled length, not the allocated one? SmolLM2-135M, batch 1.

    python -m experiments.decoding_speed.lengths --check --plot=lengths.svg    # about 4 minutes

Time per token of the full model with 64 … 4096 positions filled, in a cache allocated as small as
possible and in one of 8192.
"""

from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
from absl import flags

from configs.smollm2_135m import SOURCE
from early_exit.decoding import cache as caches
from early_exit.decoding.decoder import Decoder
from early_exit.decoding.mode import LOSSY
from early_exit.exits.heads import ExitConfig
from early_exit.exits.multi_exit import MultiExit
from early_exit.pretrained.load import load
from early_exit.runs.metrics import table
from experiments import bars
from experiments.decoding_speed.timing import Turns, decode_case

PLOT = flags.DEFINE_string("plot", None, "File for the plot, as SVG or PNG.")
FILLED = (64, 128, 256, 512, 1024, 2048, 3072, 4064)
ALLOCATED = 8192


def main(argv):
    del argv
    rounds, tokens = (1, 16) if bars.QUICK.value else (5, 24)
    pretrained = load(SOURCE)
    model = MultiExit(pretrained.config, ExitConfig((pretrained.config.depth // 2,)))
    decoder = Decoder(model, {"backbone": pretrained.params}, None, (), LOSSY)
    cases = {}
    for filled in FILLED:
        prompt = [100 + i % 200 for i in range(filled)]
        for name, slots in (("tight", caches.bucket(filled + tokens + 1)), ("wide", ALLOCATED)):
            cases[f"{name} {filled}"] = [decode_case(decoder, [prompt], tokens, slots)]
    turns = Turns(cases, rounds)
    ms = {name: 1e3 * turns.median(name) / tokens for name in cases}
    tight = np.array([ms[f"tight {filled}"] for filled in FILLED])
    wide = np.array([ms[f"wide {filled}"] for filled in FILLED])
    middle = np.array(FILLED) + tokens / 2
    slope, start = np.polyfit(middle, wide, 1)
    fitted = start + slope * middle
    apart = np.abs(wide / fitted - 1)
    ratios = [turns.ratio(f"wide {filled}", f"tight {filled}") for filled in FILLED]
    rows = list(zip(FILLED, tight.tolist(), wide.tolist(), fitted.tolist(), ratios, strict=True))
    print(table(rows, header=("filled", "ms, tight", f"ms, {ALLOCATED}", "line", "wide ÷ tight")))
    if PLOT.value:
        figure, axes = plt.subplots(figsize=(6, 3.4), layout="constrained")
        axes.plot(middle, fitted, color="0.7", linewidth=1, label="straight line")
        axes.plot(middle, tight, "o", markersize=6, label="allocated: as needed")
        axes.plot(middle, wide, "x", markersize=7, label=f"allocated: {ALLOCATED}")
        axes.set_xlabel("positions filled")
        axes.set_ylabel("ms a token")
        axes.set_ylim(0)
        axes.legend(frameon=False)
        axes.spines[["top", "right"]].set_visible(False)
        figure.savefig(Path(PLOT.value))
        print(f"plot in {PLOT.value}")
    bars.conclude(
        {"filled": FILLED, "tight": tight.tolist(), "wide": wide.tolist()},
        [
            bars.Bar("off a straight line in the filled length, at most", float(apart.max()), 0.15),
            bars.Bar(f"allocated {ALLOCATED} ÷ tight, at most", max(ratios), 1.15),
        ],
    )


if __name__ == "__main__":
    bars.run(main)
