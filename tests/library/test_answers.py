"""Prompts in, answers out: texts and ids, one and several, whole and in parts, every mode."""

import dataclasses

import jax
import numpy as np
import pytest

import early_exit as ee
from configs import digits_resnet
from early_exit.backbones import base
from early_exit.runs import assemble
from early_exit.settings.read import read


def test_a_text_and_its_ids_are_answered_alike(leaving):
    text = "Why is it 1 2 3?"
    ids = leaving.tokenizer.encode(text)
    raw = ee.generate(leaving, text, raw=True, max_new_tokens=10)
    given, again = ee.generate(leaving, [ids, np.array(ids)], max_new_tokens=10)
    assert raw.tokens.tolist() == given.tokens.tolist() == again.tokens.tolist()
    assert raw.text == leaving.tokenizer.decode(raw.tokens, skip_special_tokens=True)
    asked = ee.generate(leaving, text, max_new_tokens=10)
    assert asked.tokens.tolist() != raw.tokens.tolist()  # in the chat template


def test_exits_are_taken_and_a_model_without_a_policy_is_whole(leaving):
    prompts = ["Why?", "1 2 3 4", "Tell me."]
    early = ee.generate(leaving, prompts, max_new_tokens=16)
    assert min(answer.depths.min() for answer in early) < leaving.depth
    whole = dataclasses.replace(leaving, policy=None)
    found = ee.generate(whole, prompts, max_new_tokens=16)
    assert all((answer.depths == leaving.depth).all() for answer in found)
    verified = ee.generate(leaving, prompts, max_new_tokens=16, mode="verified")
    assert [a.tokens.tolist() for a in verified] == [a.tokens.tolist() for a in found]


@pytest.mark.parametrize("mode", ["lossy", "deferred", "verified", ee.Mode("defer", ("lookup",))])
@pytest.mark.parametrize("portion", [1, 3])
def test_a_stream_ends_with_the_answer(leaving, mode, portion):
    how = {"mode": mode, "max_new_tokens": 12}
    answers = list(ee.stream(leaving, "Why?", portion=portion, **how))
    whole = ee.generate(leaving, "Why?", **how)
    assert answers[-1].tokens.tolist() == whole.tokens.tolist()
    assert "".join(answer.added for answer in answers) == whole.text == answers[-1].text
    for before, after in zip(answers, answers[1:], strict=False):
        assert after.tokens[: len(before.tokens)].tolist() == before.tokens.tolist()
        assert after.text == before.text + after.added


def test_what_is_drawn_depends_on_the_sampling_and_its_seed(leaving):
    how = {"max_new_tokens": 12, "sampling": ee.Sampling(temperature=2.0)}
    one, same, other = (ee.generate(leaving, "Why?", seed=seed, **how) for seed in (3, 3, 4))
    greedy = ee.generate(leaving, "Why?", max_new_tokens=12)
    assert one.tokens.tolist() == same.tokens.tolist() != greedy.tokens.tolist()
    assert one.tokens.tolist() != other.tokens.tolist() != greedy.tokens.tolist()


def test_scores_are_what_the_exits_give_each_token(tuned):
    texts = ["The 3th text says: 3 4 5.", "1 2", [5, 6, 7, 8, 9]]
    found = ee.score(tuned, texts, batch=2)
    bound = tuned.static.bind(tuned.params)
    for text, scored in zip(texts, found, strict=True):
        ids = tuned.tokenizer.encode(text) if isinstance(text, str) else text
        assert scored.tokens.tolist() == list(ids)
        hidden, context = bound.backbone.stem({"tokens": np.array([ids])})
        states = list(bound.hidden_at_exits(hidden, context, tuned.static.exit_depths.tolist()))
        tables = (*bound.exit_tables(), bound.backbone.output_table())
        for e, state in enumerate(states):
            last = e == len(bound.heads)
            head = bound.backbone if last else bound.heads[e]
            features = head.features(state, context)
            logits = base.logits(features if last else features[0], tables[e])[0]
            wanted = jax.nn.log_softmax(logits)[np.arange(len(ids) - 1), np.array(ids[1:])]
            np.testing.assert_allclose(scored.log_probs[e], wanted, atol=1e-4)
            assert scored.predictions[e].tolist() == logits[:-1].argmax(-1).tolist()
        np.testing.assert_allclose(scored.totals, scored.log_probs.sum(1), rtol=1e-6)


def test_what_cannot_be_answered_is_told(leaving, classifier, bare):
    with pytest.raises(ValueError, match="this is a classifier; use early_exit.classify"):
        ee.generate(classifier, "Why?")
    with pytest.raises(ValueError, match="this is a classifier"):
        ee.score(classifier, "Why?")
    with pytest.raises(ValueError, match="this is a language model; use early_exit.generate"):
        ee.classify(leaving, ["Why?"])
    with pytest.raises(ValueError, match="unknown mode 'fast'; choose one of lossy"):
        ee.generate(leaving, "Why?", mode="fast")
    with pytest.raises(ValueError, match="text 0 has 1 tokens; there must be at least 2"):
        ee.score(leaving, [[5]])
    with pytest.raises(ValueError, match="text 1 has 600 tokens"):
        ee.score(leaving, [[5, 6], [5] * 600])
    with pytest.raises(ValueError, match="there are no prompts"):
        ee.generate(leaving, [])
    without = ee.Model.of(bare.static.config, bare.params["backbone"])
    with pytest.raises(ValueError, match="has no tokenizer"):
        ee.generate(without, "Why?")
    with pytest.raises(ValueError, match="nothing to draft with by exits"):
        ee.generate(without, [[1, 2]], mode=ee.Mode("defer", ("exits",)))
    (answer,) = ee.generate(without, [[1, 2]], max_new_tokens=4)
    assert answer.text == "" and len(answer.tokens) == 4


def test_images_and_arrays_are_classified_alike():
    config = assemble.abstract_model(read(digits_resnet.get_config("width=4"))).config
    model = ee.Model.of(config, base.init(config, jax.random.key(0)))
    images = np.random.default_rng(0).integers(0, 256, (5, 8, 8, 1)).astype(np.uint8)
    given = ee.classify(model, images, batch=2)
    rows = {"images": images.astype(np.float32) / 255}
    np.testing.assert_allclose(
        given.probabilities, ee.classify(model, rows).probabilities, atol=1e-5
    )
