"""Chunked losses against dense ones in float64 numpy, and their memory."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from early_exit import losses
from early_exit.backbones.base import LogitRule

N, D, MOST = 7, 5, 30  # positions, features, tokens at most

exit_losses = jax.jit(losses.exit_losses, static_argnames=("chunk", "rule"))


def case(vocab, exits=1, reduced=0, scale=1.0, seed=0):
    """Random features and matrices; the keyword arguments of `exit_losses` but the target."""
    rng = np.random.default_rng(seed)

    def draw(*shape):
        return jnp.asarray(rng.standard_normal(shape) * scale, jnp.float32)

    ids = jnp.asarray(rng.permutation(vocab)[:reduced], jnp.int32) if reduced else None
    rows = reduced + 1 if reduced else vocab
    return {
        "features": [draw(N, D) for _ in range(exits)],
        "tables": [draw(rows, D) for _ in range(exits)],
        "labels": jnp.asarray(rng.integers(0, vocab, N), jnp.int32),
        "teacher": (draw(N, D), draw(vocab, D)),
        "token_ids": ids,
    }


def pick(inputs, target):
    return {k: v for k, v in inputs.items() if k not in {"labels", "teacher"} - {target}}


def log_softmax(x):
    x = x - x.max(-1, keepdims=True)
    return x - np.log(np.exp(x).sum(-1, keepdims=True))


def dense(
    features, tables, *, labels=None, teacher=None, token_ids=None, rule=lambda products: products
):
    """The same loss in float64, by its definition: KL(target ‖ exit) over the exit's classes."""
    as64 = functools.partial(np.asarray, dtype=np.float64)
    if teacher is not None:
        target = np.exp(log_softmax(rule(as64(teacher[0]) @ as64(teacher[1]).T)))
    else:
        target = np.eye(MOST)[np.asarray(labels)]
    kept = np.arange(len(tables[0])) if token_ids is None else np.asarray(token_ids)
    rest = np.delete(target, kept, axis=1).sum(1, keepdims=True)
    target = target[:, kept]
    if token_ids is not None:
        target = np.concatenate([target, rest], axis=1)
    positive = target > 0
    negentropy = np.where(positive, target * np.log(np.where(positive, target, 1)), 0).sum(-1)
    return np.stack(
        [
            negentropy - np.where(positive, target * log_softmax(values), 0).sum(-1)
            for values in (rule(as64(f) @ as64(t).T) for f, t in zip(features, tables, strict=True))
        ]
    )


