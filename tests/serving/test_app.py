"""What clients are told: answers as the library gives them, and sentences for what is wrong."""

import concurrent.futures
import json
import threading
import time

import numpy as np
import pytest
from serving.conftest import NAME

import early_exit as ee
from early_exit.serving.answers import Limits

CHAT, COMPLETE = "/v1/chat/completions", "/v1/completions"
USER = [{"role": "user", "content": "Why?"}]


def asked(client, path, status=200, **fields):
    given = {"messages": USER} if path == CHAT else {}
    response = client.post(path, json={"model": NAME, "temperature": 0, **given, **fields})
    assert response.status_code == status, response.text
    return response.json()


def streamed(client, path, **fields):
    """The chunks of a streamed answer, the end mark left out."""
    given = {"messages": USER} if path == CHAT else {}
    body = {"model": NAME, "temperature": 0, "stream": True, **given, **fields}
    with client.stream("POST", path, json=body) as response:
        assert response.status_code == 200
        assert response.headers["content-type"].startswith("text/event-stream")
        lines = [line for line in response.iter_lines() if line]
    assert all(line.startswith("data: ") for line in lines) and lines[-1] == "data: [DONE]"
    return [json.loads(line[len("data: ") :]) for line in lines[:-1]]


def test_an_answer_is_the_library_s(client, model):
    expected = ee.generate(model, "Why?", max_new_tokens=12, mode="verified")
    found = asked(client, CHAT)
    (choice,) = found["choices"]
    assert choice["message"] == {"role": "assistant", "content": expected.text, "refusal": None}
    ended = "stop" if expected.tokens[-1] in model.stop_ids else "length"
    assert choice["finish_reason"] == ended and found["object"] == "chat.completion"
    usage = found["usage"]
    assert usage["completion_tokens"] == len(expected.tokens)
    assert usage["total_tokens"] == usage["prompt_tokens"] + usage["completion_tokens"]


@pytest.mark.parametrize("path", [CHAT, COMPLETE])
@pytest.mark.parametrize("fields", [{}, {"temperature": 1.5, "seed": 7, "n": 2}, {"mode": "lossy"}])
def test_streams_and_whole_answers_say_the_same(client, path, fields):
    given = {"prompt": "One two"} if path == COMPLETE else {}
    given |= {"max_tokens": 10, **fields}
    whole = asked(client, path, **given, depths=True)
    chunks = streamed(client, path, **given, depths=True, stream_options={"include_usage": True})
    assert chunks[-1]["choices"] == [] and chunks[-1]["usage"] == whole["usage"]
    for choice in whole["choices"]:
        mine = [c for chunk in chunks for c in chunk["choices"] if c["index"] == choice["index"]]
        text = "".join(c.get("text") or c.get("delta", {}).get("content", "") for c in mine)
        assert text == (choice["text"] if path == COMPLETE else choice["message"]["content"])
        assert [c["finish_reason"] for c in mine][-1] == choice["finish_reason"]
        assert all(c["finish_reason"] is None for c in mine[:-1])
        tokens = [t for c in mine for t in c.get("early_exit", {"tokens": []})["tokens"]]
        assert tokens == choice["early_exit"]["tokens"]


def test_choices_are_drawn_apart_and_again_alike(client):
    how = {"prompt": "a", "temperature": 1.8, "max_tokens": 10, "n": 3}
    one, same, other = (asked(client, COMPLETE, seed=seed, **how) for seed in (5, 5, 6))
    texts = [[choice["text"] for choice in found["choices"]] for found in (one, same, other)]
    assert texts[0] == texts[1] != texts[2] and len(set(texts[0])) == 3


def test_the_policy_decides_where_tokens_leave(client):
    """By the run's policy, by thresholds of the request, or not at all."""

    def depths(**fields):
        found = asked(client, CHAT, mode="lossy", max_tokens=12, depths=True, **fields)
        return [token["depth"] for token in found["choices"][0]["early_exit"]["tokens"]]

    assert set(depths(full=True)) == {6}
    assert set(depths(thresholds=[-1, -1])[1:]) == {2}
    assert set(depths(thresholds=[1e9, -1])[1:]) == {4}
    assert set(depths()[1:]) <= {2, 4, 6} and depths() != depths(full=True)


