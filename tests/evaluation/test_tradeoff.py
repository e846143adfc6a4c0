import dataclasses

import numpy as np
import pytest

from early_exit import policy as policies
from early_exit.evaluation import tradeoff
from early_exit.inference.generate import generate

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
        {"full": None, "always": policies.forced(2, 0), "never": policies.never(2)},
        new_tokens=9,
        rounds=1,
    )
    full, always, never = rows
    assert full["speedup"] == 1.0
    assert full["agreement"] == never["agreement"] == 1.0
    assert (full["mean_depth"], always["mean_depth"], never["mean_depth"]) == (6, 2, 6)
    assert always["exit_shares"] == [1, 0, 0] and never["exit_shares"] == [0, 0, 1]
    expected = np.concatenate(
        [
            tradeoff.agreement(model, params, prompt, answer)[1:]
            for prompt, answer in zip(PROMPTS, generations["always"], strict=True)
        ]
    )
    assert always["agreement"] == expected.mean() < 1
    assert all(len(g.tokens) == 9 for answers in generations.values() for g in answers)


def test_speed_needs_the_full_model_beside_it(tiny):
    with pytest.raises(ValueError, match="one of the policies must be None"):
        tradeoff.compare(*tiny, PROMPTS, {"never": policies.never(2)}, new_tokens=2)
