"""Decoding as its definition says, slowly: the whole text again for every token, no cache, no jit
around the loop, no branches. What the engine does is compared with this.
"""

import dataclasses
import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np

from early_exit import policy as policies
from early_exit.backbones import base
from early_exit.decoding.sampling import GREEDY, filtered

CLOSE = 1e-4  # two logits nearer than this may change places between two programs


def softmax(x):
    x = np.asarray(x, np.float64)
    e = np.exp(x - x.max())
    return e / e.sum()


SCORES = {
    "max_prob": lambda p: p.max(),
    "margin": lambda p: np.sort(p)[-1] - np.sort(p)[-2],
    "entropy": lambda p: 1 + (p * np.log(p)).sum() / np.log(len(p)),
}


@dataclasses.dataclass
class Decoded:
    """Tokens, the exits they came from and their log-probabilities; scores [steps, E]."""

    tokens: list
    exits: list
    log_probs: list
    scores: list


# Texts are filled up to a multiple of this, so that those of one model share a program.
FILL = 64


@functools.partial(jax.jit, static_argnames="model")
def all_states(params, tokens, ran, beside, *, model):
    """What `SlowDecoder.states` says, for a text of a filled-up length."""
    bound = model.bind(params)
    hidden, context = bound.backbone.stem({"tokens": tokens[None], **beside})
    found = [hidden]
    for i in range(model.config.depth):
        deeper, _ = bound.backbone.blocks[str(i)](found[-1], context)
        found.append(jnp.where((i < ran)[None, :, None], deeper, found[-1]))
    at_exits = [found[point] for point in model.exits.points]
    features = [
        head.features(hidden, context)[0]
        for head, hidden in zip(bound.heads, at_exits, strict=True)
    ]
    rule, tables = model.config.logit_rule, bound.exit_tables()
    logits = [base.logits(f, t, rule=rule) for f, t in zip(features, tables, strict=True)]
    gates = [
        head.gate_score(hidden)[0]
        for head, hidden in zip(bound.heads, at_exits, strict=True)
        if model.exits.gate
    ]
    final = bound.backbone.readout(found[-1])[0]
    return jnp.concatenate(found), [x[0] for x in logits], final, gates


