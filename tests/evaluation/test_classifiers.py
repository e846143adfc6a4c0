"""Costs against traced programs, bounds against slow loops, ratios against a known clock."""

import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from synthetic import records

from early_exit import policy as policies
from early_exit.backbones import base
from early_exit.backbones.resnet import ResNetConfig
from early_exit.classifying.classify import Classified
from early_exit.cost import energy, multiply_adds
from early_exit.evaluation import classifiers
from early_exit.evaluation.classifiers import Case
from early_exit.exits.heads import ExitConfig
from early_exit.exits.multi_exit import MultiExit

NETWORK = ResNetConfig((2, 2), (4, 8), 5, stem="cifar", stem_width=4, channels=1)
ROW = {"images": jax.ShapeDtypeStruct((1, 8, 8, 1), jnp.float32)}
POINTS = (1, 2, 3)
NEVER = policies.NEVER


def network(**exits):
    return MultiExit(NETWORK, ExitConfig(POINTS, **{"head": "grid"} | exits))


@pytest.fixture(scope="module")
def of():
    return multiply_adds.backbone(NETWORK, inputs=ROW)


@pytest.fixture
def full(of):
    return Case(network(), {}, None, of)


def traced(model, depth, heads):
    """Multiply-adds of one program: the blocks up to `depth` and these heads, or the readout."""
    _, backbone = base.abstract(NETWORK.build)
    params = {"backbone": backbone, "exits": model.abstract_exits()}

    def run(params, inputs):
        bound = model.bind(params)
        hidden, context = bound.backbone.stem(inputs)
        stops = [point for point in (*POINTS, NETWORK.depth) if point <= depth]
        states = list(bound.hidden_at_exits(hidden, context, stops))
        logits = [bound.exit_logits(e, states[e], context, ()) for e in heads]
        if depth == NETWORK.depth:
            logits.append(bound.backbone.readout(states[-1], context))
        return logits

    return multiply_adds.multiply_adds(run, params, ROW)


@pytest.mark.parametrize(
    ("thresholds", "run"), [([0.9, 0.9, 0.9], [0, 1, 2]), ([NEVER, 0.9, NEVER], [1])]
)
def test_a_path_costs_its_blocks_and_the_heads_on_the_way(of, thresholds, run):
    model, policy = network(), policies.make(thresholds)
    runs = classifiers.consulted(model, policy)
    paths = Case(model, {}, policy, of).paths(runs)
    for e, depth in enumerate(model.exit_depths):
        # At an exit where nobody leaves, who did would have had to see its head.
        heads = sorted({h for h in run if h <= e} | ({e} if e < len(POINTS) else set()))
        assert paths[e].multiply_adds == traced(model, depth, heads), (e, heads)


def test_heads_that_others_build_on_are_run():
    last_only = policies.make([NEVER, NEVER, 0.9])
    assert classifiers.consulted(network(), last_only) == [False, False, True]
    for chained in ({"cascade": True}, {"ensemble": True}):
        assert classifiers.consulted(network(**chained), last_only) == [True] * 3
        assert classifiers.consulted(network(**chained), policies.never(3)) == [False] * 3
    assert classifiers.consulted(network(), policies.patient(3, 2)) == [True] * 3
    assert classifiers.consulted(network(), None) == [False] * 3


def test_the_parts_of_a_network_without_exits_are_the_network(of):
    (part,) = classifiers.parts(Case(MultiExit(NETWORK, ExitConfig(())), {}, None, of))
    assert (part["multiply_adds"], part["bytes"]) == (of.full.multiply_adds, of.full.bytes)
    assert part["head_bytes"] == 4 * (8 * 5 + 5)  # a matrix [5, 8] and a bias


def test_the_oracle_leaves_at_the_first_exit_that_is_right(full):
    found = records(60, exits=3, seed=2)
    exits, right = [], 0
    for n in range(60):
        good = [e for e in range(4) if found.predictions[e, n] == found.labels[n]]
        exits.append(good[0] if good else 3)
        right += bool(good)
    assert 0 < right < 60
    oracle = classifiers.oracle(full, found)
    assert oracle["accuracy"] == pytest.approx(right / 60)
    assert oracle["mean_depth"] == pytest.approx(np.mean([(1, 2, 3, 4)[e] for e in exits]))
    costs = [
        traced(full.model, depth, range(min(e + 1, 3)))
        for e, depth in enumerate(full.model.exit_depths)
    ]
    assert oracle["multiply_adds"] == pytest.approx(np.mean([costs[e] for e in exits]))


def test_a_curve_goes_from_daring_to_the_full_model(full):
    fitted, fresh = records(400, seed=3), records(300, seed=4)
    policies = classifiers.by_epsilon(fitted, "max_prob", np.linspace(0.6, 1, 9))
    curve = classifiers.curve(full, policies, fresh)
    assert all(np.diff([row["multiply_adds"] for row in curve]) > 0)
    assert len({tuple(row["exit_shares"]) for row in curve}) == len(curve) > 3
    final = (fresh.predictions[-1] == fresh.labels).mean()
    assert curve[-1]["accuracy"] == pytest.approx(final, abs=0.02)
    assert curve[-1]["agreement"] > 0.98
    assert all(sum(row["exit_shares"]) == pytest.approx(1) for row in curve)