@pytest.mark.parametrize("target", ["labels", "teacher"])
@pytest.mark.parametrize(
    ("vocab", "exits", "reduced", "chunk"),
    [
        (12, 1, 0, 100),  # one chunk
        (12, 3, 0, 12),  # a divisor for each exit's share
        (23, 2, 0, 16),  # a prime: padded
        (23, 1, 0, 1),  # a row at a time
        (23, 3, 0, 1),  # less than a row for each exit
        (30, 2, 11, 8),  # reduced to a prime number of tokens
        (30, 1, 12, 5),
        (30, 2, 1, 7),  # one token, or none of these
        (30, 1, 29, 8),  # "none of these" stands for one token
    ],
)
def test_losses_equal_dense_ones(vocab, exits, reduced, chunk, target):
    inputs = pick(case(vocab, exits, reduced), target)
    got = exit_losses(**inputs, chunk=chunk)
    assert got.shape == (exits, N) and got.dtype == jnp.float32
    np.testing.assert_allclose(got, dense(**inputs), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("reduced", [0, 11])
@pytest.mark.parametrize("target", ["labels", "teacher"])
@pytest.mark.parametrize(("divisor", "cap"), [(3.0, None), (1.0, 1.5), (0.5, 2.0)])
def test_logits_follow_the_network_s_rule(divisor, cap, target, reduced):
    """In the exits, in the teacher, and in "none of these"."""
    inputs = pick(case(MOST, 2, reduced), target)
    got = exit_losses(**inputs, chunk=8, rule=LogitRule(divisor, cap))

    def rule(products):
        return products / divisor if cap is None else cap * np.tanh(products / divisor / cap)

    np.testing.assert_allclose(got, dense(**inputs, rule=rule), atol=1e-5, rtol=1e-5)
    assert np.abs(got - dense(**inputs)).max() > 0.1


@pytest.mark.parametrize("target", ["labels", "teacher"])
@pytest.mark.parametrize(
    ("vocab", "reduced", "chunk", "parts"),
    [
        (24, 0, 6, 4),  # two chunks of three rows from each part
        (21, 0, 8, 3),  # parts of a prime number of rows: each padded
        (23, 0, 8, 3),  # no whole parts
        (30, 11, 8, 3),  # the teacher's alone
    ],
)
def test_it_does_not_matter_in_how_many_parts_the_rows_lie(vocab, reduced, chunk, parts, target):
    inputs = pick(case(vocab, 2, reduced), target)
    got = losses.exit_losses(**inputs, chunk=chunk, parts=parts)
    np.testing.assert_allclose(got, dense(**inputs), atol=1e-5, rtol=1e-5)
    right = losses.right(**inputs, chunk=chunk, parts=parts)
    np.testing.assert_array_equal(right, losses.right(**inputs))


@pytest.mark.parametrize("reduced", [0, 11])
@pytest.mark.parametrize(
    ("extreme", "target"), [("exits", "labels"), ("exits", "teacher"), ("teacher", "teacher")]
)
def test_extreme_logits(extreme, target, reduced):
    """Logits of some ±1e4, where any exponential that is not shifted overflows."""
    inputs, large = (pick(case(23, 2, reduced, scale), target) for scale in (1, 60))
    names = ("features", "tables") if extreme == "exits" else ("teacher",)
    inputs |= {name: large[name] for name in names}
    values = [np.abs(f @ t.T) for f, t in zip(inputs["features"], inputs["tables"], strict=True)]
    largest = max(x.max() for x in values)
    if extreme == "teacher":
        logits = np.abs(inputs["teacher"][0] @ inputs["teacher"][1].T)
        # The teacher's logits are rounded, so its probabilities are by this factor wrong.
        tolerance = 4 * logits.max() * 2**-23 * (1 + largest)
    else:
        logits = values[0]
        tolerance = 4 * largest * 2**-23
    assert logits.max() > 1e4
    got = exit_losses(**inputs, chunk=6)
    np.testing.assert_allclose(got, dense(**inputs), rtol=1e-5, atol=tolerance)
    gradients = jax.jit(
        jax.grad(lambda f: losses.exit_losses(**inputs | {"features": f}, chunk=6).sum())
    )(inputs["features"])
    assert all(np.isfinite(g).all() for g in gradients)


def test_log_normalizer_equals_a_dense_one():
    for vocab, chunk, scale in [(12, 4, 1), (23, 5, 1), (23, 1, 1), (23, 100, 60)]:
        features, table = case(vocab, scale=scale)["teacher"]
        values = np.asarray(features, np.float64) @ np.asarray(table, np.float64).T
        want = values[:, 0] - log_softmax(values)[:, 0]
        got = losses.log_normalizer(features, table, chunk)
        np.testing.assert_allclose(got, want, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("target", ["labels", "teacher"])
@pytest.mark.parametrize("reduced", [0, 11])
def test_gradients_equal_dense_ones(target, reduced):
    inputs = pick(case(23, 2, reduced), target)
    weights = jax.random.normal(jax.random.key(0), (2, N))  # another for every loss

    def chunked(features, tables):
        changed = inputs | {"features": features, "tables": tables}
        return jnp.vdot(weights, losses.exit_losses(**changed, chunk=8))

    def plain(features, tables):
        if target == "labels":
            probs = jax.nn.one_hot(inputs["labels"], 23)
        else:
            probs = jax.nn.softmax(inputs["teacher"][0] @ inputs["teacher"][1].T)
        if reduced:
            kept = probs[:, inputs["token_ids"]]
            probs = jnp.concatenate([kept, 1 - kept.sum(-1, keepdims=True)], axis=1)
        cross = [
            -(probs * jax.nn.log_softmax(f @ t.T)).sum(-1)
            for f, t in zip(features, tables, strict=True)
        ]
        return jnp.vdot(weights, jnp.stack(cross))

    arguments = inputs["features"], inputs["tables"]
    got = jax.jit(jax.grad(chunked, argnums=(0, 1)))(*arguments)
    want = jax.jit(jax.grad(plain, argnums=(0, 1)))(*arguments)
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5)


def test_no_gradient_flows_into_the_teacher():
    for reduced in (0, 5):
        inputs = pick(case(12, 2, reduced), "teacher")
        gradients = jax.grad(lambda t, i=inputs: exit_losses(**i | {"teacher": t}).sum())(
            inputs["teacher"]
        )
        assert not any(g.any() for g in gradients)


@pytest.mark.parametrize("reduced", [0, 11])
def test_kl_is_zero_at_the_teacher_and_positive_elsewhere(reduced):
    inputs = pick(case(23, 3, reduced, seed=1), "teacher")
    features, table = inputs["teacher"]
    own = table
    if reduced:
        # The one more class gets what the teacher gives to all other tokens: with an output row
        # that reads a feature of its own, as a sum of exponentials is not linear in the features.
        others = np.setdiff1d(np.arange(23), inputs["token_ids"])
        rest = jax.nn.logsumexp(features @ table[others].T, axis=-1)
        features = jnp.concatenate([features, rest[:, None]], axis=1)
        own = jnp.pad(table[inputs["token_ids"]], ((0, 1), (0, 1))).at[-1, -1].set(1.0)
    else:
        features, own = features, table
    at_teacher = exit_losses(
        [features], [own], teacher=inputs["teacher"], token_ids=inputs["token_ids"], chunk=8
    )
    np.testing.assert_allclose(at_teacher, 0, atol=1e-5)
    elsewhere = exit_losses(**inputs, chunk=8)
    assert (np.asarray(elsewhere) > 1e-3).all()


def test_a_teacher_that_leaves_nothing_to_the_rest():
    """0 · log 0: all the teacher's mass on tokens that the head can predict."""
    inputs = pick(case(23, 1, 11), "teacher")
    features, table = inputs["teacher"]
    features = features.at[:, 0].set(1.0)
    # Every other token's logit falls by 1000, to a probability of exactly 0.
    others = np.setdiff1d(np.arange(23), inputs["token_ids"])
    inputs["teacher"] = features, table.at[others, 0].add(-1000.0)

    def loss(features):
        return losses.exit_losses(**inputs | {"features": features}, chunk=8).sum()

    got, gradients = jax.jit(jax.value_and_grad(loss))(inputs["features"])
    np.testing.assert_allclose(got, dense(**inputs).sum(), rtol=1e-5)
    assert np.isfinite(gradients[0]).all()


def top_k(teacher, count):
    """The most probable tokens of a teacher, as `losses.TopK`, from float64 logits."""
    features, table = (np.asarray(x, np.float64) for x in teacher)
    log_probs = log_softmax(features @ table.T)
    ids = np.argsort(-log_probs, axis=-1)[:, :count]
    return losses.TopK(
        jnp.asarray(ids, jnp.int32),
        jnp.asarray(np.take_along_axis(log_probs, ids, axis=-1), jnp.float32),
    )


def least(features, tables, *, teacher, token_ids=None, splits=20_001):
    """KL in float64, position by position; the teacher's tail goes where it costs least.

    Of a reduced head's answers, "none of these" may be meant, or a token outside the top-K: all
    shares of the tail are tried.
    """
    ids, kept = np.asarray(teacher.ids), np.exp(np.asarray(teacher.log_probs, np.float64))
    said = np.arange(MOST) if token_ids is None else np.asarray(token_ids)
    found = np.zeros((len(features), len(ids)))
    for e, (feature, table) in enumerate(zip(features, tables, strict=True)):
        log_probs = log_softmax(np.asarray(feature, np.float64) @ np.asarray(table, np.float64).T)
        for n, values in enumerate(np.exp(log_probs)):
            none = values[-1] if token_ids is not None else 0
            mine = dict(zip(said.tolist(), values, strict=False))
            both = [(p, mine.pop(i)) for i, p in zip(ids[n], kept[n], strict=True) if i in mine]
            found[e, n] = sum(p * np.log(p / q) for p, q in both)
            known = kept[n].sum() - sum(p for p, _ in both)
            tail, others = max(1 - kept[n].sum(), 0), sum(mine.values())
            shares = np.linspace(0, tail, splits) if token_ids is not None else np.zeros(1)
            to_none, to_others = known + shares, tail - shares
            with np.errstate(divide="ignore", invalid="ignore"):
                costs = [
                    np.where(p > 1e-9, p * np.log(p / q), 0)
                    for p, q in [(to_none, none), (to_others, others)]
                ]
            found[e, n] += min(sum(costs))
    return found


TOP_K_CASES = [
    (12, 1, 0, 100, 3),
    (23, 2, 0, 16, 1),
    (23, 3, 0, 4, 22),
    (30, 2, 11, 8, 6),
    (30, 1, 12, 5, 1),
    (30, 2, 1, 7, 20),
    (30, 1, 29, 8, 29),
]


@pytest.mark.parametrize(("vocab", "exits", "reduced", "chunk", "count"), TOP_K_CASES)
def test_a_teacher_known_in_part(vocab, exits, reduced, chunk, count):
    """It is the least KL that a teacher with this top-K can have; never more than the dense one."""
    inputs = pick(case(vocab, exits, reduced), "teacher")
    kept = inputs | {"teacher": top_k(inputs["teacher"], count)}
    got = exit_losses(**kept, chunk=chunk)
    assert got.shape == (exits, N) and got.dtype == jnp.float32
    np.testing.assert_allclose(got, least(**kept), atol=2e-5, rtol=1e-5)
    assert (got <= dense(**inputs) + 1e-5).all() and (got >= -1e-6).all()
    more = exit_losses(**inputs | {"teacher": top_k(inputs["teacher"], count + 1)}, chunk=chunk)
    assert (got <= more + 1e-5).all()


@pytest.mark.parametrize(("vocab", "reduced", "parts"), [(23, 0, 1), (24, 0, 4), (30, 11, 1)])
def test_a_teacher_known_whole_is_a_teacher(vocab, reduced, parts):
    inputs = pick(case(vocab, 2, reduced), "teacher")
    kept = inputs | {"teacher": top_k(inputs["teacher"], vocab)}
    got = losses.exit_losses(**kept, chunk=8, parts=parts)
    np.testing.assert_allclose(got, dense(**inputs), atol=2e-5, rtol=1e-5)
    right = losses.right(**inputs, chunk=8)
    np.testing.assert_array_equal(losses.right(**kept, chunk=8), right)


def test_top_k_in_half_precision_is_still_a_teacher():
    """Log-probabilities so rounded give up to a thousandth more than 1 together."""
    for reduced in (0, 11):
        inputs = pick(case(23, 2, reduced), "teacher")
        kept = top_k(inputs["teacher"], 23)
        kept = kept._replace(log_probs=kept.log_probs.astype(jnp.float16).astype(jnp.float32))
        got = exit_losses(**inputs | {"teacher": kept}, chunk=8)
        np.testing.assert_allclose(got, dense(**inputs), atol=1e-2)


@pytest.mark.parametrize("scale", [1, 60])
@pytest.mark.parametrize("reduced", [0, 11])
@pytest.mark.parametrize("count", [1, 5, 23])
def test_gradients_against_a_teacher_known_in_part(count, reduced, scale):
    """Slopes along the gradient, and with logits of ±1e4 at least numbers."""
    inputs = pick(case(23, 2, reduced, scale), "teacher")
    inputs["teacher"] = top_k(inputs["teacher"], count)
    weights = jax.random.normal(jax.random.key(0), (2, N))  # another for every loss

    @jax.jit
    def loss(features, tables):
        changed = inputs | {"features": features, "tables": tables}
        return jnp.vdot(weights, losses.exit_losses(**changed, chunk=8))

    where = inputs["features"], inputs["tables"]
    slopes = jax.grad(loss, argnums=(0, 1))(*where)
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(slopes))
    if scale == 1:
        size = optax.tree.norm(slopes)
        ahead, behind = (
            loss(*jax.tree.map(lambda x, s, d=d: x + d * s / size, where, slopes))
            for d in (1e-2, -1e-2)
        )
        np.testing.assert_allclose((ahead - behind) / 2e-2, size, rtol=5e-3)


