"""Many prompts, in portions, and what cannot be answered; that answers are right: test_decode."""

import dataclasses

import numpy as np
import pytest

from early_exit import policy as policies
from early_exit.decoding import decode as programs
from early_exit.decoding.decoder import Decoder
from early_exit.decoding.generate import generate, stream
from early_exit.decoding.mode import DEFERRED, LOSSY, VERIFIED, Mode
from early_exit.decoding.sampling import GREEDY, Sampling

PROMPTS = [[7, 3, 52, 11, 29], [1], list(range(30)), [5, 9, 31, 2] * 6, [60, 0, 60]]
LENGTHS = [9, 21, 1, 16, 12]
# As few modes as will do: each is a program for each number of rows.
SAMPLED, FEW = Sampling(0.9), dataclasses.replace(VERIFIED, pending=4)


@pytest.mark.long
@pytest.mark.parametrize(
    ("mode", "sampling"),
    [(LOSSY, GREEDY), (LOSSY, SAMPLED), (FEW, SAMPLED)],
    ids=["lossy", "sampled", "sampled verified"],
)
def test_a_queue_answers_like_a_batch(tiny, mixed, mode, sampling):
    """Each row that has ended gives its place to the next prompt, with the prompt's own noise."""
    settings = {"policy": mixed, "mode": mode, "sampling": sampling, "seed": 3}
    settings["max_new_tokens"] = LENGTHS
    together = generate(*tiny, PROMPTS, **settings)
    # A token that some answer has midway and some has not, so that rows end early.
    stop = int(together[1].tokens[6])
    for stop_ids in ((), (stop,)):
        queued = generate(*tiny, PROMPTS, **settings, stop_ids=stop_ids, batch=2)
        for i, (whole, row, length) in enumerate(zip(together, queued, LENGTHS, strict=True)):
            expected = whole.tokens.tolist()
            assert len(expected) == length
            if stop_ids and stop in expected:
                expected = expected[: expected.index(stop) + 1]
            assert row.tokens.tolist() == expected, i
            count = len(expected)
            np.testing.assert_allclose(row.log_probs, whole.log_probs[:count], atol=1e-5)
            if not mode.verified:  # which drafts pay depends on who shares the passes
                assert row.exits.tolist() == whole.exits[:count].tolist()
                assert row.layer_tokens == row.depths[1:].sum()
                assert row.counts.evaluations_BE[:2].tolist() == [
                    count - 1,
                    (row.exits[1:] > 0).sum(),
                ]


def test_a_queue_runs_as_few_rows_as_it_is_told(tiny, mixed, monkeypatch):
    widths = []
    run = Decoder.run

    def watched(self, state, *args, **kwargs):
        widths.append(len(state.finished_B))
        return run(self, state, *args, **kwargs)

    monkeypatch.setattr(Decoder, "run", watched)
    generate(*tiny, PROMPTS, policy=mixed, max_new_tokens=LENGTHS, batch=2)
    assert set(widths) == {2}


def test_more_rows_than_prompts_are_no_rows(tiny, mixed):
    few, many = (
        generate(*tiny, PROMPTS[:2], policy=mixed, max_new_tokens=9, batch=batch)
        for batch in (2, 8)
    )
    assert [row.tokens.tolist() for row in few] == [row.tokens.tolist() for row in many]


@pytest.mark.parametrize("batch", [0, -1])
def test_an_empty_batch_is_refused(tiny, batch):
    with pytest.raises(ValueError, match=f"a batch has at least 1 row, not {batch}"):
        generate(*tiny, PROMPTS, policy=None, max_new_tokens=3, batch=batch)


@pytest.mark.parametrize("batch", [None, 1])
def test_a_bad_prompt_is_refused_before_anything_runs(tiny, monkeypatch, batch):
    monkeypatch.setattr(Decoder, "run", lambda *_, **__: pytest.fail("something ran"))
    with pytest.raises(ValueError, match="prompt 2 is empty; give at least one token"):
        generate(*tiny, [[1], [2], []], policy=None, max_new_tokens=3, batch=batch)


