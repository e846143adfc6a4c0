import json
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from early_exit import policy as policies


@pytest.fixture
def path(tmp_path):
    return tmp_path / "policy.json"


def write(path, **changes):
    fields = {
        "enabled": True,
        "confidence": "margin",
        "thresholds": [0.5],
        "decay": None,
        "budget": None,
        "temperatures": None,
        "reject": None,
        "provenance": {},
    }
    path.write_text(json.dumps(fields | changes))


def load(path, exits=1):
    return policies.load(path, exit_depths=np.arange(1, exits + 2))


def test_a_position_leaves_where_its_score_reaches_the_threshold():
    policy = policies.make([0.5, policies.NEVER, policies.ALWAYS])
    scores = jnp.array([0.4999, 0.5, 1.0, -jnp.inf])
    progress = jnp.array([0.0, 0.3, 0.9, 1.0])  # without a decay it matters nowhere
    assert policy.leaves(0, scores, progress).tolist() == [False, True, True, False]
    assert not policy.leaves(1, scores, progress).any()
    assert policy.leaves(2, scores, progress).all()
    assert [bool(policy.consults(e)) for e in range(3)] == [True, False, True]


def test_positions_leave_at_the_first_exit_that_lets_them():
    policy = policies.make([0.5, policies.NEVER, 0.2])
    scores = np.array([[0.5, 0.4, 0.9, 0.4], [1.0, 1.0, 1.0, 1.0], [0.0, 0.2, 0.9, 0.1]])
    left = policy.exit_index(scores.astype(np.float32), np.array([1, 2, 3, 4]))
    assert left.tolist() == [0, 2, 0, 3]
    # Records have the final exit's scores too, which let nobody leave.
    with_final = np.concatenate([scores, np.ones((1, 4))]).astype(np.float32)
    assert policy.exit_index(with_final, np.array([1, 2, 3, 4])).tolist() == left.tolist()


def test_logits_are_divided_by_the_temperature_of_their_exit():
    logits = jnp.array([[4.0, -2.0], [1.0, 0.0]])
    policy = policies.make([0.5, 0.5], temperatures=[2, 1, 0.5])
    for e, divided in enumerate([logits / 2, logits, logits * 2]):
        np.testing.assert_array_equal(policy.tempered(e, logits), divided)
    np.testing.assert_array_equal(policies.make([0.5, 0.5]).tempered(1, logits), logits)


def test_an_answer_is_withheld_below_the_threshold_of_the_final_exit():
    scores = jnp.array([0.4999, 0.5, 1.0, -jnp.inf])
    assert policies.make([0.9], reject=0.5).abstains(scores).tolist() == [True, False, False, True]
    assert not policies.make([0.9]).abstains(scores).any()
    assert policies.make([0.9], reject=policies.NEVER).abstains(scores).all()


def test_never_forced_and_patient():
    assert policies.never(3).thresholds.tolist() == [np.inf] * 3
    assert policies.forced(3, 1, "entropy").thresholds.tolist() == [np.inf, -np.inf, np.inf]
    assert policies.forced(3, 1, "entropy").confidence == "entropy"
    # Scores of patience count the heads just before that have said the same.
    patient = policies.patient(3, 2)
    agreeing = np.array([[0, 0, 0, 0], [1, 0, 1, 0], [2, 1, 0, 0]], np.float32)
    assert patient.exit_index(agreeing, np.array([2, 4, 6, 8])).tolist() == [2, 3, 3, 3]
    assert patient.confidence == "patience"
    # A head that cannot let anybody leave may still continue a row of agreements.
    assert all(policies.make([policies.NEVER, 1], "patience").consults(e) for e in range(2))


@pytest.mark.parametrize("decay", [0.5, 4.0])
def test_thresholds_decay_as_in_calm(decay):
    """CALM, eq. 5: clip(9/10·λ + 1/10·exp(−τ·t/N)) at t = 0, 1, …, N."""
    fixed = [0.3, 0.99, 0.0]
    policy = policies.make(fixed, decay=decay)
    for e, threshold in enumerate(fixed):
        falling = [
            min(1.0, 9 / 10 * threshold + 1 / 10 * math.exp(-decay * t / 20)) for t in range(21)
        ]
        got = policy.threshold(e, jnp.arange(21) / 20)
        np.testing.assert_allclose(got, falling, rtol=1e-6)
        # A position leaves as soon as the threshold has fallen to its score, not before.
        between = (falling[7] + falling[8]) / 2
        left = policy.leaves(e, jnp.full(21, between), jnp.arange(21) / 20)
        assert left.tolist() == [t >= 8 for t in range(21)]


