"""What a page carries of an answer is what decoding and calibration would have found there."""

import dataclasses
import pathlib
import types

import jax
import numpy as np
import pytest
from slow_decoder import SlowDecoder

from early_exit import policy as policies
from early_exit.calibration import thresholds
from early_exit.decoding.generate import generate
from early_exit.evaluation import exits, explore, scoring
from early_exit.exits.heads import ExitConfig
from early_exit.exits.multi_exit import MultiExit
from early_exit.pretrained.load import load

CHAT = pathlib.Path(__file__).parents[1] / "fixtures" / "tiny_chat"
NEW = 20


@pytest.fixture(scope="module")
def tuned():
    pretrained = load(str(CHAT))
    model = MultiExit(pretrained.config, ExitConfig(points=(2, 4), head="norm", classes=200))
    ids = jax.numpy.arange(200, dtype="int32")
    heads = model.init_exits(jax.random.key(0), pretrained.params, "copy", ids)
    return types.SimpleNamespace(
        model=model,
        params={"backbone": pretrained.params, "exits": heads, "token_ids": ids},
        tokenizer=pretrained.tokenizer,
        stop_ids=list(pretrained.generation.stop_ids),
        config=types.SimpleNamespace(evaluate=types.SimpleNamespace(sample_tokens=NEW)),
    )


@pytest.fixture(scope="module")
def records(tuned):
    tokens = np.random.default_rng(0).integers(0, tuned.model.config.vocab_size, (4, 32))
    batch = {
        "tokens": tokens.astype(np.int32),
        "documents": np.ones((4, 32), np.int32),
        "positions": np.tile(np.arange(32, dtype=np.int32), (4, 1)),
    }
    return exits.record(tuned.model, tuned.params, [batch], soften=True)


PROMPT = [5, 90, 17, 44]


@pytest.fixture(scope="module")
def answer(tuned):
    (found,) = generate(
        tuned.model,
        tuned.params,
        [PROMPT],
        policy=None,
        max_new_tokens=NEW,
        stop_ids=tuned.stop_ids,
    )
    return found.tokens.tolist()


def with_infinities(rows):
    return np.array([[-np.inf if x is None else x for x in row] for row in rows])


def test_each_exit_says_what_it_says_of_the_whole_text(tuned, records, answer):
    policy = policies.make([0.02, 0.02])
    found = explore.explorer(tuned, records, policy, [("a prompt", PROMPT)])
    (shown,) = found["answers"]
    assert len(shown["pieces"]) == len(answer) and shown["prompt"] == "a prompt"
    slow = SlowDecoder(tuned.model, tuned.params)
    states = slow.states([*PROMPT, *answer])
    places = range(len(PROMPT) - 1, len(PROMPT) - 1 + len(answer))
    for e in range(2):
        for i, at in enumerate(places):
            score, best = slow.score("max_prob", states, e, at, [])
            kept = shown["scores"][e][i]
            assert (kept is None) == (best is None)
            if kept is not None:
                assert kept == pytest.approx(score, abs=1e-5)
                assert shown["said"][e][i] == best
    assert shown["said"][2] == answer
    text = tuned.tokenizer.decode
    assert all(found["words"][str(token)] == text([token]) for token in answer)
    assert found["depths"] == [2, 4, 6] and found["costs"][-1] == 1


@pytest.mark.parametrize("fields", [{}, {"decay": 3.0}, {"temperatures": [2.0, 0.5, 1.0]}], ids=str)
def test_positions_leave_where_given_text_would(tuned, records, answer, fields):
    policy = policies.make([0.02, 0.02], **fields)
    (shown,) = explore.explorer(tuned, records, policy, [("", PROMPT)])["answers"]
    (expected,) = scoring.score(
        tuned.model,
        tuned.params,
        [(PROMPT, answer)],
        policy=policy,
        mode=None,
        limits=[NEW],
    )
    assert shown["exits"] == expected.exits.tolist()
    assert shown["exits"][0] == 2
    if "decay" not in fields:  # the page finds the same by comparing numbers
        scores = with_infinities(shown["scores"])[:, 1:]
        limits = np.asarray(policy.thresholds)
        assert shown["exits"][1:] == policies.first_exit(scores[:-1], limits).tolist()


def test_numbers_in_the_page_compare_as_float32_does(tuned, records):
    """Thresholds are scores that were seen, so equal numbers must stay equal."""
    found = explore.explorer(tuned, records, policies.make([0.02, 0.02]), [("", PROMPT)])
    seen = {x for row in explore._numbers_of(records.score("max_prob")[:-1]) for x in row}
    limits = {x for row in found["thresholds"] for x in row} - {"never", None}
    assert limits and limits <= seen
    values = np.sort(np.random.default_rng(0).random(2000).astype(np.float32))
    kept = explore._numbers_of(values[None])[0]
    assert np.float32(kept).tolist() == values.tolist() and sorted(kept) == kept


def test_thresholds_are_those_of_each_epsilon(tuned, records):
    found = explore.explorer(tuned, records, policies.make([0.02, 0.02]), [("", PROMPT)])
    words = {"never": np.inf, None: -np.inf}
    for epsilon in (0.5, 0.9, 1.0):
        row = found["thresholds"][found["epsilons"].index(epsilon)]
        policy = thresholds.fit(records, "max_prob", epsilon)
        expected = np.asarray(policy.thresholds)
        assert np.float32([words.get(x, x) for x in row]).tolist() == expected.tolist()


def test_there_is_nothing_to_look_into_without_exits_or_known_temperatures(tuned, records):
    unknown = policies.make([0.5, 0.5], temperatures=[1.1, 1.0, 1.0])
    assert explore.explorer(tuned, records, unknown, [("", PROMPT)]) is None
    bare = dataclasses.replace(tuned.model, exits=dataclasses.replace(tuned.model.exits, points=()))
    without = types.SimpleNamespace(**vars(tuned) | {"model": bare})
    assert explore.explorer(without, records, policies.make([]), [("", PROMPT)]) is None


def row(speedup, shares, mode="lossy"):
    return {"mode": mode, "speedup": speedup, "exit_shares": [*shares, 0.0, 0.0]}


COSTS = [0.2, 0.6, 1.0]


def test_the_line_goes_through_what_was_measured():
    rows = [row(1.0, [0, 0, 1], None), row(5.0, [0, 0, 1], "verified: lookup")]
    # Costs 0.6 and 0.8; time = 0.2 + cost.
    rows += [row(1 / 0.8, [0, 1, 0]), row(1 / 1.0, [0, 0.5, 0.5])]
    found = explore.speed_line(rows, COSTS)
    assert found == pytest.approx({"fixed": 0.2, "slope": 1.0, "points": 2})


@pytest.mark.parametrize(
    "rows",
    [
        [row(1.25, [0, 1, 0])],  # one alone
        [row(1.25, [0, 1, 0]), row(1.25, [0, 1, 0])],  # twice the same
        [row(1.2, [0, 1, 0]), row(1.3, [0, 0.9, 0.1])],  # dearer and faster: noise
    ],
)
def test_where_no_line_can_be_told_time_is_in_proportion(rows):
    found = explore.speed_line(rows, COSTS)
    assert found["fixed"] == 0 and found["slope"] > 0
    times = [1 / r["speedup"] for r in rows]
    costs = [float(np.dot(r["exit_shares"][:3], COSTS)) for r in rows]
    assert found["slope"] == pytest.approx(np.mean(times) / np.mean(costs))


def test_without_a_policy_timed_speed_is_by_cost_alone():
    assert explore.speed_line([], COSTS) == {"fixed": 0.0, "slope": 1.0, "points": 0}
