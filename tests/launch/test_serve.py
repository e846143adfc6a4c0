"""`launch.serve` on a run's folder: it listens, answers, and leaves when it is asked to."""

import dataclasses
import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

import pytest

import early_exit as ee

CHAT = Path(__file__).parents[1] / "fixtures" / "tiny_chat"


@pytest.fixture
def saved(tmp_path):
    """A saved model with exits and a policy."""
    model = ee.attach(ee.load(str(CHAT)), ee.ExitConfig((2, 4), head="norm"))
    model = dataclasses.replace(model, policy=ee.make_policy([0.02, 0.02]))
    return ee.save(model, tmp_path / "saved")


def free_port():
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


def ask(port, path, body=None, **headers):
    data = None if body is None else json.dumps(body).encode()
    headers["Content-Type"] = "application/json"
    request = urllib.request.Request(f"http://127.0.0.1:{port}{path}", data, headers)
    with urllib.request.urlopen(request, timeout=120) as answer:
        return json.loads(answer.read())


@pytest.mark.processes
def test_what_was_saved_is_served_until_it_is_asked_to_leave(saved):
    port = free_port()
    flags = [f"--workdir={saved}", f"--port={port}", "--rows=2", "--positions=64"]
    flags += ["--mode=lossy", "--api_key_env=MY_KEY", "--name=small"]
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", "MY_KEY": "secret"}
    server = subprocess.Popen(
        [sys.executable, "-m", "launch.serve", *flags],
        env=environment,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        for _ in range(600):
            try:
                assert ask(port, "/health") == {"status": "ok"}
                break
            except (urllib.error.URLError, ConnectionError):
                assert server.poll() is None, server.stderr.read()
                time.sleep(0.2)
        key = {"Authorization": "Bearer secret"}
        body = {"model": "small", "prompt": "One", "max_tokens": 5, "temperature": 0}
        found = ask(port, "/v1/completions", body, **key)
        assert 1 <= found["usage"]["completion_tokens"] <= 5
        with pytest.raises(urllib.error.HTTPError, match="401"):
            ask(port, "/v1/models")
        too_long = body | {"max_tokens": 500}
        with pytest.raises(urllib.error.HTTPError, match="400"):
            ask(port, "/v1/completions", too_long, **key)
    finally:
        server.send_signal(signal.SIGTERM)
        _, told = server.communicate(timeout=60)
    assert f"serving small on http://127.0.0.1:{port}" in told
    assert "Traceback" not in told and "secret" not in told