def test_never_and_always_do_not_decay():
    policy = policies.make([policies.NEVER, policies.ALWAYS], decay=9.0)
    progress = jnp.linspace(0, 1, 5)
    assert not policy.leaves(0, jnp.ones(5), progress).any()
    assert policy.leaves(1, jnp.full(5, -jnp.inf), progress).all()


DEPTHS = np.array([2, 3, 7, 10])


def exits_by_definition(policy, scores_EN, progress_N):
    """One answer, token by token, as the class's docstring tells it."""
    left, spent = [], 0.0
    for n, progress in enumerate(progress_N):
        for e in range(len(DEPTHS)):
            if e == len(DEPTHS) - 1:
                break
            threshold = float(policy.thresholds[e])
            if policy.decay is not None and math.isfinite(threshold):
                fallen = 0.9 * threshold + 0.1 * math.exp(-float(policy.decay) * progress)
                threshold = min(max(fallen, 0), 1)
            if scores_EN[e, n] >= threshold:
                break
            if policy.budget is not None:
                allowance = float(policy.budget) * (n + 1) - spent
                if allowance < DEPTHS[e + 1]:
                    break
        left.append(e)
        spent += DEPTHS[e]
    return left


# Eighths are exact in float32, so that ties between a score and a threshold are ties.
EIGHTHS = st.integers(0, 8).map(lambda n: n / 8)


@settings(max_examples=60, deadline=None)
@given(
    st.lists(EIGHTHS | st.sampled_from([math.inf, -math.inf]), min_size=3, max_size=3),
    st.sampled_from([None, 0.7, 5.0]),
    st.sampled_from([None, 2.5, 4.0, 9.75, 30.0]),
    st.integers(0, 2**32 - 1),
)
def test_exits_equal_a_loop_over_tokens(thresholds, decay, budget, seed):
    policy = policies.make(thresholds, decay=decay, budget=budget)
    rng = np.random.default_rng(seed)
    scores = (rng.integers(0, 9, (3, 25)) / 8).astype(np.float32)
    progress = np.arange(25, dtype=np.float32) / 25
    got = policy.exit_index(scores, DEPTHS, progress)
    assert got.tolist() == exits_by_definition(policy, scores, progress.tolist())
    if budget is not None:
        # Never above the budget, at no token of the answer; below the first exit nobody can leave.
        spent = DEPTHS[got].cumsum()
        assert (spent <= budget * np.arange(1, 26) + 1e-4).all()


def test_savings_are_spent_later():
    """Shallow tokens at first let later ones go deeper than the budget, and no further."""
    policy = policies.make([0.5, policies.NEVER, policies.NEVER], budget=4.0)
    scores = np.zeros((3, 12), np.float32)
    scores[0, :4] = 1
    left = policy.exit_index(scores, DEPTHS)
    assert left[:5].tolist() == [0, 0, 0, 0, 3]
    assert DEPTHS[left].mean() <= 4
    # Without savings all but the exit within the budget is forbidden.
    alone = policies.make([policies.NEVER] * 3, budget=4.0).exit_index(scores, DEPTHS)
    assert alone[0] == 1 and set(alone[1:].tolist()) <= {1, 2}


THRESHOLDS = st.floats(width=32, allow_nan=False)  # infinities included
POSITIVE = st.none() | st.floats(2**-126, width=32, allow_infinity=False)