@pytest.mark.parametrize("reduced", [0, 11])
def test_a_teacher_known_in_part_is_met_by_itself(reduced):
    """The loss and its gradient are zero where the head says what the teacher says."""
    probs = np.random.default_rng(1).dirichlet(np.full(12, 0.3))
    table, features = jnp.eye(12), jnp.log(jnp.asarray(probs, jnp.float32))[None]
    ids = np.argsort(-probs)[:5]
    teacher = losses.TopK(jnp.asarray(ids[None]), features[:, ids])
    token_ids = None
    if reduced:
        token_ids = jnp.asarray(np.argsort(-probs)[[0, 2, 3, 5, 7, 8, 9, 10, 11, 6]])
        rest = 1 - probs[token_ids].sum()
        kept = [*probs[token_ids], rest]
        table, features = jnp.eye(11), jnp.log(jnp.asarray(kept, jnp.float32))[None]

    def loss(features):
        how = {"teacher": teacher, "token_ids": token_ids, "chunk": 4}
        return losses.exit_losses([features], [table], **how).sum()

    value, slopes = jax.value_and_grad(loss)(features)
    np.testing.assert_allclose(value, 0, atol=1e-6)
    np.testing.assert_allclose(slopes, 0, atol=1e-6)


def who_is_right(features, tables, *, labels=None, teacher=None, token_ids=None):
    """The same by definition: the best of all logits in float64, per exit."""
    as64 = functools.partial(np.asarray, dtype=np.float64)
    target = labels if teacher is None else (as64(teacher[0]) @ as64(teacher[1]).T).argmax(-1)
    kept = np.arange(len(tables[0])) if token_ids is None else np.append(token_ids, -1)
    best = [(as64(f) @ as64(t).T).argmax(-1) for f, t in zip(features, tables, strict=True)]
    return np.stack([kept[b] == np.asarray(target) for b in best])


