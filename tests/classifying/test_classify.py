"""Compaction is exact: what a batch is answered, its rows alone would be, and for no more."""

import dataclasses
import functools
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from early_exit import confidence as confidences
from early_exit import policy as policies
from early_exit import tree
from early_exit.backbones import base
from early_exit.backbones.encoder import EncoderConfig
from early_exit.backbones.resnet import ResNetConfig
from early_exit.classifying import batch
from early_exit.classifying import rows as programs
from early_exit.classifying.classify import Classifier
from early_exit.evaluation.classes import score_batch
from early_exit.exits import multi_exit
from early_exit.exits.heads import ExitConfig
from early_exit.exits.multi_exit import MultiExit

C, N = 4, 64
LARGEST = 32  # the same in most tests, so that they share their programs
RESNET = ResNetConfig((2, 2), (4, 8), C, stem="cifar", stem_width=4, channels=1)
ENCODER = EncoderConfig(
    vocab_size=40, width=12, depth=2, heads=2, mlp_width=16, context_length=8, num_classes=C,
    pooling="mean", pooler="none",
)  # fmt: skip
_rng = np.random.default_rng(5)
IMAGES = {"images": _rng.normal(size=(N, 8, 8, 1)).astype(np.float32)}
TOKENS = {"tokens": _rng.integers(0, 40, (N, 8)).astype(np.int32)}
TEXTS = TOKENS | {"mask": np.arange(8) < _rng.integers(1, 9, (N, 1))}
# Programs of other batch sizes round differently; no score may lie so close to its threshold.
CLOSE = 1e-4


@functools.cache
def setting(config=RESNET, masked=True, points=(1, 3), **exits):
    """A model with heads that disagree, its inputs, and what each row says at each exit, alone."""
    inputs = IMAGES if config is RESNET else TEXTS if masked else TOKENS
    model = MultiExit(config, ExitConfig(points, **{"head": "linear"} | exits))
    _, backbone = base.split(config.build(nnx.Rngs(0)))
    params = {"backbone": jax.tree.map(lambda x: x * 3 if x.ndim == 2 else x, backbone)}
    drawn = model.init_exits(jax.random.key(1), backbone, "random", None)
    moved = {
        path: x + (3 if "output/embedding" in path else 0.3) * _rng.normal(size=x.shape)
        for path, x in tree.flatten(drawn).items()
    }
    params["exits"] = jax.tree.map(jnp.float32, tree.unflatten(moved))

    single = []
    for row in range(N):
        alone = {name: x[row : row + 1] for name, x in inputs.items()}
        alone |= {"labels": np.zeros(1, np.int32), "valid": np.ones(1, bool)}
        single.append(score_batch(params, alone, model=model, soften=exits == {}))
    single = jax.tree.map(lambda *rows: np.concatenate(rows, axis=-1), *jax.device_get(single))
    return types.SimpleNamespace(
        model=model,
        params=params,
        inputs=inputs,
        scores=single["scores"],
        predictions=single["predictions"],
        softened=single["softened"],
    )


def gap(scores, share):
    """A threshold in the widest gap where about `share` of the scores lie above it."""
    ordered = np.sort(scores)
    low, high = (int(len(ordered) * (1 - share + change)) for change in (-0.15, 0.15))
    gaps = np.diff(ordered[low:high])
    assert gaps.max() > CLOSE
    return float(ordered[low:][gaps.argmax()] + gaps.max() / 2)


def thresholds(scores, share=0.4):
    return [gap(row, share) for row in scores[:-1]]


def slow(scores, predictions, limits):
    """(exit, label, score) of each row, one at a time."""
    found = []
    for row in range(scores.shape[1]):
        e = 0
        while e < len(limits) and scores[e, row] < limits[e]:
            e += 1
        found.append((e, predictions[e, row], scores[e, row]))
    return tuple(map(np.array, zip(*found, strict=True)))


def first(inputs, count):
    return {name: x[:count] for name, x in inputs.items()}


def check(classified, exits, labels, scores):
    np.testing.assert_array_equal(classified.exits, exits)
    np.testing.assert_array_equal(classified.labels, labels)
    np.testing.assert_allclose(classified.scores, scores, atol=1e-5)


@pytest.fixture(scope="module")
def plain():
    """A classifier by `max_prob` whose rows leave everywhere, and what they should say."""
    given = setting()
    limits = thresholds(given.scores["max_prob"])
    want = slow(given.scores["max_prob"], given.predictions, limits)
    assert np.bincount(want[0]).min() > N / 10  # at each exit some leave
    classify = Classifier(given.model, given.params, policies.make(limits), largest=LARGEST)
    return types.SimpleNamespace(**vars(given), limits=limits, want=want, classify=classify)