SECONDS = {None: 4.0, 0.0: 1.0}  # of an example: in the full model, and leaving at once


@pytest.fixture
def clock(monkeypatch):
    """Replaces classifiers by ones that take a known time, slower from round to round."""
    now = [0.0]

    class Known:
        programs = 3

        def __init__(self, model, params, policy, *, largest):
            self.seconds = SECONDS[None if policy is None else float(policy.thresholds[0])]
            self.exit = 3 if policy is None else 0

        def __call__(self, inputs):
            count = len(inputs["images"])
            now[0] *= 1.0001  # the machine gets slower
            now[0] += self.seconds * count * (1 + now[0] / 1e5)
            said = inputs["images"][:, 0, 0, 0].astype(int)
            return Classified(
                labels=said if self.exit == 3 else np.zeros(count, int),
                exits=np.full(count, self.exit),
                depths=np.full(count, (1, 2, 3, 4)[self.exit]),
                scores=np.ones(count, np.float32),
                probabilities=np.ones((count, 5), np.float32) / 5,
                abstained=said == 4,
                padding=0,
            )

    monkeypatch.setattr(classifiers, "Classifier", Known)
    monkeypatch.setattr(classifiers.time, "perf_counter", lambda: now[0])
    monkeypatch.setattr(energy, "meter", lambda: None)


def compared(full, labels, **changes):
    images = np.zeros((len(labels), 8, 8, 1), np.float32)
    images[:, 0, 0, 0] = np.arange(len(labels)) % 5  # what the full model says
    early = Case(full.model, {}, policies.make([0.0, NEVER, NEVER]), full.of)
    settings = {"rounds": 3, "singles": 4, "rows": 20, "sizes": (8,)} | changes
    cases = {"full model": full, "early": early}
    return classifiers.compare(cases, {"images": images}, labels, **settings)[0]


@pytest.mark.usefixtures("clock")
def test_ratios_are_of_the_same_moment(full):
    """Times drift by a third from round to round, and cases are as 1 to 4 in each."""
    slow, fast = compared(full, np.zeros(24, int))
    assert (slow["latency_ratio"], slow["throughput_ratio"]["8"]) == (1, 1)
    assert fast["latency_ratio"] == pytest.approx(1 / 4, rel=0.05)
    assert fast["throughput_ratio"]["8"] == pytest.approx(4, rel=0.05)
    assert slow["latency"]["p99"] > slow["latency"]["p50"] >= 4000


@pytest.mark.usefixtures("clock")
def test_answers_are_right_among_those_given(full):
    labels = np.arange(25) % 5
    labels[:5] = [1, 2, 3, 0, 4]  # of ten 0s … 3s four are now wrong; what says 4 is withheld
    slow, fast = compared(full, labels)
    assert slow["accuracy"] == pytest.approx(16 / 20) and slow["abstained"] == pytest.approx(5 / 25)
    assert slow["agreement"] == 1 and fast["agreement"] == pytest.approx(5 / 25)
    assert slow["exit_shares"] == [0, 0, 0, 1] and fast["mean_depth"] == 1
    assert slow["joules"] == pytest.approx(
        4.6e-12 * full.of.full.multiply_adds + 160e-12 * full.of.full.bytes
    )
    assert fast["multiply_adds"] == traced(full.model, 1, [0])


@pytest.mark.usefixtures("clock")
def test_a_batch_larger_than_the_data_is_refused(full):
    with pytest.raises(ValueError, match="batches of 64 cannot be timed on 24 examples; lower"):
        compared(full, np.zeros(24, int), sizes=(8, 64))


@pytest.mark.usefixtures("clock")
def test_a_meter_counts_what_one_case_does(full, monkeypatch):
    read = types.SimpleNamespace(count=0)

    def meter():
        def count():
            read.count += 1
            return [classifiers.time.perf_counter()]

        return energy.Meter("RAPL", count, lambda before, after: 10 * (after[0] - before[0]))

    monkeypatch.setattr(energy, "meter", meter)
    slow, fast = compared(full, np.zeros(24, int))
    # Ten watts for four seconds, and for one.
    assert slow["joules"] == pytest.approx(40, rel=0.1) and slow["joules"] > 40
    assert fast["joules"] == pytest.approx(10, rel=0.1) and fast["joules"] > 10


def test_extremes_are_the_surest_early_and_the_least_sure_late():
    answer = types.SimpleNamespace(
        exits=np.array([0, 2, 0, 1, 2, 2]), scores=np.array([0.8, 0.9, 0.95, 0.99, 0.3, 0.4])
    )
    assert classifiers.extremes(answer, 3) == ([2, 0, 3], [4, 5, 1])
    assert classifiers.extremes(answer, 9) == ([2, 0, 3, 1, 5, 4], [4, 5, 1, 3, 0, 2])
