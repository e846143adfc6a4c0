"""A drafter of one's own: proposes a fixed phrase wherever its first token has just been said.

    python examples/own_drafter.py tests/fixtures/tiny_chat

The full model checks what a drafter proposes, so the answer is its own, whatever stands here.
"""

import sys

import jax.numpy as jnp
import numpy as np

import early_exit as ee
from early_exit.decoding.drafters import base


class Phrase(base.Drafter):
    """Goes on with a phrase, token ids, once it has begun."""

    name, credit = "phrase", 0.1  # in tokens: what an answer may lose to it before it is left out

    def __init__(self, phrase):
        self.phrase = tuple(phrase)

    def propose(self, engine, state, proposed):
        """Drafts behind the newest token of rows where nothing else waits, taken to be right."""
        count = min(engine.mode.pending, len(self.phrase)) - 1
        newest = jnp.take_along_axis(state.tokens_BS, state.newest_B[:, None], axis=1)
        rest = jnp.array(self.phrase[1 : 1 + count], jnp.int32)
        drafts = jnp.broadcast_to(rest[None], (len(newest), count))
        begun = base.free(state)[:, None] & (newest == self.phrase[0])
        begun &= base.worthwhile(state, engine.final + self.place)  # what it gained lately
        likely = jnp.where(begun & base.draftable(engine, state, drafts), 1.0, 0.0)
        return base.drafted(engine, state, proposed, self, drafts, likely)


PHRASE = Phrase([5, 6, 7, 8])
ee.register.drafter(PHRASE)


def main(source):
    model = ee.load(source)
    plain = ee.generate(model, "Why?", max_new_tokens=16)
    PHRASE.phrase = tuple(plain.tokens[2:8].tolist())  # a phrase that will be said
    mode = ee.Mode("defer", drafters=("phrase",))
    answer = ee.generate(model, "Why?", max_new_tokens=16, mode=mode)
    same = np.array_equal(answer.tokens, plain.tokens)
    print(f"the same answer: {same}; drafts that stood: {answer.counts.accepted_BW.sum()}")


if __name__ == "__main__":
    main(sys.argv[1])
