"""Clients that others wrote work against the server unchanged."""

import pytest
from serving.conftest import NAME, sessions
from serving.test_page import listening

import early_exit as ee
from early_exit.serving import app
from early_exit.serving.answers import Limits
from early_exit.serving.worker import Worker


@pytest.fixture(scope="module")
def address(model):
    options = app.Options(NAME, key="secret", limits=Limits(new_tokens=12))
    with listening(app.create(model, Worker(sessions(model)), options)) as found:
        yield f"{found}/v1"


def test_openai_s(address, model):
    openai = pytest.importorskip("openai")
    client = openai.OpenAI(base_url=address, api_key="secret", max_retries=0)
    turns = [{"role": "user", "content": "Why?"}]
    how = {"model": NAME, "messages": turns, "temperature": 0, "max_tokens": 9}
    expected = ee.generate(model, "Why?", max_new_tokens=9, mode="verified").text
    assert [m.id for m in client.models.list()] == [NAME]
    assert client.chat.completions.create(**how).choices[0].message.content == expected
    extras = {"depths": True, "mode": "lossy"}
    chunks = list(client.chat.completions.create(**how, stream=True, extra_body=extras))
    assert chunks[0].choices[0].delta.role == "assistant"
    assert sum(len(c.choices[0].early_exit["tokens"]) for c in chunks[1:]) <= 9
    assert chunks[-1].choices[0].finish_reason in ("stop", "length")
    told = client.completions.create(
        model=NAME, prompt=["a", "b"], n=2, temperature=1.0, seed=1, max_tokens=4, logprobs=0
    )
    assert len(told.choices) == 4
    assert all(len(choice.logprobs.token_logprobs) <= 4 for choice in told.choices)
    with pytest.raises(openai.NotFoundError, match="there is no model 'other'"):
        client.chat.completions.create(**how | {"model": "other"})
    with pytest.raises(openai.BadRequestError, match="max_tokens: Input should be greater"):
        client.chat.completions.create(**how | {"max_tokens": -1})
    stranger = openai.OpenAI(base_url=address, api_key="wrong", max_retries=0)
    with pytest.raises(openai.AuthenticationError):
        stranger.models.list()


@pytest.mark.lm_eval
def test_lm_evaluation_harness_s(address, model, monkeypatch):
    """Its own client of completions scores as our model of it does, and writes the same answers."""
    completions = pytest.importorskip("lm_eval.models.openai_completions")
    from lm_eval.api.instance import Instance

    monkeypatch.setenv("OPENAI_API_KEY", "secret")
    client = completions.LocalCompletionsAPI(
        base_url=f"{address}/completions",
        model=NAME,
        tokenizer=model.backbone.source,
        tokenizer_backend="huggingface",
        max_length=256,
    )
    pairs = [("One two", " three"), ("The text", " says: 3 4 5")]
    requests = [Instance("loglikelihood", {}, pair, i) for i, pair in enumerate(pairs)]
    found = client.loglikelihood(requests, disable_tqdm=True)
    for (context, continuation), (log_likelihood, _) in zip(pairs, found, strict=True):
        ids = model.tokenizer.encode(context + continuation)
        given = len(model.tokenizer.encode(context))
        (scored,) = ee.score(model, [ids])
        expected = scored.log_probs[-1][given - 1 :].sum()
        assert log_likelihood == pytest.approx(expected, abs=1e-3)
    asked = Instance("generate_until", {}, ("One two", {"until": ["\n\n"], "max_gen_toks": 8}), 0)
    (text,) = client.generate_until([asked], disable_tqdm=True)
    ids = model.tokenizer.encode("One two")
    expected = ee.generate(model, [ids], max_new_tokens=8, mode="verified")[0].text
    assert text == expected.split("\n\n")[0]
