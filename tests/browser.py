"""A page in headless Chromium, driven over a pair of pipes by the protocol of its developer tools.

The one idea: what a page does is asked of a real browser, with real keys and a real pointer, and
nothing beside the browser is needed for it.
"""

import base64
import itertools
import json
import os
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

PATH = shutil.which("chromium") or shutil.which("chromium-browser")
needed = pytest.mark.skipif(PATH is None, reason="looks at a page in chromium, which is not here")
KEY_CODES = {"ArrowLeft": 37, "ArrowUp": 38, "ArrowRight": 39, "ArrowDown": 40, "Tab": 9}
KEY_CODES |= {"Home": 36, "End": 35}


class Browser:
    """One window; `close` it."""

    def __init__(self, folder: Path):
        """Starts it, with what it keeps in an empty folder."""
        commands, answers = os.pipe(), os.pipe()
        flags = ["--headless=new", "--no-sandbox", "--disable-gpu", "--no-first-run"]
        flags += ["--remote-debugging-pipe", f"--user-data-dir={folder}", "--disable-dev-shm-usage"]
        # It reads commands from descriptor 3, and answers on 4.
        shell = f'exec "$0" "$@" 3<&{commands[0]} 4>&{answers[1]}'
        self._process = subprocess.Popen(
            ["bash", "-c", shell, PATH, *flags, "about:blank"],
            pass_fds=(commands[0], answers[1]),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        os.close(commands[0])
        os.close(answers[1])
        self._commands = open(commands[1], "wb", buffering=0)  # noqa: SIM115
        self._answers = open(answers[0], "rb")  # noqa: SIM115
        self._numbers, self._session = itertools.count(1), None
        self.said: list[str] = []  # errors of a page's script
        target = self._call("Target.createTarget", url="about:blank")["targetId"]
        attached = self._call("Target.attachToTarget", targetId=target, flatten=True)
        self._session = attached["sessionId"]
        self._call("Page.enable")
        self._call("Runtime.enable")

    def close(self) -> None:
        self._process.terminate()
        self._process.wait(timeout=30)
        self._commands.close()
        self._answers.close()

    def show(
        self, page: Path | str, *, width: int = 1000, height: int = 800, dark: bool = False
    ) -> None:
        """Loads a page, a file or an address, into a window of some size."""
        size = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": width < 600}
        self._call("Emulation.setDeviceMetricsOverride", **size)
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self._call("Emulation.setEmulatedMedia", features=[scheme])
        address = page if isinstance(page, str) else page.resolve().as_uri()
        self._call("Page.navigate", url=address)
        self._until("Page.loadEventFired")

    def ask(self, expression: str) -> Any:
        """The value of a JavaScript expression."""
        found = self._call("Runtime.evaluate", expression=expression, returnByValue=True)
        assert "exceptionDetails" not in found, found["exceptionDetails"]
        return found["result"].get("value")

    def press(self, key: str) -> None:
        about = {"key": key, "code": key, "windowsVirtualKeyCode": KEY_CODES[key]}
        for kind in ("keyDown", "keyUp"):
            self._call("Input.dispatchKeyEvent", type=kind, **about)

    def point(self, selector: str) -> None:
        """Moves the pointer to the middle of an element."""
        self.ask(f"document.querySelector({selector!r}).scrollIntoView({{block: 'center'}})")
        box = self.ask(
            f"(b => [b.x + b.width / 2, b.y + b.height / 2])"
            f"(document.querySelector({selector!r}).getBoundingClientRect())"
        )
        self._call("Input.dispatchMouseEvent", type="mouseMoved", x=box[0], y=box[1])

    def picture(self, path: Path) -> None:
        """Saves a picture of what the window shows."""
        data = self._call("Page.captureScreenshot", format="png")["data"]
        path.write_bytes(base64.b64decode(data))

    def _call(self, method: str, **parameters) -> dict:
        number = next(self._numbers)
        message = {"id": number, "method": method, "params": parameters}
        if self._session:
            message["sessionId"] = self._session
        self._commands.write(json.dumps(message).encode() + b"\0")
        while True:
            heard = self._hear()
            if heard.get("id") == number:
                assert "error" not in heard, heard["error"]
                return heard["result"]

    def _until(self, event: str) -> None:
        while self._hear().get("method") != event:
            pass

    def _hear(self) -> dict:
        letters = bytearray()
        while (letter := self._answers.read(1)) != b"\0":
            assert letter, "the browser has gone"
            letters += letter
        heard = json.loads(letters)
        if heard.get("method") == "Runtime.exceptionThrown":
            self.said.append(json.dumps(heard["params"]["exceptionDetails"])[:500])
        return heard
