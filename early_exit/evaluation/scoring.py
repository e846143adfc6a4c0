"""How likely a given text is, token by token: to the full model, under a policy, or to one exit.

The one idea: where a text is given, its positions need not wait for each other, and each can still
be treated as decoding would treat it. What later positions see of one is made, block by block, of
the state in which it stands there; so one that has left keeps its state, and all go on together.
What a mode says of a given text is then exact:

    lossy      each token as lossy decoding would have judged it after the same text: what a
               position skips gets keys and values projected from the state that it left with
    deferred   the same of deferred decoding, its limit of positions that wait included; keys and
               values are the full model's
    verified   the full model's scores, for its answer is
    None       each position for itself, as in records: the full model's keys and values, no limit

Every block is run for every position, so scores take the full model's time in any mode.
"""

import dataclasses
import functools
import math
from collections.abc import Iterator, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from early_exit import confidence as confidences
from early_exit import consult, precision, sharding
from early_exit.backbones import base
from early_exit.data import pairs
from early_exit.data.pairs import row_of
from early_exit.decoding.mode import LOSSY, Mode
from early_exit.decoding.state import check_ids
from early_exit.evaluation.exits import said_of
from early_exit.exits.multi_exit import Bound, MultiExit
from early_exit.policy import ExitPolicy

# Token ids of a text that is given, and of what follows it and is scored.
Pair = tuple[Sequence[int], Sequence[int]]

_LEAST_LENGTH, _LEAST_SCORED = 32, 8
_READ = ("tokens", "prompt", "prompt_real")  # by the network, of a batch


@dataclasses.dataclass(frozen=True)
class Scores:
    """What is said of the n scored tokens of one text.

    Attributes:
      log_probs: float32 [n], of each token at temperature 1, where the position before it leaves.
      chosen: bool [n], whether it is the one that greedy decoding would have chosen there.
      best: int32 [n], the one that it would have chosen.
      best_log_probs: float32 [n], of that one, after the policy's temperatures.
      exits: int32 [n], where that position leaves; E is the full model.
    """

    log_probs: np.ndarray
    chosen: np.ndarray
    best: np.ndarray
    best_log_probs: np.ndarray
    exits: np.ndarray


def score(
    model: MultiExit,
    params: base.Params,
    texts: Sequence[Pair],
    *,
    policy: ExitPolicy | None = None,
    mode: Mode | None = LOSSY,
    batch: int = 8,
    first_leaves: bool = False,
    limits: Sequence[int] | None = None,
) -> list[Scores]:
    """Scores what follows each given text, token by token.

    A reduced head shares out what it leaves to "none of these" evenly among the tokens that it
    does not know, so that every token has a probability. A recurrent exit judges no given text.

    Args:
      texts: (given, scored) token ids, both not empty. One token more than the context holds is
        allowed, for nothing follows the last one.
      policy: when positions leave; None for the full model. All leave at exit e by
        `policy.forced(E, e)`, with `first_leaves` and without a mode.
      mode: see above; of a verified one, the policy is not asked.
      batch: texts in one pass, which are alike in length. What a text gets does not depend on it.
      first_leaves: whether the first scored token may come from an exit, too. In decoding it never
        does: the pass over the prompt runs every block.
      limits: how many tokens each answer could have had, for thresholds that decay over it; as
        many as are scored, if not given.

    Raises:
      ValueError: no texts, one that is empty, too long or of no tokens of the model; a policy for
        other exits; or one with a budget, which hangs on what an answer has cost so far.
    """
    if not len(texts):
        raise ValueError("there is no text to score; give at least one")
    for i, (given, scored) in enumerate(texts):
        _check(model, given, scored, f"text {i}")
    if mode is not None and mode.verified:
        policy = None
    if policy is not None:
        policy.check(model.exit_depths, model.confidences)
        if policy.budget is not None:
            raise ValueError(
                "a policy with a budget hangs on what the answer has cost so far, and scores no "
                "given text; decode with it, or take one without a budget"
            )
    shortest_first = sorted(range(len(texts)), key=lambda i: (_length(texts[i]), i))
    found: dict[int, Scores] = {}
    mesh = sharding.mesh_of(params)
    for start in range(0, len(texts), batch):
        rows = shortest_first[start : start + batch]
        padded = _padded(model.config, [texts[i] for i in rows], min(batch, len(texts)))
        most = [len(texts[i][1]) if limits is None else limits[i] for i in rows]
        padded["limit"] = np.array(most + [1] * (len(padded["count"]) - len(rows)), np.int32)
        out = sharding.fetch(
            score_batch(
                params,
                sharding.place_rows(padded, mesh),
                policy,
                first_leaves,
                model=model,
                width=_bucket(max(len(texts[i][1]) for i in rows), _LEAST_SCORED),
                propagates=mode is not None and mode.propagates,
                pending=None if mode is None or mode.propagates else mode.pending,
            )
        )
        for row, i in enumerate(rows):
            kept = {name: x[row, : len(texts[i][1])] for name, x in out.items()}
            found[i] = Scores(**kept)
    return [found[i] for i in range(len(texts))]


