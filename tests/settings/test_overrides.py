import json

import pytest
from absl import flags
from hypothesis import given
from hypothesis import strategies as st
from ml_collections import config_flags

from early_exit.settings import overrides

DEFAULTS = dict(head="mlp", points=(6, 12), rate=1e-4, steps=100, runlocal=False)


def base():
    return overrides.ConfigDict(
        {"tune": {"learning_rate": 1e-4, "steps": 100}, "exits": {"points": (6, 12)}, "seed": 0}
    )


@given(
    st.fixed_dictionaries(
        {},
        optional={
            "head": st.text("abcxyz:/._-", min_size=1),
            "points": st.lists(st.integers()).map(tuple),
            "rate": st.floats(allow_nan=False),
            "steps": st.integers(),
            "runlocal": st.booleans(),
        },
    )
)
def test_arguments_written_and_parsed_come_back(given_values):
    def write(value):
        return ":".join(map(str, value)) if isinstance(value, tuple) else str(value)

    arg = ",".join(f"{name}={write(value)}" for name, value in given_values.items())
    parsed = overrides.parse_arg(arg, **DEFAULTS).to_dict()
    assert parsed == DEFAULTS | given_values
    assert {name: type(value) for name, value in parsed.items()} == {
        name: type(value) for name, value in DEFAULTS.items()
    }


def test_a_flag_alone_is_true_and_no_argument_is_the_defaults():
    assert overrides.parse_arg("runlocal", **DEFAULTS).runlocal is True
    assert overrides.parse_arg(None, **DEFAULTS).to_dict() == DEFAULTS
    assert overrides.parse_arg("", **DEFAULTS).to_dict() == DEFAULTS


def test_a_single_point_is_a_tuple():
    assert overrides.parse_arg("points=6", **DEFAULTS).points == (6,)


@pytest.mark.parametrize(
    "arg, message",
    [
        ("heads=mlp", "unknown config argument 'heads'"),
        ("points=6;12", "'points=6;12' is not ints written as 6:12:24"),
        ("points", "'points' is not ints"),
        ("steps=1e3", "'steps=1e3' is not an int"),
        ("rate=fast", "'rate=fast' is not a number"),
        ("runlocal=maybe", "'runlocal=maybe' is not true or false"),
    ],
)
def test_bad_arguments_list_what_is_known(arg, message):
    with pytest.raises(ValueError, match=message) as caught:
        overrides.parse_arg(arg, **DEFAULTS)
    assert "head=mlp, points=6:12, rate=0.0001, steps=100, runlocal=False" in str(caught.value)


def test_override_changes_only_what_it_names_and_only_in_a_copy():
    before = base()
    after = overrides.override(before, {"tune.learning_rate": 1, "exits.points": [3, 5]})
    assert before == base()
    assert after.tune.learning_rate == 1.0 and type(after.tune.learning_rate) is float
    assert after.exits.points == (3, 5)
    assert (after.tune.steps, after.seed) == (100, 0)


@pytest.mark.parametrize(
    "given, error, message",
    [
        ({"tune.learning_rat": 1e-3}, ValueError, "did you mean 'tune.learning_rate'"),
        ({"learning_rate": 1e-3}, ValueError, "no 'learning_rate'; did you mean 'tune.learning"),
        ({"tune": {"steps": 1}}, ValueError, "config has no 'tune'"),
        ({"tune.steps": 1.5}, TypeError, r"config.tune.steps is int \(100\), not float \(1.5\)"),
        ({"tune.steps": True}, TypeError, "not bool"),
        ({"seed": "1"}, TypeError, "not str"),
        ({"exits.points": (6, 1.5)}, TypeError, "config.exits.points is int"),
        ({"exits.points": 6}, TypeError, "config.exits.points is tuple"),
    ],
)
def test_override_refuses_unknown_keys_and_other_types(given, error, message):
    with pytest.raises(error, match=message):
        overrides.override(base(), given)


def test_tuples_survive_json():
    stored = json.loads(json.dumps({"exits.points": base().exits.points}))
    assert overrides.override(base(), stored) == base()


@pytest.mark.filterwarnings("ignore:the load_module:DeprecationWarning")  # ml_collections' own
def test_tuples_survive_a_config_file_and_its_flags(tmp_path, monkeypatch):
    file = tmp_path / "example.py"
    file.write_text(
        "from early_exit.settings.overrides import parse_arg\n"
        "def get_config(arg=None):\n"
        "    return parse_arg(arg, points=(6, 12), later=(1,), steps=100)\n"
    )
    argv = ["program", f"--config={file}:points=3:5", "--config.later=(8,9)", "--config.steps=7"]
    monkeypatch.setattr("sys.argv", argv)
    values = flags.FlagValues()
    config_flags.DEFINE_config_file("config", flag_values=values)
    values(argv)
    assert values.config.to_dict() == {"points": (3, 5), "later": (8, 9), "steps": 7}


def test_a_locked_config_stays_locked():
    assert overrides.override(base().lock(), {"seed": 1}).is_locked


def test_sweeps_combine_like_loops():
    rates, heads = overrides.over("rate", (1, 2)), overrides.over("head", ("mlp", "norm"))
    assert overrides.prod(rates, heads) == [
        {"rate": rate, "head": head} for rate in (1, 2) for head in ("mlp", "norm")
    ]
    assert overrides.zipit(rates, heads) == [
        {"rate": 1, "head": "mlp"},
        {"rate": 2, "head": "norm"},
    ]
    assert overrides.chain(rates, heads) == [*rates, *heads]
    assert overrides.prod() == [{}]


def test_sweeps_that_contradict_each_other_are_errors():
    rates = overrides.over("rate", (1, 2))
    with pytest.raises(ValueError, match="two sweeps set rate"):
        overrides.prod(rates, rates)
    with pytest.raises(ValueError, match="shorter"):
        overrides.zipit(rates, overrides.over("head", ("mlp",)))