@pytest.mark.parametrize("target", ["labels", "teacher"])
@pytest.mark.parametrize(
    ("vocab", "exits", "reduced", "chunk"),
    [(12, 1, 0, 100), (23, 3, 0, 5), (23, 1, 0, 1), (30, 2, 11, 8), (30, 2, 29, 7)],
)
def test_right_is_who_says_what_the_target_says(vocab, exits, reduced, chunk, target):
    right = jax.jit(losses.right, static_argnames="chunk")
    found = []
    for seed in range(8):
        inputs = pick(case(vocab, exits, reduced, seed=seed), target)
        if target == "teacher":  # a little like the exits, or nobody would ever be right
            kept = jnp.arange(vocab) if not reduced else inputs["token_ids"]
            features, table = inputs["teacher"]
            like = inputs["tables"][0][: len(kept)]
            inputs["teacher"] = inputs["features"][0], table.at[kept].set(like + 0.3 * table[kept])
        got = right(**inputs, chunk=chunk)
        np.testing.assert_array_equal(got, who_is_right(**inputs))
        found.append(np.asarray(got))
    assert 0 < np.mean(found) < 1


def test_a_head_that_declines_is_right_nowhere():
    """Each position's label is the head's own best token."""
    inputs = pick(case(23, 1, 11), "labels")
    (features,), (table,) = inputs["features"], inputs["tables"]
    table = table.at[-1].multiply(3)
    logits = np.asarray(features @ table.T)
    inputs |= {"tables": [table], "labels": inputs["token_ids"][logits[:, :-1].argmax(-1)]}
    declines = logits[:, -1] > logits[:, :-1].max(-1)
    assert 0 < declines.sum() < N
    np.testing.assert_array_equal(losses.right(**inputs)[0], ~declines)