def rolling(tokens: Sequence[int], prefix: int, context: int) -> Iterator[Pair]:
    """A text of any length as pairs to be scored: each token once, after as many as there is room
    for.

    Args:
      prefix: the token that stands before the first.
      context: of the model, in tokens.
    """
    tokens = [prefix, *tokens]
    scored = 1
    while scored < len(tokens):
        end = min(len(tokens), scored + context)
        yield tokens[max(0, end - context - 1) : scored], tokens[scored:end]
        scored = end


@functools.partial(jax.jit, static_argnames=("model", "width", "propagates", "pending"))
@precision.exact
@sharding.laid_out
def score_batch(
    params: base.Params,
    batch: dict,
    policy: ExitPolicy | None,
    first_leaves: bool,
    *,
    model: MultiExit,
    width: int,
    propagates: bool,
    pending: int | None,
) -> dict:
    """`Scores` of the `width` tokens [B, C] from each row's first scored one on, as a dict.

    Args:
      batch: `tokens` int32 [B, T], and `prompt` and `prompt_real` where an encoder reads what is
        given (`data.pairs`); `first`, `count`, `limit` int32 [B], where the scored tokens
        begin, how many there are, and how many there could be.
      propagates: whether skipped blocks get projected keys and values.
      pending: how many positions may be under way at once; None for any number.
    """
    bound, where = model.bind(params), _Where.of(batch, width, first_leaves)
    read = {name: x for name, x in batch.items() if name in _READ}
    before, context = bound.backbone.stem(read)
    left_BT = jnp.zeros(batch["tokens"].shape, bool)
    said = consult.Said.nothing(where.at_BC.shape)
    heard, leaves = [], []  # of each exit that is asked
    exits = () if policy is None else model.segments[:-1]
    tables, rule = bound.exit_tables() if exits else (), model.config.logit_rule
    unknown = model.config.vocab_size - model.exits.classes
    for e, (start, stop) in enumerate(exits):
        after = _run(bound, before, start, stop, context, left_BT)
        features = where.of_interest(bound.heads[e].features(after, context)[0])
        temperature = None if policy.temperatures is None else policy.temperatures[e]
        summary, *rest = _hear(
            where, features, tables[e], rule, bound.token_ids, temperature, unknown
        )
        heard.append(rest)
        said = said.then(summary)
        if policy.confidence in confidences.FROM_LOGITS:
            score_BC = consult.score(policy.confidence, summary, said)
        else:
            states = where.of_interest(before), where.of_interest(after)
            score_BC = consult.hidden_score(policy.confidence, bound, e, *states)
        leaves.append(where.may_BC & policy.leaves(e, score_BC, where.progress_BC))
        if propagates:
            left_BT |= where.spread(leaves[-1], left_BT.shape[1])
        before = after
    start = exits[-1][1] if exits else 0
    after = _run(bound, before, start, model.config.depth, context, left_BT)
    features = bound.backbone.features(where.of_interest(after))
    heard.append(_hear(where, features, bound.backbone.output_table(), rule)[1:])

    taken_BC = jnp.argmax(jnp.stack([*leaves, jnp.ones_like(where.may_BC)]), axis=0)
    if pending is not None:
        taken_BC = _with_room(taken_BC, len(exits), pending)
    log_probs, best, best_log_probs = (
        jnp.take_along_axis(jnp.stack(of_exits), taken_BC[None], axis=0)[0]
        for of_exits in zip(*heard, strict=True)
    )
    return {
        "log_probs": log_probs,
        "chosen": best == where.labels_BC,
        "best": best,
        "best_log_probs": best_log_probs,
        "exits": jnp.where(taken_BC == len(exits), len(model.segments) - 1, taken_BC),
    }


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class _Where:
    """The positions that score something, [B, C]: those just before each scored token.

    Attributes:
      at_BC: int32, where they are.
      labels_BC: int32, the tokens behind them.
      may_BC: bool, whether they may leave early; not where nothing is scored.
      progress_BC: float32, how far through its answer a row is.
    """

    at_BC: jax.Array
    labels_BC: jax.Array
    may_BC: jax.Array
    progress_BC: jax.Array

    @classmethod
    def of(cls, batch: dict, width: int, first_leaves: bool) -> "_Where":
        tokens_BT, counts_B1 = batch["tokens"], batch["count"][:, None]
        last = tokens_BT.shape[1] - 1
        offsets_BC = jnp.broadcast_to(jnp.arange(width)[None], (len(tokens_BT), width))
        at_BC = batch["first"][:, None] - 1 + offsets_BC
        following = jnp.take_along_axis(tokens_BT, jnp.minimum(at_BC + 1, last), axis=1)
        may_BC = (offsets_BC < counts_B1) & ((offsets_BC > 0) | first_leaves)
        return cls(at_BC, following, may_BC, offsets_BC / batch["limit"][:, None])

    def of_interest(self, x_BTD: jax.Array) -> jax.Array:
        """[B, T, D] → [B, C, D], at these positions."""
        at_BC = jnp.minimum(self.at_BC, x_BTD.shape[1] - 1)
        return jnp.take_along_axis(x_BTD, at_BC[:, :, None], axis=1)

    def spread(self, x_BC: jax.Array, length: int) -> jax.Array:
        """bool [B, C] → [B, length], false elsewhere."""
        offset_BT = jnp.arange(length)[None] - self.at_BC[:, :1]
        inside = (offset_BT >= 0) & (offset_BT < x_BC.shape[1])
        return inside & jnp.take_along_axis(x_BC, offset_BT.clip(0, x_BC.shape[1] - 1), axis=1)


