"""Answers that are not decoded are those that decoding would give."""

import dataclasses
import types

import numpy as np
import pytest

from conftest import TINY, build
from early_exit import policy as policies
from early_exit.calibration import answers
from early_exit.decoding.generate import generate
from early_exit.decoding.mode import DEFERRED, LOSSY, verified
from early_exit.evaluation import answers as of_answers
from early_exit.evaluation import exits
from early_exit.evaluation.answers import Questions
from early_exit.settings.sections import CalibrateSettings

PROMPTS = [np.random.default_rng(i).integers(0, 61, 3 + i % 5).tolist() for i in range(14)]
NEW = 12


@pytest.fixture(scope="module")
def asked():
    """A small model, a policy that now and then says something else, and the full answers."""
    network = dataclasses.replace(TINY, depth=4)
    model, params = build(network, points=(1, 3), head="mlp")
    tuned = types.SimpleNamespace(model=model, params=params, stop_ids=[5])
    return Questions.ask(tuned, PROMPTS, NEW, 4, seed=1)


def rarely(asked, share=0.06):
    """A policy by which about this share of the full model's tokens leaves at each exit."""
    model, params = asked.tuned.model, asked.tuned.params
    texts = [[*p, *r] for p, r in zip(asked.prompts, asked.references, strict=True)]
    rows = np.zeros((len(texts), 32), np.int32)
    documents = np.zeros_like(rows)
    for row, document, text in zip(rows, documents, texts, strict=True):
        row[: len(text)], document[: len(text)] = text, 1
    positions = np.tile(np.arange(32, dtype=np.int32), (len(rows), 1))
    batch = {"tokens": rows, "documents": documents, "positions": positions}
    scores = exits.record(model, params, [batch]).score("max_prob")[:-1]
    return policies.make(np.quantile(scores, 1 - share, axis=1))


def decoded(asked, policy, mode):
    model, params = asked.tuned.model, asked.tuned.params
    found = generate(
        model,
        params,
        asked.prompts,
        policy=policy,
        mode=mode,
        max_new_tokens=NEW,
        stop_ids=[5],
    )
    return [answer.tokens for answer in found]


@pytest.mark.parametrize("mode", [LOSSY, DEFERRED], ids=lambda mode: mode.name)
@pytest.mark.parametrize("fields", [{}, {"decay": 30.0}], ids=["", "decay"])
def test_the_first_change_is_where_decoding_goes_its_own_way(asked, mode, fields):
    mode = dataclasses.replace(mode, pending=3)
    policy = policies.make(rarely(asked).thresholds, **fields)
    firsts = asked.changes(range(len(PROMPTS)), policy, mode)
    for reference, answer, first in zip(
        asked.references, decoded(asked, policy, mode), firsts, strict=True
    ):
        length = min(len(reference), len(answer))
        differ = np.flatnonzero(reference[:length] != answer[:length])
        assert first == (differ[0] if differ.size else len(reference))
    assert len(set(firsts.tolist())) > 2


@pytest.mark.parametrize("mode", [LOSSY, DEFERRED], ids=lambda mode: mode.name)
@pytest.mark.parametrize("name", answers.LOSSES)
def test_losses_are_those_of_answers_that_were_decoded(asked, mode, name):
    policy = rarely(asked)
    loss = answers.LOSSES[name]
    pairs = zip(asked.references, decoded(asked, policy, mode), strict=True)
    expected = [loss(*pair) for pair in pairs]
    rows = [3, 0, *range(7, 13)]
    found, new = asked.losses(rows, policy, mode, loss)
    np.testing.assert_allclose(found, [expected[i] for i in rows])
    changed = sum(expected[i] > 0 for i in rows)
    assert new == (0 if name == "changed" else changed) and 0 < changed < len(rows)


def test_a_policy_that_never_leaves_changes_nothing_and_needs_no_answer(asked):
    found, new = asked.losses(range(5), policies.never(2), LOSSY, answers.rouge_l)
    assert not found.any() and new == 0


def test_the_order_of_the_prompts_is_drawn_and_answers_are_the_full_models(asked):
    assert sorted(map(tuple, asked.prompts)) == sorted(map(tuple, PROMPTS))
    assert list(asked.prompts) != PROMPTS
    for reference, answer in zip(asked.references, decoded(asked, None, LOSSY), strict=True):
        assert reference.tolist() == answer.tolist()


def refused(**changes):
    settings = CalibrateSettings(method=changes.pop("method", "ucb"))
    model = types.SimpleNamespace(
        config=types.SimpleNamespace(classifies=changes.get("classifies", False)),
        exits=types.SimpleNamespace(points=changes.get("points", (2,))),
    )
    tuned = types.SimpleNamespace(model=model, workdir="runs/a")
    mode, loss = changes.get("mode", LOSSY), changes.get("loss", answers.tokens)
    with pytest.raises(ValueError) as error:
        of_answers._check(tuned, mode, settings, loss)
    return str(error.value)


def test_what_promises_nothing_about_answers_is_refused():
    assert "needs no promise" in refused(mode=verified("exits"))
    assert "epsilon promises nothing about new answers" in refused(method="epsilon")
    assert "counts answers that have changed" in refused(method="clopper_pearson")
    assert "holds a classifier" in refused(classifies=True)
    assert "this model has none" in refused(points=())
