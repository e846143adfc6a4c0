import dataclasses

import numpy as np
import pytest
from slow_decoder import CLOSE, SlowDecoder, mixed_policy

from conftest import TINY, build
from early_exit import policy as policies
from early_exit.decoding.generate import generate
from early_exit.decoding.mode import DEFERRED, LOSSY, Mode, verified
from early_exit.decoding.sampling import Sampling
from early_exit.evaluation.scoring import rolling, score

FOUR_BLOCKS = dataclasses.replace(TINY, depth=4)
PROMPT = [7, 3, 52, 11, 29]
TEXT = np.random.default_rng(0).integers(0, 61, 40).tolist()

# Head, classes, confidence, what else the policy has, and how its skipped blocks are handled.
PROGRAMS = [
    ("norm", 0, "max_prob", {}, "propagate"),
    ("layer", 12, "similarity", {}, "propagate"),
    ("embedding", 5, "patience", {}, "propagate"),
    ("mlp", 12, "entropy", {"decay": 3.0}, "propagate"),
    ("mlp", 0, "margin", {"temperatures": [2.0, 0.5, 1.0]}, "defer"),
    ("layer", 12, "gate", {}, "defer"),
    ("norm", 12, "max_prob", {"decay": 2.0}, "defer"),
]


@pytest.mark.parametrize(
    ("head", "classes", "confidence", "fields", "skipped"), PROGRAMS, ids=lambda x: str(x)[:12]
)
def test_a_text_is_judged_as_decoding_has_judged_it(head, classes, confidence, fields, skipped):
    """What was drawn at random is given back: the same exits, and the same log-probabilities."""
    points = (1, 3) if confidence not in ("patience", "gate") else (1, 2, 3)
    model, params = build(FOUR_BLOCKS, points=points, head=head, classes=classes, gate=True)
    mode = Mode(skipped, pending=3)
    policy = policies.patient(3, 1)
    if confidence != "patience":
        policy = mixed_policy(model, params, PROMPT, mode, confidence, **fields)
    prompts, drawn = [PROMPT, PROMPT[:2]], {"mode": mode, "sampling": Sampling(1.0)}
    answers = generate(model, params, prompts, policy=policy, max_new_tokens=[24, 17], **drawn)
    texts = list(zip([PROMPT, PROMPT[:2]], [a.tokens.tolist() for a in answers], strict=True))
    found = score(model, params, texts, policy=policy, mode=mode)
    for answer, got in zip(answers, found, strict=True):
        assert got.exits.tolist() == answer.exits.tolist()
        np.testing.assert_allclose(got.log_probs, answer.log_probs, atol=CLOSE)
    assert len({e for answer in answers for e in answer.exits}) > 1


@pytest.mark.parametrize("mode", [LOSSY, DEFERRED], ids=lambda mode: mode.name)
def test_what_greedy_decoding_says_is_what_it_would_choose(tiny, mode):
    policy = mixed_policy(*tiny, PROMPT, mode)
    (answer,) = generate(*tiny, [PROMPT], policy=policy, max_new_tokens=24, mode=mode)
    (same,) = score(*tiny, [(PROMPT, answer.tokens)], policy=policy, mode=mode)
    assert same.chosen.all()
    changed = answer.tokens.copy()
    changed[9] = (changed[9] + 1) % 61
    (other,) = score(*tiny, [(PROMPT, changed)], policy=policy, mode=mode)
    assert other.chosen[:9].all() and not other.chosen[9]


def test_thresholds_decay_over_what_an_answer_could_have_had(tiny):
    """An answer that ended before its limit is judged as it was decoded."""
    mixed = mixed_policy(*tiny, PROMPT, LOSSY)
    policy = policies.make(mixed.thresholds, decay=8.0)
    (answer,) = generate(*tiny, [PROMPT], policy=policy, max_new_tokens=24)
    texts, exits = [(PROMPT, answer.tokens[:9])], answer.exits[:9].tolist()
    (found,) = score(*tiny, texts, policy=policy, limits=[24])
    (as_if_whole,) = score(*tiny, texts, policy=policy)
    assert found.exits.tolist() == exits != as_if_whole.exits.tolist()


@pytest.mark.parametrize("policy", [None, policies.forced(2, 0)], ids=["no policy", "verified"])
def test_without_a_policy_or_verified_it_is_the_full_model(tiny, policy):
    mode = LOSSY if policy is None else verified("exits")
    _, _, logits, _ = SlowDecoder(*tiny).states(TEXT)
    log_probs = logits - np.logaddexp.reduce(logits, axis=-1, keepdims=True)
    (found,) = score(
        *tiny, [(TEXT[:9], TEXT[9:])], policy=policy, mode=mode, first_leaves=policy is not None
    )
    expected = [log_probs[i - 1, TEXT[i]] for i in range(9, 40)]
    np.testing.assert_allclose(found.log_probs, expected, atol=CLOSE)
    assert (found.chosen == (logits.argmax(-1)[8:-1] == TEXT[9:])).all()
    assert (found.exits == 2).all()


