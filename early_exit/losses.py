"""Per-exit, per-position losses whose memory grows neither with the vocabulary nor the exits.

The one idea: a cross-entropy needs of the vocabulary only running sums, so the output matrices
are read in chunks of rows inside a rematerialised scan. Logits exist for one chunk at a time,
forward and backward; automatic differentiation does the rest. Where the rows of the matrices are
split over devices, each chunk has as many of every part: all devices work on all chunks, and none
needs another's rows.

Shapes: N positions, D features, V vocabulary, C classes of a head (V, or R + 1 with "none of
these" last), E exits.
"""

from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp

from early_exit.backbones.base import PLAIN, LogitRule, logits

# Columns of logits that a device holds at a time, all exits together: with 2048 positions, 32 MiB.
CHUNK = 4096
# Instead of 0, where a logarithm is taken.
_TINY = float(jnp.finfo(jnp.float32).tiny)


class TopK(NamedTuple):
    """What was kept of a teacher: its most probable tokens, the first first.

    Attributes:
      ids: int32 [N, K], all different at each position.
      log_probs: float32 [N, K], in nats; together their probabilities are 1 at most.
    """

    ids: jax.Array
    log_probs: jax.Array


def _chunk_size(rows: int, most: int) -> int:
    """At most `most`; a divisor of `rows` if a fair one exists, as padding copies the matrix."""
    most = max(min(most, rows), 1)
    divisors = (size for size in range(most, most // 2, -1) if rows % size == 0)
    return next(divisors, most)


def _chunked(rows: jax.Array, most: int, parts: int = 1) -> jax.Array:
    """[C, …] → [chunks, parts · size, …] with size ≤ `most`, padded with zeros.

    Callers mask the padding. `parts` is how many parts the rows lie in, if it divides them.
    """
    parts = 1 if rows.shape[0] % parts else parts
    rows = rows.reshape(parts, -1, *rows.shape[1:])
    size = _chunk_size(rows.shape[1], most)
    padding = [(0, 0)] * rows.ndim
    padding[1] = (0, -rows.shape[1] % size)
    rows = jnp.pad(rows, padding).reshape(parts, -1, size, *rows.shape[2:])
    return rows.swapaxes(0, 1).reshape(-1, parts * size, *rows.shape[3:])


def _fold(peak_N, totals, values_NC, *among):
    """Adds a chunk of logits to running log-sum-exps with one peak.

    Args:
      totals: of all classes, then of each of `among`, bool [N, C].
    """
    new_peak = jnp.maximum(peak_N, values_NC.max(-1))
    scale, exponentials = jnp.exp(peak_N - new_peak), jnp.exp(values_NC - new_peak[:, None])
    shares = [exponentials, *(jnp.where(some, exponentials, 0.0) for some in among)]
    sums = [t * scale + x.sum(-1) for t, x in zip(totals, shares, strict=True)]
    return new_peak, sums


def log_normalizer(
    features_ND: jax.Array,
    table_VD: jax.Array,
    chunk: int = CHUNK,
    parts: int = 1,
    rule: LogitRule = PLAIN,
) -> jax.Array:
    """log Σ_v exp(rule(features · table_v)), float32 [N]; the others as in `exit_losses`."""
    valid = _chunked(jnp.ones(table_VD.shape[0], bool), chunk, parts)

    def body(carry, xs):
        rows, valid = xs
        values = jnp.where(valid[None], logits(features_ND, rows, rule=rule), -jnp.inf)
        return _fold(*carry, values), None

    start = jnp.full(features_ND.shape[0], -jnp.inf), [jnp.zeros(features_ND.shape[0])]
    slices = _chunked(table_VD, chunk, parts), valid
    (peak, (total,)), _ = jax.lax.scan(jax.checkpoint(body), start, slices)
    return peak + jnp.log(total)


def exit_losses(
    features: Sequence[jax.Array],
    tables: Sequence[jax.Array],
    *,
    labels: jax.Array | None = None,
    teacher: tuple[jax.Array, jax.Array] | TopK | None = None,
    token_ids: jax.Array | None = None,
    chunk: int = CHUNK,
    parts: int = 1,
    by_confidence: bool = False,
    rule: LogitRule = PLAIN,
) -> jax.Array:
    """Loss of every exit at every position, float32 [E, N], in nats.

    Against `labels` it is the cross-entropy; against a `teacher` KL(teacher ‖ exit), self-
    distillation from the final exit (Valade 2024; Jamialahmadi et al. 2025, Balcony). A reduced
    head is compared with the target's probability on its own tokens and on all others together.
    Against a teacher's top-K it is the least KL that a teacher with this top-K can have: of a head
    that predicts all tokens, KL over the K tokens and all others together.

    Args:
      features: per exit, [N, D].
      tables: per exit, its output matrix [C, D]; all exits have the same classes.
      labels: int32 [N], token ids.
      teacher: (features [N, D], output matrix [V, D]) of the distribution to match, or its top-K.
        No gradient flows into it.
      token_ids: int32 [R], the tokens that the first R rows of `tables` stand for, if reduced.
      chunk: columns of logits that a device holds at a time, all exits together.
      parts: over how many devices the rows of the output matrices are split.
      by_confidence: each loss is multiplied by the exit's highest probability of a token at its
        position, through which no gradient flows.
      rule: how logits follow from products, the network's.

    Raises:
      ValueError: not exactly one of labels and teacher.
    """
    if (labels is None) == (teacher is None):
        raise ValueError("give exit_losses either labels or a teacher")
    reduced, sparse = token_ids is not None, isinstance(teacher, TopK)
    classes = tables[0].shape[0] - reduced
    own = 1 if reduced else parts  # with a row for the rest, no head's matrix is split
    most, count = chunk // len(features), features[0].shape[0]
    ids = jnp.arange(classes) if token_ids is None else token_ids
    # Padding has id −1: no label equals it, and every logit there is masked.
    slices = {
        "ids": _chunked(ids + 1, most, own) - 1,
        "tables": [_chunked(table[:classes], most, own) for table in tables],
    }
    if sparse:
        teacher = _proper(jax.lax.stop_gradient(teacher), classes if not reduced else None)
        places_NK = _places(teacher.ids, slices["ids"])
        slices["first"] = jnp.arange(slices["ids"].size, step=slices["ids"].shape[1])
    elif teacher is not None:
        teacher_features, teacher_table = jax.lax.stop_gradient(teacher)
        normalizer = log_normalizer(teacher_features, teacher_table, parts=parts, rule=rule)
        rows = teacher_table[token_ids] if reduced else teacher_table
        slices["teacher"] = _chunked(rows, most, own)

    def target(xs):
        """The target's (probability, log-probability) on this chunk's tokens, [N, chunk]."""
        if labels is not None:
            return (labels[:, None] == xs["ids"][None]).astype(jnp.float32), 0.0
        if sparse:
            log_probs = _spread(teacher.log_probs, places_NK - xs["first"], len(xs["ids"]))
            probs = jnp.exp(log_probs)
            return probs, jnp.where(probs > 0, log_probs, 0.0)
        log_probs = logits(teacher_features, xs["teacher"], rule=rule) - normalizer[:, None]
        return jnp.exp(log_probs), log_probs

    def body(carry, xs):
        mass, negentropy, exits = carry
        valid = (xs["ids"] >= 0)[None]
        probs, log_probs = target(xs)
        probs = jnp.where(valid, probs, 0.0)
        unknown = [probs == 0] if sparse else []
        folded = []
        for (peak, totals, cross), feature, table in zip(
            exits, features, xs["tables"], strict=True
        ):
            values = logits(feature, table, rule=rule)
            cross = cross + (probs * values).sum(-1)
            values = jnp.where(valid, values, -jnp.inf)
            folded.append((*_fold(peak, totals, values, *unknown), cross))
        return (mass + probs.sum(-1), negentropy + (probs * log_probs).sum(-1), folded), None

    zeros = jnp.zeros(count)
    start = zeros, zeros, [(jnp.full(count, -jnp.inf), [zeros] * (1 + sparse), zeros)] * len(tables)
    (mass, negentropy, exits), _ = jax.lax.scan(jax.checkpoint(body), start, slices)

    found = []
    for (peak, totals, cross), feature, table in zip(exits, features, tables, strict=True):
        normalizer_e, none = peak + jnp.log(totals[0]), None
        if reduced:
            none = logits(feature, table[-1:], rule=rule)[:, 0]
            normalizer_e = jnp.logaddexp(normalizer_e, none)
            none = none - normalizer_e
        loss = mass * normalizer_e - cross + negentropy
        if sparse:
            others = peak + jnp.log(jnp.maximum(totals[1], _TINY)) - normalizer_e
            loss += _least_left(teacher, mass, none, others)
        elif reduced:  # what the target leaves to "none of these"
            rest = jnp.clip(1 - mass, 0.0)
            loss += jax.scipy.special.xlogy(rest, rest) - rest * none
        if by_confidence:
            loss *= jax.lax.stop_gradient(jnp.exp(peak - normalizer_e))
        found.append(loss)
    return jnp.stack(found)


def _proper(teacher: TopK, vocabulary: int | None) -> TopK:
    """Without what rounding has done: probabilities of 1 together, or less if some are left out."""
    together = jax.nn.logsumexp(teacher.log_probs, axis=-1, keepdims=True)
    if teacher.ids.shape[1] != vocabulary:
        together = jnp.maximum(together, 0.0)
    return teacher._replace(log_probs=teacher.log_probs - together)


def _places(tokens_NK: jax.Array, ids: jax.Array) -> jax.Array:
    """Where each token stands in `ids`, all chunks in a row: int32 [N, K], past the end if not."""
    ids = ids.reshape(-1)
    order = jnp.argsort(ids)
    at = jnp.searchsorted(ids[order], tokens_NK)
    at = order[jnp.minimum(at, ids.size - 1)]
    return jnp.where(ids[at] == tokens_NK, at, ids.size)


def _spread(values_NK: jax.Array, columns_NK: jax.Array, width: int) -> jax.Array:
    """[N, width] with each value in its column, if it has one there, and −∞ elsewhere."""
    columns_NK = jnp.where(columns_NK < 0, width, columns_NK)  # from the end, otherwise

    def one(values, columns):
        return jnp.full(width, -jnp.inf).at[columns].set(values, mode="drop")

    return jax.vmap(one)(values_NK, columns_NK)


def _least_left(teacher: TopK, mass_N, log_none_N, log_others_N) -> jax.Array:
    """The part of KL beyond the tokens that teacher and head both name: the least it can be, [N].

    The head gives to "none of these" (None if it has no such class) and to its tokens outside the
    top-K. The teacher gives `known` to other tokens of the top-K, hence to none of these, and its
    tail to either, no one knows in what shares: those that suit the head best, if it gives to none
    of these at least what is known.
    """
    kept = jnp.exp(teacher.log_probs).sum(-1)
    tail, known = jnp.clip(1 - kept, 0.0), jnp.clip(kept - mass_N, 0.0)
    xlogy = jax.scipy.special.xlogy
    if log_none_N is None:
        return xlogy(tail, tail) - tail * log_others_N
    both, log_both = known + tail, jnp.logaddexp(log_none_N, log_others_N)
    suits = known <= both * jnp.exp(log_none_N - log_both)
    apart = xlogy(known, known) - known * log_none_N + xlogy(tail, tail) - tail * log_others_N
    return jnp.where(suits, xlogy(both, both) - both * log_both, apart)


def class_losses(
    logits: Sequence[jax.Array],
    *,
    labels: jax.Array | None = None,
    teacher: jax.Array | None = None,
    by_confidence: bool = False,
) -> jax.Array:
    """Loss of every exit of a classifier on every example, float32 [E, N], in nats.

    The same losses as `exit_losses`, where there are few enough classes to hold all logits.

    Args:
      logits: per exit, [N, C].
      labels: int32 [N].
      teacher: logits [N, C] of the distribution to match. No gradient flows into it.
      by_confidence: as for `exit_losses`.

    Raises:
      ValueError: not exactly one of labels and teacher.
    """
    if (labels is None) == (teacher is None):
        raise ValueError("give class_losses either labels or a teacher")
    log_probs_ENC = jax.nn.log_softmax(jnp.stack(logits))
    if teacher is None:
        losses_EN = -jnp.take_along_axis(log_probs_ENC, labels[None, :, None], axis=-1)[..., 0]
    else:
        target_NC = jax.nn.log_softmax(jax.lax.stop_gradient(teacher))
        losses_EN = (jnp.exp(target_NC)[None] * (target_NC[None] - log_probs_ENC)).sum(-1)
    if by_confidence:
        losses_EN *= jax.lax.stop_gradient(jnp.exp(log_probs_ENC.max(-1)))
    return losses_EN


def right(
    features: Sequence[jax.Array],
    tables: Sequence[jax.Array],
    *,
    labels: jax.Array | None = None,
    teacher: tuple[jax.Array, jax.Array] | TopK | None = None,
    token_ids: jax.Array | None = None,
    chunk: int = CHUNK,
    parts: int = 1,
) -> jax.Array:
    """Whether every exit's best token is the target's, bool [E, N]; the arguments of `exit_losses`.

    Against `labels` that is accuracy, against a `teacher` agreement. A reduced head whose most
    probable class is "none of these" is right nowhere. A network's rule for logits keeps their
    order, so none is asked for.
    """
    if isinstance(teacher, TopK):
        target = teacher.ids[:, 0]
    else:
        target = labels if teacher is None else _best(*teacher, chunk, parts)[1]
    found = []
    for feature, table in zip(features, tables, strict=True):
        peak, best = _best(feature, table if token_ids is None else table[:-1], chunk, parts)
        if token_ids is not None:
            declines = logits(feature, table[-1:])[:, 0] > peak
            best = jnp.where(declines, -1, token_ids[best])
        found.append(best == target)
    return jnp.stack(found)


def _best(features_ND, table_CD, chunk: int, parts: int) -> tuple[jax.Array, jax.Array]:
    """(the greatest logit, its row of the table), [N] each."""
    ids = _chunked(jnp.arange(table_CD.shape[0]) + 1, chunk, parts) - 1

    def body(best, xs):
        table, ids = xs
        values = jnp.where((ids >= 0)[None], logits(features_ND, table), -jnp.inf)
        here = values.max(-1)
        better = here > best[0]
        index = jnp.where(better, ids[values.argmax(-1)], best[1])
        return (jnp.where(better, here, best[0]), index), None

    count = features_ND.shape[0]
    start = jnp.full(count, -jnp.inf), jnp.zeros(count, jnp.int32)
    return jax.lax.scan(body, start, (_chunked(table_CD, chunk, parts), ids))[0]


def gate_losses(logits_EN: jax.Array, right_EN: jax.Array, mask_N: jax.Array) -> jax.Array:
    """Binary cross-entropy of each exit's gate with "this head is right", float32 [E].

    Balanced: where heads are right and where they are not weigh half each, whatever their shares.

    Args:
      logits_EN: the gates' logits.
      right_EN: bool.
      mask_N: bool, positions that count.
    """
    losses = jnp.where(right_EN, jax.nn.softplus(-logits_EN), jax.nn.softplus(logits_EN))
    halves = [right_EN & mask_N[None], ~right_EN & mask_N[None]]
    return sum((losses * half).sum(-1) / jnp.maximum(half.sum(-1), 1) for half in halves) / 2
