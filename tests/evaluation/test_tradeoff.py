import dataclasses

import numpy as np
import pytest

from early_exit import policy as policies
from early_exit.decoding.generate import generate
from early_exit.decoding.mode import LOSSY, VERIFIED, served
from early_exit.evaluation import tradeoff
from early_exit.evaluation.tradeoff import Case

PROMPTS = [[7, 3, 52, 11, 29], [1, 2, 3]]


def test_agreement_is_with_the_full_model_after_the_same_text(tiny):
    model, params = tiny
    (answer,) = generate(model, params, PROMPTS[:1], policy=None, max_new_tokens=70)
    assert tradeoff.agreement(model, params, PROMPTS[0], answer).all()
    changed = answer.tokens.copy()
    changed[30] = (changed[30] + 1) % 61
    other = tradeoff.agreement(
        model, params, PROMPTS[0], dataclasses.replace(answer, tokens=changed)
    )
    # Tokens before the change are judged on the same text, the changed one is wrong, and those
    # after it are judged on the text as it now is.
    assert other[:30].all() and not other[30] and other.shape == (70,)


def test_rows_count_what_was_decoded(tiny, monkeypatch):
    model, params = tiny
    answers = []

    def watched(*args, **kwargs):
        answers.append(generate(*args, **kwargs))
        return answers[-1]

    monkeypatch.setattr(tradeoff, "generate", watched)
    verified = dataclasses.replace(served(VERIFIED, model), pending=4)
    rows = tradeoff.compare(
        model,
        params,
        PROMPTS,
        [
            Case(),
            Case("always", policies.forced(2, 0), LOSSY),
            Case("never", policies.never(2), LOSSY),
            Case("always", policies.forced(2, 0), verified),
        ],
        new_tokens=9,
        rounds=1,
    )
    full, always, never, lookup = rows
    assert [(row["policy"], row["mode"]) for row in rows] == [
        (None, None),
        ("always", "lossy"),
        ("never", "lossy"),
        ("always", "verified: exits + lookup"),
    ]
    assert full["speedup"] == 1.0
    assert full["agreement"] == never["agreement"] == 1.0
    depths = [row["blocks_per_token"] for row in (full, always, never)]
    assert depths == [6, 2, 6] and lookup["blocks_per_token"] > 6 * (1 - lookup["exit_shares"][3])
    assert always["exit_shares"] == [1, 0, 0, 0, 0] and never["exit_shares"] == [0, 0, 1, 0, 0]
    # Verified: the full model's own answer, though some of it was proposed elsewhere.
    assert lookup["agreement"] == 1.0
    # Once for nothing, to compile; then once in each case.
    warm, timed = answers[:8], [[row for (row,) in answers[i : i + 2]] for i in range(8, 16, 2)]
    assert {len(row.tokens) for (row,) in warm} == {1}
    of_full, of_always, _, of_verified = timed
    for a, b in zip(of_verified, of_full, strict=True):
        np.testing.assert_array_equal(a.tokens, b.tokens)
    proposed = np.concatenate([g.exits[1:] for g in of_verified])
    np.testing.assert_allclose(lookup["exit_shares"], [(proposed == e).mean() for e in range(5)])
    for row, of_row in zip(rows, timed, strict=True):
        to_last = np.mean([g.prefill_seconds + g.seconds for g in of_row])
        assert row["seconds_to_last"] == pytest.approx(to_last)
    expected = np.concatenate(
        [
            tradeoff.agreement(model, params, prompt, answer)[1:]
            for prompt, answer in zip(PROMPTS, of_always, strict=True)
        ]
    )
    assert always["agreement"] == expected.mean() < 1
    assert all(len(g.tokens) == 9 for of_row in timed for g in of_row)


def test_speed_is_relative_to_the_first_case(tiny, monkeypatch):
    """In each round by that round's own time: a machine that slows down changes nothing."""
    generations = tradeoff.generate(*tiny, PROMPTS[:1], policy=None, max_new_tokens=4)
    seconds = iter([9, 9, 1.0, 0.5, 3.0, 1.0, 10.0, 5.0])  # to compile; then the cases, in turns

    def timed(*_, **__):
        return [dataclasses.replace(generations[0], seconds=next(seconds), prefill_seconds=2.0)]

    monkeypatch.setattr(tradeoff, "generate", timed)
    cases = [Case(), Case("never", policies.never(2), LOSSY)]
    a, b = tradeoff.compare(*tiny, PROMPTS[:1], cases, new_tokens=4, rounds=3)
    assert (a["tokens_per_second"], b["tokens_per_second"]) == (3 / 3, 3 / 1)
    assert (a["speedup"], b["speedup"]) == (1.0, 2.0)
    assert (a["seconds_to_last"], b["seconds_to_last"]) == (2 + 3.0, 2 + 1.0)


def test_a_rate_needs_a_token_after_the_first(tiny):
    with pytest.raises(ValueError, match="at least 2 new tokens, not 1"):
        tradeoff.compare(*tiny, PROMPTS[:1], [Case()], new_tokens=1)