def test_stop_strings_end_an_answer_and_are_left_out(client):
    whole = asked(client, CHAT, max_tokens=12)["choices"][0]["message"]["content"]
    stop = whole[len(whole) // 2 :][:2]
    cut = asked(client, CHAT, max_tokens=12, stop=[stop, "never said"])["choices"][0]
    assert cut["message"]["content"] == whole[: whole.index(stop)]
    assert cut["finish_reason"] == "stop"


def test_log_probabilities_are_those_of_the_answer_and_of_the_prompt(client, model):
    ids = model.tokenizer.encode("One two three")
    found = asked(client, COMPLETE, prompt=ids, max_tokens=4, logprobs=1, echo=True)["choices"][0]
    told = found["logprobs"]
    assert len(told["tokens"]) == len(ids) + 4 and told["token_logprobs"][0] is None
    assert "".join(told["tokens"]) == found["text"]
    given = np.array(told["token_logprobs"][1 : len(ids)])
    np.testing.assert_allclose(given, ee.score(model, [ids])[0].log_probs[-1], atol=1e-4)
    whole = ee.generate(model, [ids], max_new_tokens=4, mode="verified")[0]
    np.testing.assert_allclose(told["token_logprobs"][len(ids) :], whole.log_probs, atol=1e-4)
    for best, own in zip(told["top_logprobs"][1:], told["token_logprobs"][1:], strict=True):
        assert max(best.values()) >= own - 1e-6
    alone = asked(client, COMPLETE, prompt=ids, max_tokens=0, logprobs=0, echo=True)["choices"][0]
    assert alone["logprobs"]["token_logprobs"][1:] == pytest.approx(given)
    chat = asked(client, CHAT, max_tokens=3, logprobs=True)["choices"][0]["logprobs"]["content"]
    assert len(chat) == 3 and all(row["logprob"] <= 0 for row in chat)


def test_several_prompts_are_answered_in_their_order(client):
    prompts = ["One", "Two three", [5, 6, 7]]
    together = asked(client, COMPLETE, prompt=prompts, max_tokens=5)["choices"]
    alone = [asked(client, COMPLETE, prompt=p, max_tokens=5)["choices"][0]["text"] for p in prompts]
    assert [choice["text"] for choice in together] == alone
    assert [choice["index"] for choice in together] == [0, 1, 2]


def test_many_clients_at_once_each_get_their_own(client):
    """More than there are rows, some of whom leave in the midst of their answer."""
    prompts = [f"{n} is a number" for n in range(12)]
    how = {"max_tokens": 8, "temperature": 0}
    expected = {p: asked(client, COMPLETE, prompt=p, **how)["choices"][0]["text"] for p in prompts}

    def one(n):
        if n % 3 == 2:
            body = {"model": NAME, "prompt": prompts[n], "stream": True, "max_tokens": 400}
            with client.stream("POST", COMPLETE, json=body | {"temperature": 0}) as response:
                next(response.iter_lines())
            return None
        return asked(client, COMPLETE, prompt=prompts[n], **how)["choices"][0]["text"]

    with concurrent.futures.ThreadPoolExecutor(12) as pool:
        found = list(pool.map(one, range(12)))
    for n, text in enumerate(found):
        assert text == (None if n % 3 == 2 else expected[prompts[n]])
    for _ in range(200):  # who left is forgotten
        if "early_exit_requests_running 0.0" in client.get("/metrics").text:
            break
        time.sleep(0.05)
    else:
        pytest.fail("answers go on that nobody listens to")


BAD = [
    ({"model": "gpt-4"}, 404, "there is no model 'gpt-4'; there is 'tiny'"),
    ({"messages": []}, 400, "messages: List should have at least 1 item"),
    ({"messages": [{"role": "robot", "content": "x"}]}, 400, "messages.0.role: Input should be"),
    ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, 400, "messages.0"),
    ({"max_tokens": -3}, 400, "max_tokens: Input should be greater than or equal to 1"),
    ({"max_tokens": 10**9}, 400, "positions but the model's context is"),
    ({"max_tokens": "7"}, 400, "max_tokens: Input should be a valid integer"),
    ({"temperature": -1}, 400, "temperature: Input should be greater than or equal to 0"),
    ({"temperature": float("nan")}, 400, "temperature"),
    ({"top_p": 0}, 400, "top_p: Input should be greater than 0"),
    ({"n": 0}, 400, "n: Input should be greater than or equal to 1"),
    ({"stop": ["a"] * 5}, 400, "stop"),
    ({"stop": ""}, 400, "stop"),
    ({"mode": "quick"}, 400, "mode 'quick' is not served; choose one of verified, lossy"),
    ({"thresholds": [0.5]}, 400, "the policy has 1 thresholds but the model has 2 exits"),
    ({"presence_penalty": 0.5}, 400, "presence_penalty: Input should be less than or equal to 0"),
    ({"tools": [{"type": "function"}]}, 400, "tools"),
    ({"temprature": 1}, 400, "temprature: no such field here"),
    ({"seed": -1}, 400, "seed: Input should be greater than or equal to 0"),
]


@pytest.mark.parametrize(("fields", "status", "message"), BAD, ids=lambda x: str(x)[:40])
def test_what_is_wrong_is_named(client, fields, status, message):
    body = json.dumps({"model": NAME, "messages": USER, **fields})
    response = client.post(CHAT, content=body, headers={"Content-Type": "application/json"})
    assert response.status_code == status
    error = response.json()["error"]
    assert message in error["message"] and error["type"] == "invalid_request_error"
    assert set(error) == {"message", "type", "param", "code"}