@pytest.mark.parametrize(
    ("mode", "sampling"),
    [(LOSSY, GREEDY), (dataclasses.replace(DEFERRED, pending=4), GREEDY), (FEW, SAMPLED)],
    ids=["lossy", "deferred", "sampled verified"],
)
def test_figures_of_an_answer_fit_together(tiny, mixed, mode, sampling):
    model, params = tiny
    depths = [2, 4, 6, 0]  # of the exits, the full model, and text that was looked up
    how = {"policy": mixed, "mode": mode, "sampling": sampling}
    rows = generate(model, params, PROMPTS, max_new_tokens=LENGTHS, **how)
    for row, length in zip(rows, LENGTHS, strict=True):
        assert len(row.tokens) == len(row.exits) == len(row.log_probs) == length
        assert row.exits[0] == 2 and (row.exits <= (3 if "lookup" in mode.drafters else 2)).all()
        assert row.depths.tolist() == [depths[e] for e in row.exits]
        assert (row.log_probs <= 0).all()
        positions = row.counts.positions_BE
        assert row.layer_tokens == 2 * positions.sum()
        assert (np.diff(positions) <= 0).all()  # none gets deeper without having been shallower
        if mode is LOSSY:
            assert row.layer_tokens == row.depths[1:].sum()
        if "lookup" not in mode.drafters:
            assert positions[0] == length - 1
        assert (row.counts.accepted_BW <= row.counts.drafted_BW).all()
        # The drafts of one check stand from the first on.
        assert (np.diff(row.counts.accepted_BW) <= 0).all()
        assert (row.counts.drafted_BW.sum() > 0) <= mode.verified
        assert row.seconds >= 0 and row.bytes_read >= 0
        assert (row.bytes_read > 0) == (length > 1)


def test_time_is_counted_from_the_prefill_on(tiny, mixed):
    portions = list(stream(*tiny, PROMPTS, policy=mixed, max_new_tokens=9, portion=4))
    seconds = [rows[0].seconds for rows in portions]
    assert seconds[0] == 0 and seconds == sorted(seconds) and seconds[-1] > 0
    prefill = {row.prefill_seconds for rows in portions for row in rows}
    assert len(prefill) == 1 and prefill.pop() > 0


def test_each_prompt_of_a_queue_has_a_prefill_of_its_own(tiny, mixed):
    rows = generate(*tiny, PROMPTS, policy=mixed, max_new_tokens=5, batch=2)
    assert len({row.prefill_seconds for row in rows}) == len(PROMPTS)


def test_streaming_gives_the_same_tokens_and_compiles_nothing_new(tiny, mixed):
    (whole,) = generate(*tiny, PROMPTS[:1], policy=mixed, max_new_tokens=21)
    compiled = programs.decode._cache_size(), programs.prefill._cache_size()
    start = [PROMPTS[0][:3]]
    portions = list(stream(*tiny, start, policy=mixed, max_new_tokens=21, portion=4))
    assert [len(rows[0].tokens) for rows in portions] == [1, 5, 9, 13, 17, 21]
    generate(*tiny, PROMPTS[:1], policy=policies.make([0.3, 0.1]), max_new_tokens=21)
    (again,) = generate(*tiny, PROMPTS[:1], policy=mixed, max_new_tokens=21)
    np.testing.assert_array_equal(again.tokens, whole.tokens)
    np.testing.assert_array_equal(again.log_probs, whole.log_probs)
    assert (programs.decode._cache_size(), programs.prefill._cache_size()) == compiled


def test_streaming_shows_only_what_has_been_checked(tiny):
    repeating = PROMPTS[3:4]
    (whole,) = generate(*tiny, repeating, policy=None, max_new_tokens=30)
    settings = {
        "policy": policies.forced(2, 0),
        "max_new_tokens": 30,
        "mode": VERIFIED,
        "portion": 1,
    }
    compiled = set()
    for rows in stream(*tiny, repeating, **settings):
        tokens = rows[0].tokens.tolist()
        assert tokens == whole.tokens[: len(tokens)].tolist()
        compiled.add(programs.decode._cache_size())
    assert len(tokens) == 30
    assert len(compiled) == 1, "something was compiled after the first portion, on the clock"