@settings(max_examples=40, deadline=None)
@given(
    st.lists(THRESHOLDS, min_size=1, max_size=4),
    POSITIVE,
    st.none() | st.floats(1, 1000, width=32),  # below the first exit none can be kept
    st.booleans(),
    st.none() | THRESHOLDS,
)
def test_policies_come_back_from_json(
    tmp_path_factory, thresholds, decay, budget, tempered, reject
):
    path = tmp_path_factory.mktemp("policy") / "policy.json"
    temperatures = np.linspace(0.3, 2, len(thresholds) + 1) if tempered else None
    given = {"decay": decay, "budget": budget, "temperatures": temperatures, "reject": reject}
    policy = policies.make(thresholds, "similarity", **given, epsilon=0.9, unreachable=[6])
    policies.save(policy, path)
    back = load(path, exits=len(thresholds))
    np.testing.assert_array_equal(back.thresholds, policy.thresholds)
    assert (back.decay, back.budget, back.reject) == (decay, budget, reject)
    assert (back.temperatures is None) == (not tempered)
    if tempered:
        np.testing.assert_array_equal(back.temperatures, policy.temperatures)
    assert back.confidence == "similarity"
    assert back.provenance == {"epsilon": 0.9, "unreachable": [6]}
    # Strict JSON: no bare Infinity, which other readers refuse.
    json.loads(path.read_text(), parse_constant=pytest.fail)


def test_infinite_thresholds_are_words_in_the_file(path):
    policies.save(policies.make([policies.NEVER, 0.25, policies.ALWAYS]), path)
    assert json.loads(path.read_text())["thresholds"] == ["never", 0.25, "always"]


def test_a_provenance_is_strict_json_and_old_ones_are_read(path):
    """Where nobody leaves, some figures are NaN; files of before say so in Python's own way."""
    stated = {"error": [float("nan"), 0.5], "bound": float("inf"), "of": {"risk": float("nan")}}
    policies.save(policies.make([0.25], **stated), path)
    strict = json.loads(path.read_text(), parse_constant=pytest.fail)
    wanted = {"error": [None, 0.5], "bound": "Infinity", "of": {"risk": None}}
    assert strict["provenance"] == load(path).provenance == wanted
    path.write_text(json.dumps(strict | {"provenance": stated}))
    assert "NaN" in path.read_text() and load(path).provenance["bound"] == float("inf")


def test_a_disabled_policy_is_none(path):
    policies.save(policies.make([0.5]), path, enabled=False)
    assert load(path) is None


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"thresholds": [0.5, 0.5]}, "has 2 thresholds but the model has 1 exits; calibrate this"),
        ({"confidence": "vibes"}, "policy.json is not.*unknown confidence 'vibes'; choose one of"),
        ({"thresholds": [float("nan")]}, "policy.json is not.*must be one number per exit"),
        ({"thresholds": ["nan"]}, "policy.json is not.*must be one number per exit"),
        ({"thresholds": ["sometimes"]}, "policy.json is not an exit policy.*sometimes"),
        ({"thresholds": [None]}, "policy.json is not an exit policy"),
        ({"thresholds": [[0.5]]}, "policy.json is not an exit policy"),
        ({"thresholds": 0.5}, "policy.json is not an exit policy"),
        ({"provenance": [1]}, "policy.json is not an exit policy"),
        ({"provenance": {"confidence": "margin"}}, "policy.json is not an exit policy"),
        ({"decay": 0}, "policy.json is not.*decay must be a positive number, not 0"),
        ({"budget": -1.5}, "policy.json is not.*budget must be a positive number, not -1.5"),
        (
            {"temperatures": [1.0]},
            "policy.json is not.*must be 2 numbers, one per exit and one for",
        ),
        ({"temperatures": [1.0, 0.0]}, "policy.json is not.*temperatures must be positive numbers"),
        ({"temperatures": 2.0}, "policy.json is not.*must be 2 numbers, one per exit and one for"),
        ({"reject": float("nan")}, "policy.json is not.*reject must be a number, not nan"),
        ({"reject": "unsure"}, "policy.json is not an exit policy.*unsure"),
        ({"confidence": "gate", "reject": 0.5}, "policy.json is not.*final exit has no gate"),
        ({"decay": "fast"}, "policy.json is not an exit policy"),
        ({"confidence": "patience", "decay": 1.0}, "policy.json is not.*patience counts heads"),
        ({"enabled": "false"}, "\"enabled\" must be true or false, not 'false'"),
        ({"enabled": 0}, '"enabled" must be true or false, not 0'),
    ],
)
def test_damaged_fields(path, changes, message):
    write(path, **changes)
    with pytest.raises(ValueError, match=message):
        load(path)