@pytest.mark.parametrize("classes", [0, 12])
@pytest.mark.parametrize("exit_index", [0, 1])
def test_every_token_has_a_probability_at_an_exit_and_they_make_one(exit_index, classes):
    model, params = build(FOUR_BLOCKS, points=(1, 3), head="mlp", classes=classes)
    forced = policies.forced(2, exit_index)
    texts = [(PROMPT, [token]) for token in range(61)]
    how = {"policy": forced, "mode": None}
    found = score(model, params, texts, first_leaves=True, batch=61, **how)
    log_probs = np.concatenate([x.log_probs for x in found])
    assert np.exp(log_probs.astype(np.float64)).sum() == pytest.approx(1, abs=1e-5)
    assert sum(bool(x.chosen[0]) for x in found) == 1 and found[0].exits.tolist() == [exit_index]
    logits = SlowDecoder(model, params).states(PROMPT)[1][exit_index][-1].astype(np.float64)
    own = logits - np.logaddexp.reduce(logits)
    known = range(61) if not classes else np.asarray(params["token_ids"])
    for row, token in enumerate(known):
        assert log_probs[token] == pytest.approx(own[row], abs=CLOSE)
    (all_of_it,) = score(model, params, [(TEXT[:1], TEXT[1:])], first_leaves=True, **how)
    assert (all_of_it.exits == exit_index).all()  # nothing waits for anything
    # As in decoding, unless asked otherwise, the prompt's pass goes all the way.
    (first,) = score(model, params, texts[:1], **how)
    assert first.exits.tolist() == [2]


def test_what_a_text_gets_does_not_depend_on_those_beside_it(tiny):
    policy = mixed_policy(*tiny, PROMPT, LOSSY)
    texts = [(TEXT[:n], TEXT[n : n + m]) for n, m in [(1, 39), (30, 2), (7, 9), (3, 1), (12, 20)]]
    together = score(*tiny, texts, policy=policy, batch=3)
    alone = [score(*tiny, [text], policy=policy)[0] for text in texts]
    for one, other, (_, scored) in zip(together, alone, texts, strict=True):
        assert len(one.log_probs) == len(scored)
        assert one.exits.tolist() == other.exits.tolist()
        np.testing.assert_allclose(one.log_probs, other.log_probs, atol=CLOSE)


def test_the_last_token_stands_behind_a_full_context(tiny):
    model, params = tiny
    full = np.random.default_rng(1).integers(0, 61, 513).tolist()
    (found,) = score(model, params, [(full[:510], full[510:])])
    assert found.log_probs.shape == (3,)
    with pytest.raises(ValueError, match="text 0 has 514 tokens, but after a context of 512 only"):
        score(model, params, [(full[:510], [*full[510:], 1])])


@pytest.mark.parametrize(("length", "context"), [(1, 4), (4, 4), (5, 4), (12, 4), (13, 4), (9, 1)])
def test_rolling_scores_each_token_once_after_as_many_as_fit(length, context):
    text = list(range(100, 100 + length))
    pairs = list(rolling(text, 7, context))
    assert [token for _, scored in pairs for token in scored] == text
    assert all(given and len(given) + len(scored) <= context + 1 for given, scored in pairs)
    for given, scored in pairs:
        at = text.index(scored[0])
        before = [7, *text[:at]]
        assert before[-len(given) :] == given
        assert len(given) + len(scored) == min(context, at + len(scored)) + 1


@pytest.mark.parametrize(
    ("texts", "policy", "said"),
    [
        ([], None, "there is no text"),
        ([([], [1])], None, "text 0 has no given tokens"),
        ([([1], [2]), ([1], [])], None, "text 1 has no scored tokens"),
        ([([1], [61])], None, "text 0, scored go from 61 to 61, but the model knows 0 to 60"),
        ([([1], [2])], policies.never(3), "3 thresholds but the model has 2 exits"),
        ([([1], [2])], policies.make([0.5, 0.5], budget=4.0), "a budget hangs on what the answer"),
        ([([1], [2])], policies.make([0.5, 0.5], "gate"), "scores by gate, which the exits"),
    ],
)
def test_what_cannot_be_scored_is_refused(tiny, texts, policy, said):
    with pytest.raises(ValueError, match=said):
        score(*tiny, texts, policy=policy)
