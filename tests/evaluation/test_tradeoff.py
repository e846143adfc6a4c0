import dataclasses

import numpy as np

from early_exit import policy as policies
from early_exit.decoding.generate import generate
from early_exit.decoding.mode import LOSSY, VERIFIED
from early_exit.evaluation import tradeoff

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


def test_rows_count_what_was_decoded(tiny):
    model, params = tiny
    rows, generations = tradeoff.compare(
        model,
        params,
        PROMPTS,
        {
            "full": (None, LOSSY),
            "always": (policies.forced(2, 0), LOSSY),
            "never": (policies.never(2), LOSSY),
            "verified": (policies.forced(2, 0), dataclasses.replace(VERIFIED, pending=4)),
        },
        new_tokens=9,
        rounds=1,
    )
    full, always, never, lookup = rows
    assert [row["policy"] for row in rows] == ["full", "always", "never", "verified"]
    assert full["speedup"] == 1.0
    assert full["agreement"] == never["agreement"] == 1.0
    assert (full["mean_depth"], always["mean_depth"], never["mean_depth"]) == (6, 2, 6)
    assert always["exit_shares"] == [1, 0, 0, 0] and never["exit_shares"] == [0, 0, 1, 0]
    # Verified: the full model's own answer, though some of it was proposed elsewhere.
    assert lookup["agreement"] == 1.0
    for a, b in zip(generations["verified"], generations["full"], strict=True):
        np.testing.assert_array_equal(a.tokens, b.tokens)
    proposed = np.concatenate([g.exits[1:] for g in generations["verified"]])
    np.testing.assert_allclose(lookup["exit_shares"], [(proposed == e).mean() for e in range(4)])
    expected = np.concatenate(
        [
            tradeoff.agreement(model, params, prompt, answer)[1:]
            for prompt, answer in zip(PROMPTS, generations["always"], strict=True)
        ]
    )
    assert always["agreement"] == expected.mean() < 1
    assert all(len(g.tokens) == 9 for answers in generations.values() for g in answers)


def test_speed_is_relative_to_the_first_case(tiny, monkeypatch):
    """In each round by that round's own time: a machine that slows down changes nothing."""
    generations = tradeoff.generate(*tiny, PROMPTS[:1], policy=None, max_new_tokens=4)
    seconds = iter([1.0, 0.5, 3.0, 1.0, 10.0, 5.0])  # of one case and the other, in turns

    def timed(*_, **__):
        return [dataclasses.replace(generations[0], seconds=next(seconds))]

    monkeypatch.setattr(tradeoff, "generate", timed)
    cases = {"a": (None, LOSSY), "b": (policies.never(2), LOSSY)}
    (a, b), _ = tradeoff.compare(*tiny, PROMPTS[:1], cases, new_tokens=4, rounds=3)
    assert (a["tokens_per_second"], b["tokens_per_second"]) == (3 / 3, 3 / 1)
    assert (a["speedup"], b["speedup"]) == (1.0, 2.0)
