import dataclasses

import numpy as np
import pytest

from early_exit.inference.generate import Decoder, generate, stream
from early_exit.inference.mode import DEFERRED, LOOKUP, LOSSY
from early_exit.inference.sampling import Sampling

PROMPTS = [[7, 3, 52, 11, 29], [1], list(range(30)), [5, 9, 31, 2] * 6, [60, 0, 60]]
LENGTHS = [9, 21, 1, 16, 12]
# As few modes as will do: each is a program for each number of rows.
SAMPLED, SAMPLED_LOOKUP = (
    dataclasses.replace(mode, window=4, sampling=Sampling(0.9)) for mode in (LOSSY, LOOKUP)
)


@pytest.mark.parametrize(
    "mode", [LOSSY, SAMPLED, SAMPLED_LOOKUP], ids=["lossy", "sampled", "sampled lookup"]
)
def test_a_queue_answers_like_a_batch(tiny, mixed, mode):
    """Each row that has ended gives its place to the next prompt, with the prompt's own noise."""
    settings = {"policy": mixed, "mode": mode, "max_new_tokens": LENGTHS, "seed": 3}
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

    def watched(self, state, **kwargs):
        widths.append(len(state.finished_B))
        return run(self, state, **kwargs)

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
    "mode",
    [LOSSY, dataclasses.replace(DEFERRED, window=4), SAMPLED_LOOKUP],
    ids=["lossy", "deferred", "sampled lookup"],
)
def test_figures_of_an_answer_fit_together(tiny, mixed, mode):
    model, params = tiny
    depths = [2, 4, 6, 0]  # of the exits, the full model, and text that was looked up
    rows = generate(model, params, PROMPTS, policy=mixed, mode=mode, max_new_tokens=LENGTHS)
    for row, length in zip(rows, LENGTHS, strict=True):
        assert len(row.tokens) == len(row.exits) == len(row.log_probs) == length
        assert row.exits[0] == 2 and (row.exits <= (3 if mode.lookup else 2)).all()
        assert row.depths.tolist() == [depths[e] for e in row.exits]
        assert (row.log_probs <= 0).all()
        positions = row.counts.positions_BE
        assert row.layer_tokens == 2 * positions.sum()
        assert (np.diff(positions) <= 0).all()  # none gets deeper without having been shallower
        if mode is LOSSY:
            assert row.layer_tokens == row.depths[1:].sum()
        if not mode.lookup:
            assert positions[0] == length - 1
        assert (row.counts.accepted_BW <= row.counts.drafted_BW).all()
        # The drafts of one check stand from the first on.
        assert (np.diff(row.counts.accepted_BW) <= 0).all()
        assert (row.counts.drafted_BW.sum() > 0) <= mode.verified
        assert row.seconds >= 0 and row.bytes_read >= 0
        assert (row.bytes_read > 0) == (length > 1)


def test_time_is_counted_from_the_prefill_on(tiny, mixed):
    portions = stream(*tiny, PROMPTS, policy=mixed, max_new_tokens=9, portion=4)
    seconds = [rows[0].seconds for rows in portions]
    assert seconds[0] == 0 and seconds == sorted(seconds) and seconds[-1] > 0