# Each is needed.
FIELDS = [
    "enabled",
    "confidence",
    "thresholds",
    "decay",
    "budget",
    "temperatures",
    "reject",
    "provenance",
]


@pytest.mark.parametrize("missing", FIELDS)
def test_missing_fields_are_named(path, missing):
    write(path)
    fields = json.loads(path.read_text())
    del fields[missing]
    path.write_text(json.dumps(fields))
    with pytest.raises(ValueError, match=f"policy.json is not an exit policy.*{missing}"):
        load(path)


@pytest.mark.parametrize("text", [b"", b'{"enabled": tr', b"[1, 2]", b"\xff\xfe\x00"])
def test_files_that_are_no_policy(path, text):
    path.write_bytes(text)
    with pytest.raises(ValueError, match="policy.json is not an exit policy"):
        load(path)


def test_a_missing_file_names_the_command(path):
    with pytest.raises(FileNotFoundError, match="policy.json; write one with `launch.calibrate`"):
        load(path)


@pytest.mark.parametrize("thresholds", [[0.5, float("nan")], 0.5, [[0.5]]])
def test_thresholds_are_numbers_one_per_exit(thresholds):
    with pytest.raises(ValueError, match="thresholds must be one number per exit"):
        policies.make(thresholds)


@pytest.mark.parametrize("name", ["decay", "budget"])
@pytest.mark.parametrize("value", [0, -2.0, float("inf"), float("nan")])
def test_decay_and_budget_are_positive_numbers(name, value):
    with pytest.raises(ValueError, match=f"{name} must be a positive number, not {value}"):
        policies.make([0.5], **{name: value})


def test_patience_does_not_decay():
    with pytest.raises(ValueError, match="patience counts heads; a decay is for scores between"):
        policies.make([2], "patience", decay=1.0)


@pytest.mark.parametrize("exits", [1, 3])
def test_a_policy_fits_one_number_of_exits(exits):
    policies.make([0.5, 0.5]).check(np.array([2, 4, 6]))
    with pytest.raises(ValueError, match=f"2 thresholds but the model has {exits} exits; calib"):
        policies.make([0.5, 0.5]).check(np.arange(exits + 1))


def test_saving_is_whole_or_not_at_all(path, monkeypatch):
    policies.save(policies.make([0.25]), path)
    assert [entry.name for entry in path.parent.iterdir()] == ["policy.json"]
    before = path.read_bytes()

    def killed(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr("os.replace", killed)
    with pytest.raises(KeyboardInterrupt):
        policies.save(policies.make([0.75]), path)
    assert path.read_bytes() == before


def test_other_numbers_and_provenance_compile_nothing_new():
    traced = []

    @jax.jit
    def leaves(policy, score):
        traced.append(policy.confidence)
        return policy.leaves(0, score, jnp.float32(1)), policy.overdrawn(score, 3), policy

    def make(thresholds, decay, budget, confidence="margin", **provenance):
        return policies.make(thresholds, confidence, decay=decay, budget=budget, **provenance)

    for policy, left, overdrawn in [
        (make([0.5, 0.1], 2.0, 2.0), True, True),
        (make([0.7, np.inf], 1.0, 2.5, epsilon=0.9), False, False),
    ]:
        *got, back = leaves(policy, jnp.float32(0.6))
        assert list(map(bool, got)) == [left, overdrawn]
        np.testing.assert_array_equal(back.thresholds, policy.thresholds)
    leaves(make([0.5, 0.1], 2.0, 2.0, "entropy"), jnp.float32(0.6))
    leaves(policies.make([0.5, 0.1]), jnp.float32(0.6))
    assert traced == ["margin", "entropy", "max_prob"]


@pytest.mark.parametrize("confidence", ["gate", "similarity"])
def test_a_policy_is_for_scores_that_the_exits_have(confidence):
    policy = policies.make([0.5, 0.5], confidence)
    policy.check(np.array([2, 4, 6]))
    with pytest.raises(ValueError, match=f"scores by {confidence}, which the exits of this model"):
        policy.check(np.array([2, 4, 6]), ("max_prob", "margin"))
