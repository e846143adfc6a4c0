"""What rows of a batch have to do with each other: they share passes, and nothing else."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from early_exit import policy as policies
from early_exit.decoding.costs import Costs
from early_exit.decoding.decoder import Decoder
from early_exit.decoding.generate import generate
from early_exit.decoding.mode import DEFERRED, LOSSY, VERIFIED, Mode, verified
from early_exit.decoding.rules import Rules
from early_exit.decoding.sampling import Sampling

PROMPT = [7, 3, 52, 11, 29]
REPEATING = [5, 9, 31, 2] * 6
# Few widths, so that there is less to compile.
LOSSY, DEFERRED, BY_EXITS, VERIFIED = (
    dataclasses.replace(mode, pending=4) for mode in (LOSSY, DEFERRED, verified("exits"), VERIFIED)
)


def run(model, params, prompts, policy, new_tokens=12, **kwargs):
    return generate(model, params, prompts, policy=policy, max_new_tokens=new_tokens, **kwargs)


def decoded(decoder, rows, new_tokens, thresholds_EB):
    """Answers to PROMPT in so many rows, each with thresholds of its own."""
    policy = dataclasses.replace(decoder.policy, thresholds=jnp.array(thresholds_EB))
    keys = jax.random.split(jax.random.key(0), rows)
    state = decoder.start([PROMPT] * rows, [new_tokens] * rows, keys, None)
    state = decoder.run(state, dataclasses.replace(Rules.same(rows), policy=policy))
    return decoder.generations(state, [0.0] * rows)


@pytest.mark.long
@pytest.mark.parametrize(
    ("mode", "temperature"), [(LOSSY, 0.0), (DEFERRED, 0.9), (BY_EXITS, 0.9), (VERIFIED, 0.0)]
)
def test_rows_of_a_batch_equal_rows_alone(tiny, mixed, mode, temperature):
    model, params = tiny
    sampling = Sampling(temperature)
    prompts = [PROMPT, [1], list(range(40)), [60, 0, 60], [5, 9] * 70, REPEATING, [8], [4, 4]]
    lengths = [9, 30, 4, 1, 17, 25, 12, 20]
    batch = run(model, params, prompts, mixed, lengths, mode=mode, sampling=sampling)
    decoder = Decoder(model, params, mixed, (), mode, sampling=sampling)
    for i, (prompt, length, row) in enumerate(zip(prompts, lengths, batch, strict=True)):
        keys = jax.random.split(jax.random.key(0), len(prompts))[i : i + 1]
        state = decoder.run(decoder.start([prompt], length, keys, None))
        (alone,) = decoder.generations(state, [0.0])
        np.testing.assert_array_equal(row.tokens, alone.tokens)
        np.testing.assert_allclose(row.log_probs, alone.log_probs, atol=1e-5)
        assert len(row.tokens) == length
        if not mode.verified:  # how many drafts pay depends on the batch; what they give does not
            np.testing.assert_array_equal(row.exits, alone.exits)
            same = ["evaluations_BE", "positions_BE", "read_BE"][: 3 if mode.propagates else 1]
            for name in same:
                np.testing.assert_array_equal(
                    getattr(row.counts, name), getattr(alone.counts, name)
                )
    assert len({tuple(row.exits[1:]) for row in batch}) > 1


def test_a_segment_is_read_once_for_all_rows_that_need_it(tiny, mixed):
    """In each step as deep as the deepest row, and no deeper."""
    answers = run(*tiny, [[row, *PROMPT] for row in range(8)], mixed, 60)
    passes = 2 * sum(answer.counts.passes_BEN.sum() for answer in answers)
    deepest = np.max([answer.depths[1:] for answer in answers], axis=0)
    assert deepest.mean() > 2 and np.mean([answer.depths[1:] for answer in answers]) < 5.5
    np.testing.assert_allclose(passes, deepest.sum(), rtol=1e-5)


def test_ended_rows_cost_no_pass(tiny):
    policy = policies.forced(2, 0)
    answers = run(*tiny, [PROMPT] * 3, policy, [60, 60, 20])
    assert [len(answer.tokens) for answer in answers] == [60, 60, 20]
    passes = sum(answer.counts.passes_BEN.sum(axis=1) for answer in answers)
    np.testing.assert_allclose(passes, [59, 0, 0], rtol=1e-5)


ALWAYS, NEVER = [policies.ALWAYS] * 2, [policies.NEVER] * 2


@pytest.mark.parametrize(
    ("thresholds", "leaves"),
    [(ALWAYS, 0), ([policies.NEVER, policies.ALWAYS], 1)],
    ids=["first exit", "second exit"],
)
def test_what_waits_goes_along_with_a_row_that_goes_deeper(tiny, thresholds, leaves):
    """Beside a row that never leaves, no pass is wider for the one that does; both answers are as
    alone, where every fourth position is the full model's and takes three along."""
    decoder = Decoder(*tiny, policies.never(2), (), DEFERRED)
    (alone,) = decoded(decoder, 1, 30, np.transpose([thresholds]))
    (full,) = decoded(decoder, 1, 30, np.transpose([NEVER]))
    assert alone.exits[1:5].tolist() == [leaves] * 3 + [2]
    wide = alone.counts.passes_BEN[leaves + 1 :]
    assert wide[:, 0].sum() == 0 and wide[:, 1].sum() > 0
    beside = decoded(decoder, 2, 30, np.transpose([thresholds, NEVER]))
    for row, expected in zip(beside, (alone, full), strict=True):
        np.testing.assert_array_equal(row.tokens, expected.tokens)
        np.testing.assert_array_equal(row.exits, expected.exits)
        np.testing.assert_allclose(row.log_probs, expected.log_probs, atol=1e-5)
    passes_EN = sum(row.counts.passes_BEN for row in beside)
    np.testing.assert_allclose(passes_EN, [[29, 0]] * 3, rtol=1e-5)
    # Each position has passed each block once, but the last: the row had ended.
    run_E = beside[0].counts.positions_BE
    assert run_E.tolist() == [29] * (leaves + 1) + [28] * (2 - leaves)