@pytest.mark.parametrize(
    ("prompts", "new", "message"),
    [
        ([[]], 3, "prompt 0 is empty"),
        ([[1], [1]], [3, 0], "prompt 1 asks for 0 new tokens"),
        ([[1] * 510], 3, "need 513 positions but the model's context is 512"),
        ([[1], [2, 61]], 3, "ids of prompt 1 go from 2 to 61, but the model knows 0 to 60"),
        ([[-1]], 3, "ids of prompt 0 go from -1"),
        ([[2**40]], 3, "ids of prompt 0 go from 1099511627776"),
        ([], 3, "there are no prompts; give at least one"),
        ([1, 2, 3], 3, "prompt 0 must be one list of token ids, not 1"),
        ([[1], [[2], [3]]], 3, r"prompt 1 must be one list of token ids, not \[\[2\], \[3\]\]"),
        ([[1], [[2], [3, 4]]], 3, "prompt 1 must be one list of token ids"),
        ([[1.5]], 3, r"prompt 0 must be one list of token ids, not \[1.5\]"),
        (["say"], 3, "prompt 0 must be one list of token ids, not 'say'"),
        ([[1]], 2.5, "max_new_tokens must be an integer, or one for each of 1 prompts, not 2.5"),
        ([[1]], [2, 3], r"one for each of 1 prompts, not \[2, 3\]"),
        ([[1]], None, "max_new_tokens must be an integer"),
    ],
)
def test_bad_prompts(tiny, prompts, new, message):
    for batch in (None, 1):
        with pytest.raises(ValueError, match=message):
            generate(*tiny, prompts, policy=None, max_new_tokens=new, batch=batch)


def test_numbers_of_numpy_are_numbers(tiny):
    settings = {"policy": None, "max_new_tokens": 3, "stop_ids": [5]}
    plain = generate(*tiny, PROMPTS[:2], **settings)
    settings |= {"max_new_tokens": np.int64(3), "stop_ids": np.array([5])}
    arrays = [np.array(prompt, np.uint16) for prompt in PROMPTS[:2]]
    for batch, new in [(None, np.int64(3)), (1, np.int64(3)), (None, np.array([3, 3]))]:
        found = generate(*tiny, arrays, **settings | {"max_new_tokens": new}, batch=batch)
        assert [row.tokens.tolist() for row in found] == [row.tokens.tolist() for row in plain]


@pytest.mark.parametrize(
    ("stop_ids", "message"),
    [
        ([61], "ids of the stop tokens go from 61 to 61, but the model knows 0 to 60"),
        ([2**40], "ids of the stop tokens go from"),
        ([5, -1], "ids of the stop tokens go from -1"),
        (None, "the stop tokens must be one list of token ids, not None"),
        ([[5], [6]], "the stop tokens must be one list of token ids"),
        ("</s>", "the stop tokens must be one list of token ids"),
    ],
)
def test_stop_tokens_that_the_model_lacks_are_refused(tiny, stop_ids, message):
    with pytest.raises(ValueError, match=message):
        generate(*tiny, PROMPTS[:1], policy=None, max_new_tokens=3, stop_ids=stop_ids)


@pytest.mark.parametrize("mode", [LOSSY, VERIFIED], ids=["lossy", "verified"])
def test_a_policy_for_a_score_that_the_exits_lack_is_refused(tiny, mode):
    policy = policies.make([0.5, 0.5], "gate")
    with pytest.raises(ValueError, match="scores by gate, which the exits of this model do not"):
        generate(*tiny, PROMPTS[:1], policy=policy, mode=mode, max_new_tokens=3)


@pytest.mark.parametrize("exits", [1, 3])
def test_a_policy_for_another_number_of_exits_is_refused(tiny, exits):
    """An index past its end would be clamped, and some other exit's threshold used."""
    with pytest.raises(ValueError, match=f"{exits} thresholds but the model has 2 exits"):
        generate(*tiny, PROMPTS[:1], policy=policies.never(exits), max_new_tokens=3)


@pytest.mark.parametrize("slots", [128, 300])
def test_slots_that_do_not_fit_are_refused(tiny, slots):
    with pytest.raises(ValueError, match=f"slots={slots} must be a multiple of 128 that holds"):
        generate(*tiny, [[1] * 140], policy=None, max_new_tokens=3, slots=slots)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"skipped": "recompute"}, "propagate or defer, not 'recompute'"),
        ({"drafters": ("exits",)}, "use skipped='defer'"),
        (
            {"skipped": "defer", "drafters": ("lookup", "exits")},
            "lookup, recurrent, in this order",
        ),
        ({"skipped": "defer", "drafters": ("n-grams",)}, "must be some of exits, lookup"),
        ({"skipped": "defer", "pending": 1}, "pending must be 2 to 32 positions, not 1"),
    ],
)
def test_modes_that_make_no_sense_are_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        Mode(**fields)