def test_every_batch_size_answers_like_its_rows_alone(plain):
    before = programs.run_segment._cache_size(), programs.run_alone._cache_size()
    for size in range(1, N + 1):
        found = plain.classify(first(plain.inputs, size))
        check(found, *(x[:size] for x in plain.want))
        np.testing.assert_array_equal(found.depths, plain.model.exit_depths[found.exits])
        np.testing.assert_allclose(found.probabilities.sum(-1), 1, atol=1e-5)
        np.testing.assert_array_equal(found.probabilities.argmax(-1), found.labels)
        np.testing.assert_allclose(found.probabilities.max(-1), found.scores, atol=1e-6)
        assert not found.abstained.any()
    # Six buckets from 1 to 32, three segments, and the program of one row.
    segments, alone = programs.run_segment._cache_size(), programs.run_alone._cache_size()
    assert segments - before[0] <= 6 * 3 and alone - before[1] <= 1
    assert segments - before[0] < plain.classify.programs <= 6 * 3 + 1


def test_answers_come_in_the_order_of_the_rows(plain):
    order = np.random.default_rng(0).permutation(N)
    found = plain.classify({"images": IMAGES["images"][order]})
    check(found, *(x[order] for x in plain.want))


def test_rows_of_a_large_batch_meet(plain, monkeypatch):
    """Of a batch larger than any program, those that go on wait until they fill one."""
    called = []
    call = batch.Programs.call

    def spy(self, program, kind, bucket, *args, segment):
        called.append((segment, bucket))
        return call(self, program, kind, bucket, *args, segment=segment)

    monkeypatch.setattr(batch.Programs, "call", spy)
    found = plain.classify({name: np.concatenate([x] * 3) for name, x in plain.inputs.items()})
    check(found, *(np.concatenate([x] * 3) for x in plain.want))
    reached = [3 * N, *(3 * (plain.want[0] > e).sum() for e in range(2))]
    for segment, rows in enumerate(reached):
        buckets = [bucket for at, bucket in called if at == segment]
        assert buckets.count(LARGEST) == rows // LARGEST
        assert sum(buckets) - rows <= 4
    blocks = np.diff(plain.model.exit_depths, prepend=0)
    run = sum(blocks[segment] * bucket for segment, bucket in called)
    assert found.depths.sum() + found.padding == run


def test_the_same_rows_once_more_give_the_same(plain):
    one, other = (plain.classify(first(plain.inputs, 21)) for _ in range(2))
    for field in dataclasses.fields(one):
        np.testing.assert_array_equal(getattr(one, field.name), getattr(other, field.name))


@pytest.mark.parametrize("size", [1, 11])
def test_all_at_one_exit_or_none_early(plain, size):
    """Forced exits, no exits, and the full model that has no policy: in the same programs."""
    everywhere = policies.forced(2, 0), policies.forced(2, 1), policies.never(2)
    for e, policy in enumerate(everywhere):
        found = Classifier(plain.model, plain.params, policy, largest=LARGEST)(
            first(plain.inputs, size)
        )
        scores = plain.scores["max_prob"]
        check(found, np.full(size, e), plain.predictions[e, :size], scores[e, :size])
    full = Classifier(plain.model, plain.params)
    check(full(first(plain.inputs, size)), found.exits, found.labels, found.scores)


def test_another_policy_compiles_nothing(plain, monkeypatch):
    monkeypatch.setattr(batch, "CONSTANTS", 0)  # nor for one row, where weights are no constants
    kept = Classifier(plain.model, plain.params, policies.make(plain.limits), largest=LARGEST)
    kept(first(plain.inputs, 7)), kept(first(plain.inputs, 1))
    before = programs.run_segment._cache_size(), programs.run_alone._cache_size()
    for policy in (
        policies.make(plain.limits[::-1], decay=2.0),
        policies.make([policies.ALWAYS, 0.2], temperatures=[1, 2, 3], reject=0.3),
    ):
        other = Classifier(plain.model, plain.params, policy, largest=LARGEST)
        other(first(plain.inputs, 7)), other(first(plain.inputs, 1))
    assert (programs.run_segment._cache_size(), programs.run_alone._cache_size()) == before


@pytest.mark.parametrize("early", [True, False])
def test_one_row_is_answered_alike_by_weights_that_are_constants_and_that_are_not(
    plain, monkeypatch, early
):
    policy = policies.make(plain.limits, reject=0.5) if early else None
    size, program = tree.size_in_bytes(plain.params), "run_alone" if early else "run_whole"
    taken, answers = [], []
    for limit in (size, size - 1):
        monkeypatch.setattr(batch, "CONSTANTS", limit)
        classify = Classifier(plain.model, plain.params, policy)
        before = getattr(programs, program)._cache_size()
        answers.append([classify({name: x[i : i + 1] for name, x in plain.inputs.items()})
                        for i in range(N)])  # fmt: skip
        taken.append(getattr(programs, program)._cache_size() - before)
        assert classify.programs == 1
    for one, other in zip(*answers, strict=True):
        for field in dataclasses.fields(one):
            pair = (getattr(found, field.name) for found in (one, other))
            np.testing.assert_allclose(*pair, atol=1e-5)
    assert taken[0] == 0