def test_a_gates_loss_is_balanced_over_the_positions_that_count():
    rng = np.random.default_rng(0)
    logits = rng.normal(size=(3, 40)) * 4
    right = rng.random((3, 40)) < [[0.1], [0.5], [0.95]]
    mask = rng.random(40) < 0.7
    expected = []
    for e in range(3):
        said = 1 / (1 + np.exp(-logits[e]))
        of_right = [-np.log(said[n]) for n in range(40) if mask[n] and right[e, n]]
        of_wrong = [-np.log(1 - said[n]) for n in range(40) if mask[n] and not right[e, n]]
        expected.append((np.mean(of_right) + np.mean(of_wrong)) / 2)
    got = losses.gate_losses(jnp.asarray(logits, jnp.float32), jnp.asarray(right), mask)
    np.testing.assert_allclose(got, expected, rtol=1e-5)


@pytest.mark.parametrize("share", [0, 1])
def test_a_gate_learns_from_one_kind_alone(share):
    """A head that is always right, or never: the other half of the loss is nothing, not NaN."""
    right, mask = jnp.full((1, 5), bool(share)), jnp.arange(5) < 3

    def loss(logits):
        return losses.gate_losses(logits, right, mask).sum()

    value, slope = jax.value_and_grad(loss)(jnp.zeros((1, 5)))
    np.testing.assert_allclose(value, np.log(2) / 2, rtol=1e-6)
    sign = -1 if share else 1
    np.testing.assert_allclose(slope, [[sign / 12] * 3 + [0, 0]], rtol=1e-6)
    assert losses.gate_losses(jnp.full((1, 5), 1e4), right, mask)[0] in (0, 5e3)