def test_as_much_goes_along_as_a_pass_has_room_for(tiny):
    """Two rows leave twice, then one must go deeper: the others' positions fill its width."""
    model, params = tiny
    decoder = Decoder(model, params, policies.never(2), (), Mode("defer", pending=8))
    rules = Rules.same(3)

    def stepped(state, thresholds):
        policy = dataclasses.replace(
            decoder.policy, thresholds=jnp.transpose(jnp.array(thresholds))
        )
        return decoder.run(state, dataclasses.replace(rules, policy=policy), steps=1)

    keys = jax.random.split(jax.random.key(0), 3)
    state = decoder.start([PROMPT] * 3, [30] * 3, keys, None)
    filled = [np.array(state.filled_BE)]
    for thresholds in (
        [ALWAYS, ALWAYS, NEVER],  # nothing waits afterwards
        [ALWAYS, ALWAYS, ALWAYS],
        [ALWAYS, ALWAYS, ALWAYS],
        [NEVER, ALWAYS, ALWAYS],  # three positions: a pass four wide, which holds all three rows'
        [ALWAYS, ALWAYS, ALWAYS],
        [ALWAYS, ALWAYS, ALWAYS],
        [NEVER, ALWAYS, ALWAYS],
    ):
        state = stepped(state, thresholds)
        filled.append(np.array(state.filled_BE))
    behind = [(f[:, 0] - f[:, 2]).tolist() for f in filled]
    assert behind == [
        [0, 0, 0], [0, 0, 0], [1, 1, 1], [2, 2, 2], [0, 0, 0], [1, 1, 1], [2, 2, 2], [0, 0, 0]
    ]  # fmt: skip


@pytest.mark.parametrize("among", [2, 3])
def test_drafts_by_exits_are_made_by_all_rows_or_none(tiny, among):
    """Beside a row that goes on, no exit is asked: its pass gives each row a token anyway."""
    mode = BY_EXITS
    free = Costs(jnp.ones(len(mode.widths)), jnp.float32(0))
    decoder = Decoder(*tiny, policies.never(2), (), mode, free)
    (full,) = decoded(decoder, 1, 30, np.transpose([NEVER]))
    for last, drafted in ((NEVER, False), (ALWAYS, True)):
        rows = decoded(decoder, among, 30, np.transpose([ALWAYS] * (among - 1) + [last]))
        for row in rows:
            np.testing.assert_array_equal(row.tokens, full.tokens)
            assert bool(row.counts.drafted_BW.sum()) == drafted
            assert bool(row.counts.evaluations_BE[:-1].sum()) == drafted
