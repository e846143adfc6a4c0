"""The server's page in a browser, on a real port: it asks, streams in colours, stops, says why."""

import contextlib
import threading
import time

import browser
import pytest
import uvicorn
from serving.conftest import NAME, sessions

from early_exit.serving import app
from early_exit.serving.answers import Limits
from early_exit.serving.worker import Worker

pytestmark = browser.needed
FILL = "document.getElementById('{}').value = '{}'"
ANSWER = "document.getElementById('answer').innerText"
STATE = "document.getElementById('state').innerText"
SEND = "document.getElementById('form').requestSubmit()"


@contextlib.contextmanager
def listening(application):
    """The address of a server on a port of its own."""
    server = uvicorn.Server(uvicorn.Config(application, port=0, log_level="warning"))
    thread = threading.Thread(target=server.run)
    thread.start()
    while not server.started:
        time.sleep(0.02)
    port = server.servers[0].sockets[0].getsockname()[1]
    yield f"http://127.0.0.1:{port}"
    server.should_exit = True
    thread.join()


@pytest.fixture(scope="module")
def address(model):
    options = app.Options(NAME, limits=Limits(new_tokens=400))
    with listening(app.create(model, Worker(sessions(model), steps=1), options)) as found:
        yield found


@pytest.fixture(scope="module")
def window(tmp_path_factory):
    opened = browser.Browser(tmp_path_factory.mktemp("chromium"))
    yield opened
    opened.close()


def until(window, condition, seconds=60):
    for _ in range(int(seconds / 0.05)):
        if window.ask(condition):
            return
        time.sleep(0.05)
    pytest.fail(f"{condition} did not come true; the page says {window.ask(STATE)!r}")


def test_an_answer_comes_in_colours_and_nothing_is_fetched_from_elsewhere(window, address):
    window.show(address)
    assert window.ask("document.getElementById('name').innerText") == NAME
    legend = "[...document.querySelectorAll('#legend li')].map(x => x.innerText).join()"
    assert window.ask(legend) == "2 blocks,4 blocks,6 blocks,looked up"
    assert window.ask("document.getElementById('locked').offsetParent === null")
    modes = window.ask("[...document.getElementById('mode').options].map(o => o.text).join()")
    assert modes == "verified,lossy"
    window.ask(FILL.format("most", 12))
    window.ask(FILL.format("mode", "lossy"))
    window.ask(SEND)
    until(window, f"{STATE}.includes('12 tokens') && !document.getElementById('send').disabled")
    spans = window.ask("document.querySelectorAll('#answer span').length")
    assert spans == 12
    coloured = window.ask(
        "[...document.querySelectorAll('#answer span')].every(s => s.title && s.style.background)"
    )
    assert coloured
    elsewhere = window.ask(
        "performance.getEntriesByType('resource').filter(r => !r.name.startsWith(location.origin))"
        ".length"
    )
    assert elsewhere == 0 and not window.said


def test_it_can_be_stopped_and_asked_again(window, address):
    window.show(address)
    window.ask(FILL.format("most", 400))
    window.ask(SEND)
    until(window, "document.querySelectorAll('#answer span').length > 3")
    window.ask("document.getElementById('stop').click()")
    until(window, f"{STATE}.startsWith('stopped; ')")
    count = window.ask("document.querySelectorAll('#answer span').length")
    assert 3 < count < 400
    time.sleep(0.3)
    assert window.ask("document.querySelectorAll('#answer span').length") == count
    window.ask(FILL.format("most", 3))
    window.ask(SEND)
    until(window, f"{STATE}.includes('3 tokens')")


def test_what_is_wrong_is_said_on_the_page(window, address):
    window.show(address)
    window.ask(FILL.format("most", 100000))
    window.ask(SEND)
    until(window, f"{STATE}.includes('positions but the model')")


@pytest.mark.parametrize("dark", [False, True])
def test_it_fits_a_phone(window, address, dark):
    window.show(address, width=360, height=740, dark=dark)
    assert window.ask("document.documentElement.scrollWidth") <= 360
