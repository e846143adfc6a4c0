"""A thousand requests that no client should send, over real connections: the server goes on."""

import json
import random
import socket

import pytest
from serving.conftest import NAME, sessions
from serving.test_page import listening

from early_exit.serving import app
from early_exit.serving.answers import Limits
from early_exit.serving.worker import Worker

VALID = {"model": NAME, "prompt": "a b c", "max_tokens": 2, "temperature": 0}
VALUES = [None, True, -1, 0, 1e300, 10**400, "", "x", [], [None], {}, {"a": []}, "\ud800", [[0]]]
NEVER = ("Traceback", "site-packages", "/early_exit/", "Error:")  # of the machine, or of the code


@pytest.fixture(scope="module")
def address(model):
    options = app.Options(NAME, limits=Limits(new_tokens=4), most_bytes=1 << 16)
    with listening(app.create(model, Worker(sessions(model)), options)) as found:
        host, port = found.removeprefix("http://").split(":")
        yield host, int(port)


def request(body: bytes, *, path="/v1/completions", length=None, headers=(), verb="POST") -> bytes:
    told = [
        f"{verb} {path} HTTP/1.1",
        "Host: here",
        "Connection: close",
        "Content-Type: application/json",
        f"Content-Length: {len(body) if length is None else length}",
        *headers,
    ]
    return "\r\n".join(told).encode() + b"\r\n\r\n" + body


def answer(address, sent: bytes, *, seconds=30.0) -> bytes:
    """What comes back until the server closes, or until the client has waited so long."""
    found = b""
    with socket.create_connection(address, timeout=30) as connection:
        try:
            connection.sendall(sent)
            connection.settimeout(seconds)
            while part := connection.recv(1 << 16):
                found += part
        except TimeoutError:
            assert seconds < 1, "no answer comes"
        except (BrokenPipeError, ConnectionResetError):  # the server has read enough
            pass
    return found


def impatient(address, sent):
    """The server may wait for more, which never comes."""
    return answer(address, sent, seconds=0.1)


def wrong_value(draw):
    """A field of another type, or one that there is not."""
    field = draw.choice([*VALID, "stop", "n", "seed", "logprobs", "stream", "thresholds", "more"])
    body = json.dumps(VALID | {field: draw.choice(VALUES)})
    return answer, request(body.encode("utf-8", "surrogatepass"))


def wrong_bytes(draw):
    """A valid body in which some bytes were changed, left out or put in."""
    body = bytearray(json.dumps(VALID).encode())
    for _ in range(draw.randint(1, 4)):
        at = draw.randrange(len(body))
        body[at : at + draw.randint(0, 2)] = draw.randbytes(draw.randint(0, 2))
    return answer, request(bytes(body))


def deep(draw):
    """JSON in JSON in JSON."""
    times = draw.choice([50, 2_000, 20_000])
    return answer, request(b'{"model":' + b"[" * times + b"]" * times + b"}")


def wrong_length(draw):
    """More is promised than comes, or less."""
    body = json.dumps(VALID).encode()
    length = draw.choice([0, 1, len(body) - 3, len(body) + 50, -1, "many", 10**30])
    return impatient, request(body, length=length)


def half(draw):
    """The client leaves in the midst of its request, or before the answer."""
    whole = request(json.dumps(VALID | {"stream": draw.random() < 0.5}).encode())
    return impatient, whole[: draw.randint(1, len(whole))]


def no_http(draw):
    """Anything."""
    return impatient, draw.randbytes(draw.randint(1, 300))


def huge_header(draw):
    header = f"X-More: {'y' * draw.choice([70_000, 1 << 20])}"
    return answer, request(json.dumps(VALID).encode(), headers=[header])


def odd_address(draw):
    path = "/" + "".join(draw.choices("v1/%.~\\'\"<>{}?#é", k=draw.randint(1, 40)))
    return answer, request(b"{}", path=path, verb=draw.choice(["GET", "PUT", "POST", "BREW"]))


KINDS = [wrong_value, wrong_bytes, deep, wrong_length, half, no_http, huge_header, odd_address]


@pytest.mark.long
def test_a_thousand_of_all_kinds(address):
    draw = random.Random(0)
    right = answer(address, request(json.dumps(VALID).encode()))
    said = json.loads(right.partition(b"\r\n\r\n")[2])["choices"]
    statuses = {}
    for n in range(1000):
        kind = KINDS[n % len(KINDS)]
        send, sent = kind(draw)
        found = send(address, sent)
        assert not any(word.encode() in found for word in NEVER), (kind, sent[:500], found)
        if found:
            head, _, body = found.partition(b"\r\n\r\n")
            status = int(head.split()[1])
            statuses.setdefault(kind, set()).add(status)
            assert status < 500, (kind, sent[:500], found)
            if status >= 400 and b"application/json" in head:
                assert set(json.loads(body)) == {"error"}
    assert statuses[wrong_value] == {200, 400, 404} and 404 in statuses[odd_address]
    assert statuses[deep] == {400} and 400 in statuses[huge_header]
    assert min(statuses[no_http]) >= 400
    again = answer(address, request(json.dumps(VALID).encode()))
    assert json.loads(again.partition(b"\r\n\r\n")[2])["choices"] == said