@pytest.mark.parametrize(("confidence", "largest"), [("max_prob", 1), ("patience", 1), ("gate", 2)])
def test_what_heads_take_from_each_other(confidence, largest):
    given = setting(points=(1, 2, 3), gate=True, cascade=True, ensemble=True)
    scores = given.scores[confidence]
    if confidence == "patience":
        limits = [1, policies.NEVER, 2]
    else:
        limits = thresholds(scores)
        limits[0] = policies.NEVER  # a head that is run for others only
    want = slow(scores, given.predictions, limits)
    assert len(set(want[0])) > 1
    policy = policies.make(limits, confidence)
    classify = Classifier(given.model, given.params, policy, largest=largest)
    for size in (1, 15):
        check(classify(first(given.inputs, size)), *(x[:size] for x in want))


@pytest.mark.parametrize(
    ("masked", "confidence", "sizes"), [(True, "margin", (1, 9)), (False, "entropy", (2,))]
)
def test_an_encoder_keeps_each_row_with_its_mask(masked, confidence, sizes):
    given = setting(ENCODER, masked, (1,), head="norm")
    scores = given.scores[confidence]
    limits = thresholds(scores)
    want = slow(scores, given.predictions, limits)
    policy = policies.make(limits, confidence)
    classify = Classifier(given.model, given.params, policy, largest=2)
    for size in sizes:
        check(classify(first(given.inputs, size)), *(x[:size] for x in want))


def test_heads_that_nothing_leaves_at_are_not_run(plain, monkeypatch):
    ran = []
    exit_logits = multi_exit.Bound.exit_logits

    def watched(self, e, *args):
        jax.debug.callback(lambda: ran.append(e))
        return exit_logits(self, e, *args)

    monkeypatch.setattr(multi_exit.Bound, "exit_logits", watched)
    some, never = plain.limits, policies.NEVER
    for limits, want in (
        ((never, some[1]), {1}),
        ((policies.ALWAYS, some[1]), {0}),
        ((never, never), set()),
        (some, {0, 1}),
    ):
        policy = policies.make(limits)
        # Programs of a size that no other test has: compiled here, with the callback in them.
        Classifier(plain.model, plain.params, policy, largest=1)(first(plain.inputs, 9))
        jax.effects_barrier()
        assert set(ran) == want
        ran.clear()


def test_temperatures_change_scores_and_exits_but_no_label(plain):
    temperatures = [2.0, 1.0, 4.0]
    known = [confidences.TEMPERATURES.index(temperature) for temperature in temperatures]
    warm = np.exp(-plain.softened["log_normalizers"][known, range(3)])
    limits = thresholds(warm)
    want = slow(warm, plain.predictions, limits)
    policy = policies.make(limits, temperatures=temperatures)
    found = Classifier(plain.model, plain.params, policy, largest=LARGEST)(plain.inputs)
    check(found, *want)
    np.testing.assert_allclose(found.probabilities.max(-1), found.scores, atol=1e-6)


@pytest.mark.parametrize("size", [1, N])
def test_only_the_final_exit_withholds_answers(plain, size):
    for limits in (plain.limits, [policies.NEVER] * 2):
        exits, labels, scores = slow(plain.scores["max_prob"], plain.predictions, limits)
        reject = gap(scores[exits == 2], 0.5)
        policy = policies.make(limits, reject=reject)
        classify = Classifier(plain.model, plain.params, policy, largest=LARGEST)
        found = classify(first(plain.inputs, size))
        np.testing.assert_array_equal(found.abstained, ((exits == 2) & (scores < reject))[:size])
        np.testing.assert_array_equal(found.labels, labels[:size])


@pytest.mark.parametrize("budget", [1.0, 1.3, 2.5, 3.2, 4.0])
def test_a_budget_is_kept_and_used(plain, budget):
    blocks = np.diff(plain.model.exit_depths, prepend=0)
    never = Classifier(plain.model, plain.params, policies.never(2), largest=LARGEST)
    for size in (1, 43):
        found = never(first(plain.inputs, size), budget=budget)
        spent = found.depths.sum()
        assert budget * size - max(blocks) < spent <= budget * size
        np.testing.assert_array_equal(found.labels, plain.predictions[found.exits, np.arange(size)])
        for start in range(0, size, LARGEST):  # those that go on are less sure than those that left
            exits = found.exits[start : start + LARGEST]
            for e in range(2):
                scores = plain.scores["max_prob"][e, start : start + len(exits)]
                left, went = scores[exits == e], scores[exits > e]
                assert not len(left) or not len(went) or left.min() > went.max() - 1e-5


