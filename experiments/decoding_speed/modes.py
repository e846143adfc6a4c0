"""What each way of decoding is worth: modes × kinds of text × batch, each beside the full model.

    python -m experiments.decoding_speed.modes --workdir=runs/demo
    python -m experiments.decoding_speed.modes --workdir=runs/demo --check
    python -m experiments.decoding_speed.modes --workdir=runs/demo --peers    # extra `parity`

Greedy, float32. All cases of a kind take turns in one process, answer by answer or batch by batch;
a speed-up is the median over rounds of the ratio within a round. Beside the rate of decoding stands
the time to the last token, in which the prompt's pass counts. Needs a tuned run of SmolLM2-135M
(`make demo` leaves one).
"""

import functools
import tempfile
import time
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
from absl import flags

from early_exit.decoding import measure
from early_exit.decoding.decoder import Decoder
from early_exit.decoding.mode import DEFERRED, LOSSY
from early_exit.pretrained.export import export_backbone
from early_exit.runs import assemble
from early_exit.runs.metrics import table
from experiments import bars
from experiments.decoding_speed import mode_bars, prompts
from experiments.decoding_speed.timing import Case, Timed, Turns, decode_case

WORKDIR = flags.DEFINE_string("workdir", None, "Folder of a tuned run.", required=True)
PEERS = flags.DEFINE_bool("peers", False, "Time transformers too, on the same weights (torch).")
ROUNDS = flags.DEFINE_integer(
    "rounds", 2, "Times of all answers; thrice in a batch.", lower_bound=1
)
PLOT = flags.DEFINE_string("plot", None, "File for the plot, as SVG or PNG.")

FULL = "full model"
SLOTS = 512
# Tokens of an answer that is decoded for its programs alone.
WARM = 8


def main(argv):
    del argv
    count, new_tokens, rounds = (2, 32, 1) if bars.QUICK.value else (8, 96, ROUNDS.value)
    tuned = assemble.load_tuned(Path(WORKDIR.value))
    policy = assemble.load_policy(tuned)
    modes = {FULL: (None, LOSSY)}
    for mode in (LOSSY, DEFERRED, *mode_bars.CHECKED):
        modes[mode.name] = policy, mode
    decoders = {
        name: Decoder(tuned.model, tuned.params, chosen, (), mode)
        for name, (chosen, mode) in modes.items()
    }
    decoders |= {
        mode.name: measure.measured(decoders[mode.name], SLOTS) for mode in mode_bars.CHECKED
    }
    rows, speedups = [], {}
    for kind, texts in prompts.load(tuned, count).items():
        for batch in (1, len(texts)):
            cases = {
                name: _case(decoder, texts, new_tokens, batch) for name, decoder in decoders.items()
            }
            # Alone, an answer of any length compiles all; in a batch, rows end one after the other.
            short = WARM if batch == 1 else new_tokens
            for decoder in decoders.values():
                for part in _case(decoder, texts, short, batch):
                    part()
            if PEERS.value and (kind, batch) == ("code", 1):
                cases |= _peers(tuned, texts, new_tokens)
            # One answer after the other gives many turns a round, a batch a single one.
            turns = Turns(cases, rounds if batch == 1 else 3 * rounds, compiled=True)
            for name in cases:
                speedup = 1 / turns.ratio(name, FULL)
                speedups[kind, batch, name] = speedup
                rate = len(texts) * new_tokens / turns.median(name)
                whole = turns.median(name, "whole") * batch / len(texts)
                with_prefill = 1 / turns.ratio(name, FULL, "whole")
                figures = rate, speedup, whole, with_prefill
                rows.append((kind, batch, name, *figures, *_facts(turns, name)))
            print(table(rows[-len(cases) :], header=_HEADER), flush=True)
    if PLOT.value:
        _plot(speedups, Path(PLOT.value))
    bars.conclude(
        {"speedups": {"/".join(map(str, key)): s for key, s in speedups.items()}, "rows": rows},
        mode_bars.of(speedups),
    )


_HEADER = ("text", "batch", "mode", "tokens/s", "speed-up", "s to the last token", "speed-up")
_HEADER += ("equal", "blocks/token", "accepted")


def _case(decoder: Decoder, texts: list[list[int]], new_tokens: int, batch: int) -> list[Case]:
    """All texts, `batch` at a time."""
    return [
        decode_case(decoder, texts[i : i + batch], new_tokens, SLOTS)
        for i in range(0, len(texts), batch)
    ]


def _facts(turns: Turns, name: str) -> tuple:
    """Share of tokens equal to the full model's run, blocks per token, share of drafts accepted."""
    answers = turns.answers[name]
    if not answers:
        return None, None, None
    full = np.stack([answer.tokens for answer in turns.answers[FULL]])
    tokens = np.stack([answer.tokens for answer in answers])
    drafted = sum(answer.counts.drafted_BW.sum() for answer in answers)
    accepted = sum(answer.counts.accepted_BW.sum() for answer in answers)
    blocks = sum(answer.layer_tokens for answer in answers) / (tokens.size - len(tokens))
    return float((tokens == full).mean()), blocks, accepted / drafted if drafted else None


def _peers(tuned, texts, new_tokens) -> dict:
    """transformers, greedy and with its early-exit assistant, on the same weights and prompts."""
    import torch
    import transformers

    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch) / "model"
        export_backbone(folder, tuned.model.config, tuned.params["backbone"], tuned.tokenizer)
        peer = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)

    def timed(text, **settings) -> Timed:
        inputs = torch.tensor([text])
        lengths = {"min_new_tokens": new_tokens + 1, "max_new_tokens": new_tokens + 1}
        # The first token comes out of the prompt's pass, here as there.
        began = time.perf_counter()
        with torch.no_grad():
            peer.generate(inputs, max_new_tokens=1, do_sample=False, pad_token_id=0)
        prefill = time.perf_counter() - began
        began = time.perf_counter()
        with torch.no_grad():
            peer.generate(inputs, do_sample=False, pad_token_id=0, **lengths, **settings)
        return Timed(time.perf_counter() - began - prefill, prefill)

    def case(**settings):
        return [functools.partial(timed, text, **settings) for text in texts]

    return {
        "transformers": case(),
        f"transformers, assistant_early_exit={tuned.model.exits.points[0]}": case(
            assistant_early_exit=tuned.model.exits.points[0]
        ),
    }


def _plot(speedups: dict, path: Path) -> None:
    """A bar for each mode in groups of text and batch."""
    groups = list(dict.fromkeys(key[:2] for key in speedups))
    names = [n for n in dict.fromkeys(key[2] for key in speedups) if n != FULL]
    names = [n for n in names if not n.startswith("transformers")]
    figure, axes = plt.subplots(figsize=(8, 3.6), layout="constrained")
    width = 0.8 / len(names)
    for i, name in enumerate(names):
        heights = [speedups[(*group, name)] for group in groups]
        places = np.arange(len(groups)) + (i - (len(names) - 1) / 2) * width
        axes.bar(places, heights, width * 0.92, label=name)
    axes.axhline(1, color="0.3", linewidth=0.8)
    axes.set_xticks(range(len(groups)), [f"{kind}, batch {batch}" for kind, batch in groups])
    axes.set_ylabel("speed-up over the full model")
    axes.legend(ncols=len(names), fontsize=7, frameon=False, loc="upper center")
    axes.spines[["top", "right"]].set_visible(False)
    axes.margins(y=0.18)
    figure.savefig(path)
    print(f"plot in {path}")


if __name__ == "__main__":
    bars.run(main)
