import dataclasses
from pathlib import Path

import pytest
from starlette.testclient import TestClient

import early_exit as ee
from early_exit.decoding.decoder import Decoder
from early_exit.decoding.mode import LOSSY, VERIFIED, served
from early_exit.decoding.session import Session
from early_exit.serving import app
from early_exit.serving.answers import Limits
from early_exit.serving.worker import Worker

FIXTURES = Path(__file__).parents[1] / "fixtures"
NAME = "tiny"


@pytest.fixture(scope="session")
def model():
    """A small language model with two exits at which some tokens leave."""
    model = ee.attach(ee.load(str(FIXTURES / "tiny_chat")), ee.ExitConfig((2, 4), head="norm"))
    return dataclasses.replace(model, policy=ee.make_policy([0.02, 0.02]))


def sessions(model, rows=4):
    """One for each mode, greedy requests' costs assumed."""
    found = {}
    for name, mode in (("verified", served(VERIFIED, model.static)), ("lossy", LOSSY)):
        decoder = Decoder(model.static, model.params, model.policy, model.stop_ids, mode)
        found[name] = Session(decoder, rows, sizes=(rows,), slots=512, prefix_bytes=1 << 20)
    return found


@pytest.fixture(scope="session")
def serve(model):
    """A function that makes a client of a server with options of its own."""

    def client(key=None, limits=None, most_waiting=64, most_bytes=1 << 16):
        limits = limits or Limits(new_tokens=12)
        worker = Worker(sessions(model), most_waiting=most_waiting, steps=2)
        options = app.Options(NAME, key, limits, most_bytes)
        return TestClient(app.create(model, worker, options), raise_server_exceptions=False)

    return client


@pytest.fixture(scope="module")
def client(serve):
    with serve() as found:
        yield found