def test_a_policy_saves_what_a_budget_allows(plain):
    generous = plain.classify(plain.inputs, budget=4.0)
    check(generous, *plain.want)
    tight = plain.classify(plain.inputs, budget=1.5)
    assert (tight.exits <= generous.exits).all() and tight.depths.mean() <= 1.5


def test_what_some_leave_of_a_budget_is_for_the_next(plain):
    exits, labels, _ = plain.want
    easy, hard = np.flatnonzero(exits == 0)[:1], np.flatnonzero(exits == 2)[:9]
    rows = np.concatenate([np.repeat(easy, LARGEST), hard])
    found = plain.classify({name: x[rows] for name, x in plain.inputs.items()}, budget=2.5)
    np.testing.assert_array_equal(found.exits, exits[rows])
    np.testing.assert_array_equal(found.labels, labels[rows])
    alone = plain.classify({name: x[hard] for name, x in plain.inputs.items()}, budget=2.5)
    assert alone.depths.mean() <= 2.5


def test_at_any_time_there_is_an_answer(plain):
    for size in (1, 13):
        rows = first(plain.inputs, size)
        steps = list(plain.classify.anytime(rows))
        for e, found in enumerate(steps):
            scores = plain.scores["max_prob"][e, :size]
            check(found, np.full(size, e), plain.predictions[e, :size], scores)
        full = Classifier(plain.model, plain.params)(rows)
        check(steps[-1], full.exits, full.labels, full.scores)


def test_an_answer_that_is_not_waited_for_disturbs_nobody(plain):
    steps = plain.classify.anytime(first(plain.inputs, 13))
    next(steps)
    check(plain.classify(first(plain.inputs, 9)), *(x[:9] for x in plain.want))
    found = next(steps)
    np.testing.assert_array_equal(found.labels, plain.predictions[1, :13])
    del steps
    check(plain.classify(first(plain.inputs, 9)), *(x[:9] for x in plain.want))


def test_what_is_prepared_is_not_compiled_again(plain):
    for policy, largest, count in ((policies.make(plain.limits), LARGEST, 6 * 3 + 1), (None, 4, 3)):
        classify = Classifier(plain.model, plain.params, policy, largest=largest)
        classify.prepare(plain.inputs)
        assert classify.programs == count
        before = programs.run_segment._cache_size(), programs.run_whole._cache_size()
        for size in (1, 2, 3, 40):
            classify(first(plain.inputs, size))
        assert classify.programs == count
        assert (programs.run_segment._cache_size(), programs.run_whole._cache_size()) == before


def test_a_network_without_exits_is_run_whole():
    given = setting(points=())
    for policy in (None, policies.never(0)):
        for size in (1, 2):
            classify = Classifier(given.model, given.params, policy, largest=2)
            found = classify(first(given.inputs, size))
            want = given.predictions[0, :size], given.scores["max_prob"][0, :size]
            check(found, np.zeros(size), *want)


@pytest.mark.parametrize(
    ("policy", "options", "message"),
    [
        (policies.make([1.0]), {}, "the policy has 1 thresholds but the model has 2"),
        (policies.make([1, 1], "similarity"), {}, "scores by similarity.* one of max_prob, margin"),
        (policies.make([1, 1], "gate"), {}, "scores by gate"),
        (policies.make([1, 1], budget=3.0), {}, "call the classifier with budget="),
        (None, {"largest": 24}, "largest must be a power of 2, not 24"),
    ],
)
def test_what_does_not_fit_is_refused(plain, policy, options, message):
    with pytest.raises(ValueError, match=message):
        Classifier(plain.model, plain.params, policy, **options)


def test_a_language_model_is_refused(tiny):
    with pytest.raises(ValueError, match="a language model classifies nothing"):
        Classifier(*tiny)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda c: c({"images": IMAGES["images"], "more": np.zeros(3)}), "'images': 64, 'more': 3"),
        (lambda c: c(first(IMAGES, 0)), "at least one; they have {'images': 0}"),
        (lambda c: c(IMAGES, budget=0.5), "the first exit stands after block 1"),
        (lambda c: next(c.anytime({"images": np.zeros((65, 8, 8, 1))})), "65 rows are too many"),
    ],
)
def test_a_call_that_cannot_be_answered(plain, call, message):
    with pytest.raises(ValueError, match=message):
        call(plain.classify)
