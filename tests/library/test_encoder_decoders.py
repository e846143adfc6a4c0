"""Networks whose encoder reads the prompt, in the hands of a program: prompts in, answers out."""

import dataclasses
import json

import numpy as np
import pytest
import stand_ins

import early_exit as ee


@pytest.fixture(scope="module")
def rows_and_model(tmp_path_factory):
    """(prompts with answers, a small network with exits)."""
    config = stand_ins.answering(tmp_path_factory.mktemp("library") / "root", 80)
    with open(config.data.source) as file:
        rows = [json.loads(line) for line in file]
    return rows, ee.attach(ee.load(config.model.source), (1, 2))


def without_policy(model):
    return dataclasses.replace(model, policy=None)


@pytest.fixture(scope="module")
def tuned(rows_and_model):
    rows, model = rows_and_model
    how = {"steps": 3, "batch_size": 4, "sequence_length": 12, "progress": False}
    found = ee.tune(model, rows, validation=rows[:8], **how)
    records = ee.record(found, rows, batch_size=4, sequence_length=12)
    assert len(np.unique(records.groups)) == len(rows)
    return ee.calibrate(found, records, epsilon=0.5)


def test_prompts_are_read_as_they_stand(tuned):
    """There is no chat template; text and ids, one and several, streamed and whole."""
    text = "word4 word5 word6"
    ids = tuned.tokenizer.encode(text)
    assert tuned.tokenizer.decode(ids[-1]) == "</s>"
    whole = ee.generate(tuned, text, max_new_tokens=6)
    (given,) = ee.generate(tuned, [ids], max_new_tokens=6)
    *_, streamed = ee.stream(tuned, text, max_new_tokens=6)
    verified = ee.generate(tuned, text, max_new_tokens=6, mode="verified")
    assert whole.tokens.tolist() == given.tokens.tolist() == streamed.tokens.tolist()
    full = ee.generate(without_policy(tuned), text, max_new_tokens=6)
    assert verified.tokens.tolist() == full.tokens.tolist()


def test_answers_are_scored_beside_their_prompts(tuned):
    """What greedy decoding says is what the full model finds likeliest, and only to its prompt."""
    prompts = ["word4 word5 word6", "word9"]
    answers = [ee.generate(without_policy(tuned), text, max_new_tokens=6) for text in prompts]
    pairs = [
        (np.array(tuned.tokenizer.encode(text)), answer.tokens)
        for text, answer in zip(prompts, answers, strict=True)
    ]
    for scored, answer in zip(ee.score(tuned, pairs), answers, strict=True):
        assert scored.log_probs.shape == (3, len(answer.tokens))
        assert scored.predictions[-1].tolist() == answer.tokens.tolist()
        np.testing.assert_allclose(scored.log_probs[-1], answer.log_probs, atol=1e-4)
    (words,) = ee.score(tuned, [("word4 word5", "word5 word4")])
    assert words.tokens.tolist()[1:] == tuned.tokenizer.encode("word5 word4")
    with pytest.raises(ValueError, match="text 0 is no pair of them"):
        ee.score(tuned, ["word4"])


def test_batches_of_one_s_own_are_tuned_on(rows_and_model):
    _, model = rows_and_model
    tokens = np.array([[0, 5, 6, 1], [0, 7, 1, 0]])
    batch = {"tokens": tokens, "prompt": np.array([[6, 5, 1], [7, 1, 0]])}
    with pytest.raises(ValueError, match="a batch lacks prompt_real"):
        ee.tune(model, [batch], steps=1, progress=False)
    batch["prompt_real"] = batch["prompt"] > 0
    found = ee.tune(model, [batch], steps=1, progress=False)
    assert found.step == 1


def test_texts_alone_are_refused(rows_and_model):
    _, model = rows_and_model
    with pytest.raises(ValueError, match="tuned on prompts with answers, .* and not on texts"):
        ee.tune(model, ["word4 word5"], steps=1, progress=False)
    labelled = [{"text": "word4", "label": 0}]
    with pytest.raises(ValueError, match="and not on labelled examples"):
        ee.tune(model, labelled, steps=1, progress=False)


def test_pairs_are_not_what_a_decoder_is_tuned_on():
    model = ee.attach(ee.load("tests/fixtures/tiny_chat"), (2, 4))
    with pytest.raises(ValueError, match="tuned on texts, .* and not on prompts with answers"):
        ee.tune(model, [{"prompt": "a", "answer": "b"}], steps=1, progress=False)


def test_what_was_saved_is_loaded(tuned, tmp_path):
    folder = ee.save(tuned, tmp_path / "saved")
    again = ee.load(folder)
    how = {"max_new_tokens": 6}
    assert ee.generate(again, "word8", **how).tokens.tolist() == (
        ee.generate(tuned, "word8", **how).tokens.tolist()
    )
