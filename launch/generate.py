"""Answers a prompt with dynamic depth, each token coloured by the depth it needed.

    python -m launch.generate --workdir=runs/smollm2 --prompt="Write a haiku about time."
    python -m launch.generate --workdir=runs/smollm2 --prompt="def fibonacci(n):" --raw

Text appears as it is decoded; the last line counts the tokens that left at each exit.
"""

import sys

import numpy as np
from absl import flags

from early_exit import assemble
from early_exit.inference import detokenize
from early_exit.inference.generate import stream
from early_exit.inference.sampling import Sampling
from early_exit.report import tokens as token_colours
from launch import common

PROMPT = flags.DEFINE_string("prompt", None, "What to answer, or - for standard input.")
RAW = flags.DEFINE_bool("raw", False, "Continue the prompt as it is, without the chat template.")
FULL = flags.DEFINE_bool("full", False, "Run the full model instead of the run's exit policy.")
NEW = flags.DEFINE_integer("max_new_tokens", 160, "Most tokens to answer with.", lower_bound=1)
TEMPERATURE = flags.DEFINE_float("temperature", 0.0, "0 is greedy.")
TOP_K = flags.DEFINE_integer("top_k", 0, "Sample among the k most probable tokens; 0 is all.")
TOP_P = flags.DEFINE_float("top_p", 1.0, "Sample among tokens of this total probability.")
SEED = flags.DEFINE_integer("seed", 0, "Of the sampling.")
COLOUR = flags.DEFINE_enum(
    "colour", "auto", ["auto", "always", "never"], "Colour tokens by depth (auto: on a terminal)."
)


def main(argv):
    common.no_arguments(argv)
    sampling = Sampling(TEMPERATURE.value, TOP_K.value, TOP_P.value)
    tuned = assemble.load_tuned(common.workdir(), common.CONFIG.value)
    policy = None if FULL.value else assemble.load_policy(tuned)
    text = sys.stdin.read() if PROMPT.value == "-" else PROMPT.value
    prompt = tuned.tokenizer.encode(text) if RAW.value else tuned.chat(text)
    coloured = COLOUR.value == "always" or (COLOUR.value == "auto" and sys.stdout.isatty())

    exit_depths = tuned.model.exit_depths.tolist()
    shown = 0
    for (answer,) in stream(
        tuned.model,
        tuned.params,
        [prompt],
        policy=policy,
        max_new_tokens=NEW.value,
        stop_ids=tuned.stop_ids,
        sampling=sampling,
        seed=SEED.value,
    ):
        ended = len(answer.tokens) == NEW.value or answer.tokens[-1] in tuned.stop_ids
        pieces = detokenize.pieces(tuned.tokenizer, answer.tokens, complete=ended)[shown:]
        if coloured:
            depths = answer.depths[shown:].tolist()
            sys.stdout.write(token_colours.ansi(pieces, depths, exit_depths))
        else:
            sys.stdout.write(token_colours.printable("".join(pieces)))
        sys.stdout.flush()
        shown = len(answer.tokens)

    counts = np.bincount(answer.exits, minlength=len(exit_depths))
    decoded = len(answer.tokens) - 1
    print("\n")
    if coloured:
        print(token_colours.legend_ansi(exit_depths))
    print(
        f"{len(answer.tokens)} tokens, "
        f"{decoded / answer.seconds if decoded else 0:.1f} tokens/s after the prompt, "
        f"mean depth {answer.depths.mean():.1f} of {tuned.model.config.depth}; left after block "
        + ", ".join(f"{d}: {n}" for d, n in zip(exit_depths, counts, strict=True))
    )


if __name__ == "__main__":
    flags.mark_flag_as_required("prompt")
    common.run(main)