class SlowDecoder:
    def __init__(self, model, params, **beside):
        """Args:
        beside: what the stem takes beside tokens.
        """
        self.model, self.params, self.beside = model, params, beside
        self.ids = params.get("token_ids")

    def states(self, tokens, ran=None):
        """Hidden states [depth + 1, length, D], logits of every exit and of the full model, gates.

        Args:
          ran: blocks run at each position; all if None. A position that left after n blocks keeps
            its hidden state in all deeper ones, which see it as the input to their keys and
            values: CALM's state propagation, spelt out on the whole text.
        """
        ran = [self.model.config.depth] * len(tokens) if ran is None else ran
        length = len(tokens)
        fill = (0, -length % FILL)
        hidden, logits, final, gates = jax.device_get(
            all_states(
                self.params,
                np.pad(np.asarray(tokens, np.int32), fill),
                np.pad(np.asarray(ran, np.int32), fill),
                self.beside,
                model=self.model,
            )
        )
        return (
            hidden[:, :length],
            [x[:length] for x in logits],
            final[:length],
            [x[:length] for x in gates],
        )

    def draw(self, logits, key, position, sampling, at_exit):
        """(token, its log-probability at temperature 1) from one distribution."""
        ids = self.ids if at_exit else None
        real = logits if ids is None else logits[:-1]
        if sampling.temperature:
            noise = jax.random.gumbel(
                jax.random.fold_in(key, position), (self.model.config.vocab_size,)
            )
            noise = noise if ids is None else noise[ids]
            best = int(np.argmax(np.asarray(filtered(jnp.asarray(real), sampling) + noise)))
        else:
            best = int(real.argmax())
        return (best if ids is None else int(ids[best])), float(np.log(softmax(logits)[best]))

    def score(self, confidence, states, e, at, said):
        """An exit's score for the newest position, and what it says (None: it declines)."""
        hidden, exit_logits, _, gates = states
        logits = exit_logits[e][at]
        declines = self.ids is not None and logits.argmax() == len(logits) - 1
        best = None if declines else int(logits.argmax())
        edges = (0, *self.model.exits.points)
        if confidence == "similarity":
            a, b = hidden[edges[e], at], hidden[edges[e + 1], at]
            return a @ b / np.linalg.norm(a) / np.linalg.norm(b), best
        if confidence == "gate":
            return gates[e][at], best
        if declines:
            return -np.inf, best
        if confidence == "patience":
            before = [said[i] == best for i in reversed(range(e))]
            return [*before, False].index(False), best
        return SCORES[confidence](softmax(logits)), best

    def decode(self, prompt, policy, mode, new_tokens, key, stop_ids=(), sampling=GREEDY):
        """Lossy decoding of one prompt; with `policy` None, the full model's."""
        depths = self.model.exit_depths
        final, depth = len(depths) - 1, int(depths[-1])
        text, ran, out = list(prompt), [depth] * (len(prompt) - 1), Decoded([], [], [], [])
        account, through = 0.0, len(prompt)  # positions known to the last segment
        for step in range(new_tokens):
            at = len(text) - 1
            propagated = [*ran, depth] if mode.skipped == "propagate" else None
            states = self.states(text, propagated)
            leave, said = final, []
            out.scores.append([])
            for e in range(final if policy is not None and step else 0):
                score, best = self.score(policy.confidence, states, e, at, said)
                said.append(best)
                out.scores[-1].append(score)
                threshold = float(policy.thresholds[e])
                if policy.decay is not None and np.isfinite(threshold):
                    decayed = np.exp(-float(policy.decay) * step / new_tokens)
                    threshold = np.clip(0.9 * threshold + 0.1 * decayed, 0, 1)
                budget = policy.budget
                must = budget is not None and account + float(budget) < depths[e + 1]
                fits = mode.skipped == "propagate" or at + 2 - through <= mode.pending
                if leave == final and fits and (score >= threshold or must):
                    leave = e
            logits = [*states[1], states[2]][leave][at]
            token, log_prob = self.draw(logits, key, at + 1, sampling, leave != final)
            if policy is not None and policy.budget is not None and step:
                account += float(policy.budget) - depths[leave]
            if leave == final:
                through = at + 1
            ran.append(int(depths[leave]))
            text.append(token)
            out.tokens.append(token)
            out.exits.append(leave)
            out.log_probs.append(log_prob)
            if token in stop_ids:
                break
        return out


def mixed_policy(
    model, params, prompt, mode, confidence="max_prob", length=24, beside=None, **fields
):
    """A policy with which the positions after `prompt` leave at every exit, the final included;
    of three exits or more, one may be left out."""
    slow = SlowDecoder(model, params, **(beside or {}))
    key = jax.random.split(jax.random.key(0), 1)[0]
    exits = len(model.exits.points)
    never = policies.never(exits, confidence)
    scores = np.array(slow.decode(prompt, never, mode, length, key).scores[1:], np.float64)
    finite = np.where(np.isfinite(scores), scores, np.nan)
    nearly = None
    for quantiles in itertools.product((0.7, 0.5, 0.85, 0.3, 0.95), repeat=exits):
        thresholds = [np.nanquantile(finite[:, e], q) for e, q in enumerate(quantiles)]
        policy = policies.make(thresholds, confidence, **fields)
        left = slow.decode(prompt, policy, mode, length, key).exits[1:]
        if set(left) == set(range(exits + 1)):
            return policy
        if exits > 2 and len(set(left)) == exits:  # scores of neighbours may be too much alike
            nearly = policy
    assert nearly is not None, "no thresholds make positions leave at every exit"
    return nearly
