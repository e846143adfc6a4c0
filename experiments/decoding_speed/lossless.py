"""Is verified decoding lossless? 64 prompts of four kinds × 128 tokens, beside the full model.

    python -m experiments.decoding_speed.lossless --workdir=runs/demo --check    # about 8 minutes

Every difference is listed with the gap between the full model's two best logits there: programs
that read several positions at once round differently, so a tie within 1e-4 may fall either way.
"""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags

from early_exit.decoding.generate import generate
from early_exit.decoding.mode import LOSSY, VERIFIED, served, verified
from early_exit.runs import assemble
from early_exit.runs.metrics import table
from experiments import bars
from experiments.decoding_speed import prompts

WORKDIR = flags.DEFINE_string("workdir", None, "Folder of a tuned run.", required=True)
TIE = 1e-4


def main(argv):
    del argv
    count, new_tokens = (2, 32) if bars.QUICK.value else (16, 128)
    tuned = assemble.load_tuned(Path(WORKDIR.value))
    policy = assemble.load_policy(tuned)
    kinds = prompts.load(tuned, count)
    texts = [text for texts in kinds.values() for text in texts]
    settings = {"max_new_tokens": new_tokens, "slots": 512}

    def answers(policy, mode):
        return [
            generate(tuned.model, tuned.params, [text], policy=policy, mode=mode, **settings)[0]
            for text in texts
        ]

    @jax.jit
    def gap(params, tokens, at):
        bound = tuned.model.bind(params)
        hidden, context = bound.backbone.stem({"tokens": tokens})
        hidden = bound.backbone.run_blocks(hidden, 0, tuned.model.config.depth, context)
        best = jax.lax.top_k(bound.backbone.readout(hidden[:, at])[0], 2)[0]
        return best[0] - best[1]

    full = answers(None, LOSSY)
    rows, differences = [], []
    modes = [verified(name) for name in served(VERIFIED, tuned.model).drafters]
    for mode in (*modes, served(VERIFIED, tuned.model)):
        name = mode.name
        equal = 0
        drafts = np.zeros(2, int)
        for text, reference, answer in zip(texts, full, answers(policy, mode), strict=True):
            drafts += [answer.counts.drafted_BW.sum(), answer.counts.accepted_BW.sum()]
            apart = np.flatnonzero(answer.tokens != reference.tokens)
            equal += not len(apart)
            if len(apart):
                before = np.array([*text, *reference.tokens[: apart[0]]], np.int32)
                padded = np.pad(before, (0, -len(before) % 64))
                tie = float(gap(tuned.params, jnp.array(padded[None]), len(before) - 1))
                differences.append((name, texts.index(text), int(apart[0]), tie))
        rows.append((name, len(texts), equal, *drafts.tolist()))
    print(table(rows, header=("mode", "prompts", "equal", "drafted", "accepted")))
    if differences:
        header = ("mode", "prompt", "first difference", "gap of the two best logits")
        print("\n" + table(differences, header=header))
    widest = max((tie for *_, tie in differences), default=0.0)
    bars.conclude(
        {"differences": differences},
        [bars.Bar("gap of the two best logits at a difference, at most", widest, TIE)],
    )


if __name__ == "__main__":
    bars.run(main)