def test_a_target_is_needed_and_only_one():
    inputs = case(12)
    with pytest.raises(ValueError, match="either labels or a teacher"):
        losses.exit_losses(inputs["features"], inputs["tables"])
    with pytest.raises(ValueError, match="either labels or a teacher"):
        losses.exit_losses(**inputs)


@pytest.mark.production
@pytest.mark.parametrize("target", ["labels", "teacher"])
@pytest.mark.parametrize("reduced", [False, True])
def test_memory_does_not_grow_with_the_vocabulary(target, reduced):
    def shape(*sizes, dtype=jnp.float32):
        return jax.ShapeDtypeStruct(sizes, dtype)

    def temporary_bytes(vocab):
        others = {
            "labels": shape(64, dtype=jnp.int32),
            "teacher": (shape(64, 8), shape(vocab, 8)),
            "token_ids": shape(2048, dtype=jnp.int32) if reduced else None,
        }

        def loss(features, tables, others):
            return losses.exit_losses(features, tables, **others).sum()

        step = jax.jit(jax.value_and_grad(loss, argnums=(0, 1)))
        tables = [shape(2049 if reduced else vocab, 8)] * 2
        lowered = step.lower([shape(64, 8)] * 2, tables, pick(others, target))
        return lowered.compile().memory_analysis().temp_size_in_bytes

    small, large = temporary_bytes(8192), temporary_bytes(65536)
    assert large <= 1.1 * small, (small, large)
