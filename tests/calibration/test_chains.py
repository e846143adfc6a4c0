"""Chains of drafts: what stands, and how far they may go unchecked."""

import dataclasses

import jax
import numpy as np
import pytest

from early_exit import policy as policies
from early_exit.calibration import chains
from early_exit.calibration.chains import Chains
from early_exit.settings.sections import CalibrateSettings
from early_exit.storage import files

STEPS = 4


def made(documents=60, per_document=50, seed=0, harder=0.1):
    """Chains whose drafts agree as often as their score says, later ones less."""
    rng = np.random.default_rng(seed)
    count = documents * per_document
    scores = rng.uniform(0, 1, (STEPS, count)).astype(np.float32)
    scores[:, rng.uniform(size=count) < 0.05] = -np.inf  # the head declines
    likely = np.clip(scores, 0, 1) * (1 - harder * np.arange(STEPS))[:, None]
    agrees = rng.uniform(size=(STEPS, count)) < likely
    return Chains(
        scores={"max_prob": scores, "margin": scores**2, "entropy": scores},
        agrees=agrees,
        losses=np.zeros((STEPS, count), np.float32),
        groups=np.repeat(np.arange(documents), per_document),
    )


def test_they_come_back_from_their_file(tmp_path):
    found = dataclasses.replace(made(documents=3), metadata={"step": 7})
    found.save(tmp_path / "chains.npz")
    again = Chains.load(tmp_path / "chains.npz")
    jax.tree.map(np.testing.assert_array_equal, vars(again), vars(found))


def test_files_that_hold_none(tmp_path):
    path, found = tmp_path / "chains.npz", made(documents=3)
    with pytest.raises(FileNotFoundError, match="chains.npz; write them with `launch.calibrate`"):
        Chains.load(path)
    found.save(path)
    path.write_bytes(path.read_bytes()[:-30])
    with pytest.raises(ValueError, match="chains.npz holds no records.*delete it"):
        Chains.load(path)
    arrays = {"score_max_prob": found.scores["max_prob"], "agrees": found.agrees[:, 1:]}
    files.write_records(path, arrays | {"losses": found.losses, "groups": found.groups}, {})
    with pytest.raises(ValueError, match="chains.npz holds no records.*arrays of the shapes"):
        Chains.load(path)


def settings(**given):
    return CalibrateSettings(**{"method": "epsilon"} | given)


def unchecked(found, policy):
    """(share that agree, drafts for each chain) where chains end as the policy says."""
    scores, right, drafts = found.scores[policy.confidence], 0, 0
    for i in range(found.groups.size):
        for step in range(STEPS):
            if not policy.leaves(step, scores[step, i]):
                break
            drafts += 1
            right += found.agrees[step, i]
    return right / max(drafts, 1), drafts / found.groups.size


def test_drafts_that_stand_unchecked_agree_as_often_as_is_asked():
    found = made(documents=20)
    before = np.inf
    for epsilon in (0.7, 0.8, 0.9, 0.99):
        policy, stated = chains.fit(found, settings(epsilon=epsilon))
        agreement, drafts = unchecked(found, policy)
        assert agreement >= epsilon
        assert stated["agreement"] == pytest.approx(agreement)
        assert stated["tokens"] == pytest.approx(1 + drafts)
        assert drafts <= before  # the more is asked, the less is drafted
        before = drafts
    assert drafts < 0.3


def test_what_is_not_reached_drafts_nothing():
    found = made(documents=5)
    never = dataclasses.replace(found, agrees=np.zeros_like(found.agrees))
    policy, stated = chains.fit(never, settings(epsilon=0.9))
    assert np.isinf(policy.thresholds_K).all() and stated["agreement"] is None
    assert stated["tokens"] == 1


def test_how_likely_a_draft_stands_follows_its_score_and_its_step():
    found = made(documents=400)
    policy, _ = chains.fit(found, settings())
    scores = (np.arange(chains.PARTS) + 0.5) / chains.PARTS
    for step in range(STEPS):
        told = np.array([policy.stands(step, score) for score in scores])
        assert (np.diff(told) >= 0).all()
        np.testing.assert_allclose(told, scores * (1 - 0.1 * step), atol=0.06)
    # Later steps are taken for the last that was seen; scores outside for the nearest.
    assert policy.stands(9, 0.5) == policy.stands(STEPS - 1, 0.5)
    assert policy.stands(0, 1.0) == policy.stands_KN[0, -1]
    assert policy.stands(0, -np.inf) == policy.stands_KN[0, 0]


def test_stands_is_of_chains_that_stood_before():
    """A step that is right only where the one before was wrong never stands."""
    found = made(documents=100)
    agrees = found.agrees.copy()
    agrees[1] = ~agrees[0]
    policy, _ = chains.fit(dataclasses.replace(found, agrees=agrees), settings())
    assert np.asarray(policy.stands_KN[1]).max() < 0.05


@pytest.mark.parametrize("method", ["ltt", "ucb", "clopper_pearson"])
def test_a_promise_is_kept_on_new_documents(method):
    """Over many calibrations, more wrong than asked in few; and something is drafted."""
    alpha, failed, drafted = 0.25, 0, 0
    asked = settings(method=method, alpha=alpha, delta=0.1)
    rounds = 40
    for seed in range(rounds):
        policy, _ = chains.fit(made(documents=300, per_document=20, seed=seed), asked)
        new = made(documents=300, per_document=20, seed=1000 + seed)
        kept = chains._made(new.scores["max_prob"], np.asarray(policy.thresholds_K))
        if kept.any():
            drafted += 1
            failed += (~new.agrees[kept]).mean() > alpha
    assert failed <= 0.2 * rounds and drafted > rounds / 2


def test_it_is_kept_in_the_policy_s_file(tmp_path):
    drafts, _ = chains.fit(made(documents=5), settings(epsilon=0.8, confidence="margin"))
    policy = policies.make([0.5], drafts=drafts)
    policies.save(policy, tmp_path / "policy.json")
    loaded = policies.load(tmp_path / "policy.json", exit_depths=np.array([2, 4])).drafts
    assert loaded.confidence == "margin"
    np.testing.assert_array_equal(loaded.thresholds_K, drafts.thresholds_K)
    np.testing.assert_allclose(loaded.stands_KN, drafts.stands_KN)