def _run(bound: Bound, hidden, start: int, stop: int, context, left_BT) -> jax.Array:
    """Hidden states after some blocks; those of positions that have left stay, and are seen."""
    for block in range(start, stop):
        deeper = bound.backbone.run_blocks(hidden, block, block + 1, context)
        hidden = jnp.where(left_BT[:, :, None], hidden, deeper)
    return hidden


def _hear(
    where: _Where,
    features_BCD,
    table,
    rule: base.LogitRule,
    token_ids=None,
    temperature=None,
    unknown: int = 0,
):
    """What a head says: (summary, log-probability of each label, its choice, that one's).

    Args:
      rule: the network's, for logits.
      unknown: how many tokens a reduced head, with `token_ids`, does not know.
    """
    labels_BC = where.labels_BC
    heard, loss, _ = said_of(
        features_BCD, table, token_ids, labels_BC.reshape(-1), rule, temperature=temperature
    )
    summary = jax.tree.map(lambda x: x.reshape(labels_BC.shape), heard)
    log_prob_BC = -loss.reshape(labels_BC.shape)
    if token_ids is not None:  # many tokens are of one class, "none of these"
        known_BC = jnp.isin(labels_BC, token_ids)
        log_prob_BC -= jnp.where(known_BC, 0.0, math.log(unknown))
    return summary, log_prob_BC, summary.prediction, summary.top


def _with_room(exits_BC: jax.Array, final: int, pending: int) -> jax.Array:
    """The exits where no more positions wait than there is room for (`Mode.pending`)."""

    def one(waiting_B, exit_B):
        leaves_B = (exit_B < final) & (waiting_B + 2 <= pending)
        return jnp.where(leaves_B, waiting_B + 1, 0), jnp.where(leaves_B, exit_B, final)

    nobody = jnp.zeros(len(exits_BC), jnp.int32)
    return jax.lax.scan(one, nobody, exits_BC.T)[1].T


def _check(model: MultiExit, given: Sequence[int], scored: Sequence[int], name: str) -> None:
    for part, ids in (("given", given), ("scored", scored)):
        check_ids(model, ids, f"{name}, {part}")
        if not len(ids):
            raise ValueError(f"{name} has no {part} tokens; give at least one of each")
    row = len(row_of(model.config, given))
    length, most = max(row + len(scored), len(given)), model.config.context_length + 1
    if length > most:
        raise ValueError(
            f"{name} has {length} tokens, but after a context of {most - 1} only one more can be "
            "scored; shorten what is given"
        )


def _length(pair: Pair) -> int:
    return len(pair[0]) + len(pair[1])


def _padded(network: base.BackboneConfig, texts: Sequence[Pair], rows: int) -> dict:
    """A batch for `score_batch`; rows that there are no texts for score nothing."""
    longest = _bucket(max(map(_length, texts)), _LEAST_LENGTH)
    found = pairs.batch(network, texts, longest, rows, longest)
    first, count = np.ones(rows, np.int32), np.zeros(rows, np.int32)
    for row, (given, scored) in enumerate(texts):
        first[row], count[row] = len(row_of(network, given)), len(scored)
    read = {name: x for name, x in found.items() if name in _READ}
    return read | {"first": first, "count": count}


def _bucket(size: int, least: int) -> int:
    """A power of two, so that few programs are compiled."""
    return max(least, 1 << (size - 1).bit_length())
