import json

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
    fields = {"enabled": True, "confidence": "margin", "thresholds": [0.5], "provenance": {}}
    path.write_text(json.dumps(fields | changes))


def test_a_position_leaves_where_its_score_reaches_the_threshold():
    policy = policies.make([0.5, policies.NEVER, policies.ALWAYS])
    scores = jnp.array([0.4999, 0.5, 1.0, -jnp.inf])
    assert policy.leaves(0, scores).tolist() == [False, True, True, False]
    assert not policy.leaves(1, scores).any()
    assert policy.leaves(2, scores).all()
    assert [bool(policy.can_leave(e)) for e in range(3)] == [True, False, True]


def test_positions_leave_at_the_first_exit_that_lets_them():
    policy = policies.make([0.5, policies.NEVER, 0.2])
    scores = np.array([[0.5, 0.4, 0.9, 0.4], [1.0, 1.0, 1.0, 1.0], [0.0, 0.2, 0.9, 0.1]])
    assert policy.exit_index(scores.astype(np.float32)).tolist() == [0, 2, 0, 3]


def test_never_and_forced():
    assert policies.never(3).thresholds.tolist() == [np.inf] * 3
    assert policies.forced(3, 1, "entropy").thresholds.tolist() == [np.inf, -np.inf, np.inf]
    assert policies.forced(3, 1, "entropy").confidence == "entropy"


THRESHOLDS = st.floats(width=32, allow_nan=False)  # infinities included


@settings(max_examples=40, deadline=None)
@given(st.lists(THRESHOLDS, min_size=1, max_size=4))
def test_policies_come_back_from_json(tmp_path_factory, thresholds):
    path = tmp_path_factory.mktemp("policy") / "policy.json"
    policy = policies.make(thresholds, "similarity", epsilon=0.9, unreachable=[6])
    policies.save(policy, path)
    back = policies.load(path, exits=len(thresholds))
    np.testing.assert_array_equal(back.thresholds, policy.thresholds)
    assert back.confidence == "similarity"
    assert back.provenance == {"epsilon": 0.9, "unreachable": [6]}
    # Strict JSON: no bare Infinity, which other readers refuse.
    json.loads(path.read_text(), parse_constant=pytest.fail)


def test_infinite_thresholds_are_words_in_the_file(path):
    policies.save(policies.make([policies.NEVER, 0.25, policies.ALWAYS]), path)
    assert json.loads(path.read_text())["thresholds"] == ["never", 0.25, "always"]


def test_a_disabled_policy_is_none(path):
    policies.save(policies.make([0.5]), path, enabled=False)
    assert policies.load(path, exits=1) is None


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
        ({"enabled": "false"}, "\"enabled\" must be true or false, not 'false'"),
        ({"enabled": 0}, '"enabled" must be true or false, not 0'),
    ],
)
def test_damaged_fields(path, changes, message):
    write(path, **changes)
    with pytest.raises(ValueError, match=message):
        policies.load(path, exits=1)


@pytest.mark.parametrize("missing", ["enabled", "confidence", "thresholds", "provenance"])
def test_missing_fields_are_named(path, missing):
    write(path)
    fields = json.loads(path.read_text())
    del fields[missing]
    path.write_text(json.dumps(fields))
    with pytest.raises(ValueError, match=f"policy.json is not an exit policy.*{missing}"):
        policies.load(path, exits=1)


@pytest.mark.parametrize("text", [b"", b'{"enabled": tr', b"[1, 2]", b"\xff\xfe\x00"])
def test_files_that_are_no_policy(path, text):
    path.write_bytes(text)
    with pytest.raises(ValueError, match="policy.json is not an exit policy"):
        policies.load(path, exits=1)


def test_a_missing_file_names_the_command(path):
    with pytest.raises(FileNotFoundError, match="policy.json; write one with `launch.calibrate`"):
        policies.load(path, exits=1)


@pytest.mark.parametrize("thresholds", [[0.5, float("nan")], 0.5, [[0.5]]])
def test_thresholds_are_numbers_one_per_exit(thresholds):
    with pytest.raises(ValueError, match="thresholds must be one number per exit"):
        policies.make(thresholds)


def test_saving_is_whole_or_not_at_all(path, monkeypatch):
    policies.save(policies.make([0.25]), path)
    assert [entry.name for entry in path.parent.iterdir()] == ["policy.json"]
    before = path.read_bytes()

    def killed(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(policies.os, "replace", killed)
    with pytest.raises(KeyboardInterrupt):
        policies.save(policies.make([0.75]), path)
    assert path.read_bytes() == before


def test_other_thresholds_and_provenance_compile_nothing_new():
    traced = []

    @jax.jit
    def leaves(policy, score):
        traced.append(policy.confidence)
        return policy.leaves(0, score), policy

    for thresholds, provenance in [([0.5, 0.1], {}), ([0.7, np.inf], {"epsilon": 0.9})]:
        policy = policies.make(thresholds, "margin", **provenance)
        left, back = leaves(policy, jnp.float32(0.6))
        assert bool(left) == (thresholds[0] <= 0.6)
        np.testing.assert_array_equal(back.thresholds, policy.thresholds)
    leaves(policies.make([0.5, 0.1], "entropy"), jnp.float32(0.6))
    assert traced == ["margin", "entropy"]