@pytest.mark.parametrize(
    ("content", "kind", "status", "message"),
    [
        ("{", "application/json", 400, "Invalid JSON"),
        ("[]", "application/json", 400, "should be an object"),
        (b"\xff\xfe", "application/json", 400, "Invalid JSON"),
        ("{}", "text/plain", 415, "send JSON"),
        ('{"model": "' + "x" * 70000 + '"}', "application/json", 413, "more than 65536 bytes"),
    ],
    ids=["cut", "list", "bytes", "text", "large"],
)
def test_bodies_that_are_none(client, content, kind, status, message):
    response = client.post(CHAT, content=content, headers={"Content-Type": kind})
    assert response.status_code == status and message in response.json()["error"]["message"]


def test_other_addresses_and_methods(client):
    assert (
        client.get("/v1/nothing").json()["error"]["message"] == "there is nothing at this address"
    )
    assert client.get(CHAT).status_code == 405 and "error" in client.get(CHAT).json()
    assert client.get("/v1/models").json()["data"][0]["id"] == NAME
    assert client.get(f"/v1/models/{NAME}").json()["early_exit"]["exits"] == [2, 4]
    assert client.get("/v1/models/other").status_code == 404
    assert client.get("/health").json() == {"status": "ok"}


def test_a_completion_of_fields_that_exclude_each_other(client):
    for fields, message in [
        ({"logprobs": 1, "temperature": 1}, "logprobs=1 needs temperature=0"),
        ({"echo": True, "stream": True}, "echo does not go with stream"),
        ({"max_tokens": 0}, "max_tokens must be at least 1"),
        ({"best_of": 3}, "best_of must be n"),
        ({"prompt": [70000]}, "but the model knows 0 to"),
        ({"prompt": []}, "prompt"),
        ({"prompt": ["x"] * 129}, "prompts times n must be at most 128"),
    ]:
        error = asked(client, COMPLETE, 400, **{"prompt": "x", **fields})["error"]
        assert message in error["message"], fields


def test_only_who_has_the_key_is_answered(serve):
    with serve(key="secret") as client:
        for headers in ({}, {"Authorization": "Bearer wrong"}, {"Authorization": "secret"}):
            response = client.get("/v1/models", headers=headers)
            assert response.status_code == 401
            assert response.json()["error"]["code"] == "invalid_api_key"
        right = {"Authorization": "Bearer secret"}
        assert client.get("/v1/models", headers=right).status_code == 200
        assert client.get("/health").status_code == client.get("/").status_code == 200


def test_where_too_many_wait_the_next_is_told_to_come_back(serve):
    with serve(most_waiting=1) as client:
        statuses, lock = [], threading.Lock()

        def one(n):
            body = {"model": NAME, "prompt": f"{n}", "max_tokens": 60, "temperature": 0}
            response = client.post(COMPLETE, json=body)
            with lock:
                statuses.append(response.status_code)
            if response.status_code == 429:
                assert response.json()["error"]["type"] == "rate_limit_error"

        with concurrent.futures.ThreadPoolExecutor(24) as pool:
            list(pool.map(one, range(24)))
        assert 429 in statuses and 200 in statuses and set(statuses) <= {200, 429}
        assert asked(client, COMPLETE, prompt="x", max_tokens=2)  # and it goes on


def test_an_answer_ends_where_its_time_is_over(serve):
    with serve(limits=Limits(seconds=0.05)) as client:
        found = asked(client, COMPLETE, prompt="x", max_tokens=450)
        assert found["choices"][0]["finish_reason"] == "length"
        assert found["usage"]["completion_tokens"] < 450


def test_what_fails_is_told_without_its_cause(serve, monkeypatch):
    from early_exit.decoding.session import Session

    with serve() as client:
        monkeypatch.setattr(Session, "step", lambda *a, **k: 1 / 0)
        error = asked(client, CHAT, 503)["error"]
        assert error == {
            "message": "the server has stopped decoding",
            "type": "server_error",
            "param": None,
            "code": None,
        }
        assert client.get("/health").status_code == 503
        assert asked(client, CHAT, 503)["error"]["type"] == "server_error"


def test_a_monitor_reads_what_was_done(client):
    before = client.get("/metrics").text
    asked(client, CHAT, max_tokens=5)
    after = client.get("/metrics").text

    def value(text, name):
        lines = [line for line in text.splitlines() if line.startswith(name)]
        return float(lines[0].split()[-1]) if lines else 0.0

    name = 'early_exit_generated_tokens_total{mode="verified"}'
    assert 1 <= value(after, name) - value(before, name) <= 5
    assert "early_exit_time_to_first_token_seconds_bucket" in after
    assert value(after, "early_exit_requests_waiting") == 0
