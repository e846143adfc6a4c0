"""Tests of policies on answers: what they cost, and that promises are broken as rarely as said."""

import itertools

import numpy as np
import pytest
import synthetic
from hypothesis import given
from hypothesis import strategies as st

from early_exit import policy as policies
from early_exit.calibration import answers, bounds, certify, promise
from early_exit.settings.sections import CalibrateSettings

TEXTS = st.lists(st.integers(0, 4), min_size=1, max_size=9)


def longest_common(a, b):
    """By trying all that is in the shorter one."""
    for size in range(min(len(a), len(b)), 0, -1):
        for chosen in itertools.combinations(a, size):
            rest = iter(b)
            if all(token in rest for token in chosen):
                return size
    return 0


@given(TEXTS, TEXTS)
def test_losses_are_what_they_say(reference, answer):
    assert answers.changed(reference, answer) == (reference != answer)
    padded = itertools.zip_longest(reference, answer, fillvalue=-1)
    pairs = list(padded)
    assert answers.tokens(reference, answer) == pytest.approx(np.mean([a != b for a, b in pairs]))
    common = longest_common(reference, answer)
    f_measure = 2 * common / (len(reference) + len(answer))
    assert answers.rouge_l(reference, answer) == pytest.approx(1 - f_measure)
    for loss in answers.LOSSES.values():
        assert answers.loss_of(loss, reference, reference) == 0
        assert 0 <= answers.loss_of(loss, reference, answer) <= 1


@pytest.mark.parametrize("found", [1.5, -0.25, float("nan")])
def test_a_loss_outside_its_range_is_refused(found):
    def half_right(reference, answer):
        return found

    with pytest.raises(ValueError, match="'half_right' of an answer must lie in \\[0, 1\\]"):
        answers.loss_of(half_right, [1], [2])


def in_portions(losses, size=5):
    """Of each policy its losses, and how many of these were looked at."""
    taken = [0] * len(losses)

    def of_policy(j):
        for start in range(0, len(losses[j]), size):
            part = losses[j][start : start + size]
            taken[j] += len(part)
            yield part

    return (of_policy(j) for j in range(len(losses))), taken


def run(losses, method="ucb", alpha=0.2, delta=0.1):
    portions, taken = in_portions(losses)
    total = len(losses[0])
    return answers.in_order(portions, total=total, method=method, alpha=alpha, delta=delta), taken


def test_nothing_is_answered_behind_the_first_that_fails():
    losses = [np.zeros(60), np.zeros(60), np.full(60, 0.9), np.zeros(60)]
    tests, taken = run(losses)
    assert [test.passed for test in tests] == [True, True, False] and taken[3] == 0


def test_a_test_ends_as_soon_as_its_end_is_known():
    safe, hopeless = np.full(200, 0.01), np.ones(200)
    (passed,), (seen,) = run([safe])
    assert passed.passed and seen < 50 and len(passed.losses) == seen
    (failed,), (seen,) = run([hopeless])
    assert not failed.passed and seen < 100
    # Others have to see all answers to pass, but fail as soon.
    (passed,), (seen,) = run([safe], "ltt")
    assert passed.passed and seen == 200
    (failed,), (seen,) = run([hopeless], "clopper_pearson")
    assert not failed.passed and seen < 100


@pytest.mark.parametrize("method", ["ltt", "clopper_pearson"])
def test_what_is_given_up_would_have_failed(method):
    rng = np.random.default_rng(0)
    for rate in np.linspace(0.02, 0.5, 30):
        losses = (rng.random(50) < rate).astype(float)
        (test,), _ = run([losses], method)
        whole = certify.METHODS[method](losses, 0.2, 0.1)
        assert test.passed == (whole <= 0.1)


@pytest.mark.parametrize("method", sorted(certify.METHODS))
@pytest.mark.parametrize("mean", [0.21, 0.3])
def test_a_mean_above_alpha_passes_as_rarely_as_said(method, mean):
    """Looked at after every portion; in 2000 draws, three standard deviations of 10 % are 2 %."""
    rng = np.random.default_rng(1)
    passed = 0
    for _ in range(2000):
        shares = (rng.random(60) < mean).astype(float)
        if method != "clopper_pearson":
            shares = np.where(rng.random(60) < 0.5, shares, mean)
        passed += run([shares], method)[0][0].passed
    assert passed / 2000 <= 0.12


def test_the_bound_is_the_least_alpha_that_would_have_passed():
    losses = np.random.default_rng(2).uniform(0, 0.2, 80)
    for method in ("ucb", "ltt"):
        found = answers.bound(method, losses, 0.1, 80)
        for alpha, passes in ((found + 1e-6, True), (found - 1e-3, False)):
            (test,), _ = run([losses], method, alpha=alpha)
            assert test.passed == passes
    # With the bets stopped early, of what was seen.
    (test,), _ = run([losses], "ucb", alpha=0.3)
    assert answers.bound("ucb", test.losses, 0.1, 80) <= 0.3


def test_winnings_end_where_the_bets_do():
    losses = np.random.default_rng(3).uniform(0, 0.3, 40)
    mixed = losses[np.random.default_rng(0).permutation(40)]
    won = bounds.winnings(mixed, 0.25, 0.1, 40)
    assert bounds.betting(losses, 0.25, 0.1) == pytest.approx(np.exp(-max(0, won.max())))
    half = bounds.winnings(mixed[:20], 0.25, 0.1, 40)
    np.testing.assert_allclose(half, won[:20])  # what comes later changes nothing


def test_candidates_leave_more_and_more():
    records = synthetic.records(4000)
    rows = answers.candidates(records, "max_prob", 12)
    assert 4 <= len(rows) <= 12 and (np.diff(rows, axis=0) <= 0).all()
    scores = records.score("max_prob")[:-1]
    leaving = [np.mean(policies.first_exit(scores, row) < 3) for row in rows]
    assert leaving[0] < 0.05 and leaving[-1] == max(leaving) and (np.diff(leaving) > 0).all()


@pytest.mark.parametrize(("prompts", "least"), [(38, "0.059"), (300, "0.008")])
def test_so_many_prompts_can_promise_no_less(prompts, least):
    settings = CalibrateSettings(method="ltt", alpha=0.05)
    found = promise.of_answers(prompts, settings)
    assert str(found).startswith(f"{prompts} independent prompts to test on: alpha ≥ {least}")
    if prompts == 38:
        with pytest.raises(ValueError, match="alpha=0.05 cannot be promised.*on more prompts"):
            promise.check([found], settings)
    else:
        promise.check([found], settings)


@pytest.mark.parametrize(
    ("mode", "new_tokens", "said"),
    [
        ("deferred", 64, None),
        ("deferred", 12, None),
        ("verified: exits", 500, None),
        ("lossy", 64, "in deferred mode; it says nothing of lossy mode with up to 64"),
        ("deferred", 65, "at most 64 tokens in deferred mode; it says nothing of deferred"),
    ],
)
def test_a_policy_elsewhere_is_told(mode, new_tokens, said):
    provenance = {"promise": promise.about_answers("deferred", 64)}
    found = promise.elsewhere(provenance, mode, new_tokens)
    assert (found is None) if said is None else (said in found)


@pytest.mark.parametrize("stated", [None, {"subject": "positions", "mode": "teacher forcing"}])
def test_promises_about_given_text_have_no_mode_to_be_used_in(stated):
    assert promise.elsewhere({"promise": stated}, "lossy", 64) is None
    assert promise.elsewhere({}, "lossy", 64) is None
