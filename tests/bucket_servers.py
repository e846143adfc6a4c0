"""Servers of buckets, started for a test, and a proxy before them in which things go wrong.

The one idea: what a client library does when an answer does not come, or is a lie, cannot be seen
from a stand-in for that library. So the servers are real ones, and faults happen on the wire. (The
emulator of GCS knows no preconditions; the proxy answers those of a write for it.)
"""

import contextlib
import http.client
import json
import os
import re
import socketserver
import threading
import urllib.parse
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler
from unittest import mock

BUCKET = "bucket"
# What kind of bucket it is gcsfs would ask by gRPC, which the emulator has not. Read on import.
_REST_ONLY = {"GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT": "false"}
os.environ |= _REST_ONLY


class Faults:
    """What goes wrong, and when: a list of (which request, what), each done once.

    What is one of `503`, `drop` (no answer), `drop after` (done, but no answer) and `lost` (said to
    be done, and gone).
    """

    def __init__(self):
        self.planned: list[tuple[Callable[[str, str], bool], str]] = []
        self.happened: list[str] = []

    def plan(self, what: str, wanted: Callable[[str, str], bool], times: int = 1) -> None:
        self.planned += [(wanted, what)] * times

    def of(self, method: str, path: str) -> str | None:
        for entry in self.planned:
            if entry[0](method, urllib.parse.unquote(path)):
                self.planned.remove(entry)
                self.happened.append(entry[1])
                return entry[1]
        return None


class _Proxy(socketserver.ThreadingMixIn, socketserver.TCPServer):
    daemon_threads = True
    allow_reuse_address = True

    def handle_error(self, request, client_address):
        """Clients that went away are no news."""


def _handler(port: int, faults: Faults):
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *_):
            pass

        def _forward(self):
            body = self._body()
            fault = faults.of(self.command, f"{self.path} {_object(self.path, body)}")
            if fault == "503":
                return self._answer(503, {}, b"slow down")
            if fault == "drop":
                return self._hang_up()
            if "ifGenerationMatch=0" in self.path and self._is_there(body):
                return self._answer(412, {}, b'{"error": {"message": "conditionNotMet"}}')
            status, headers, content = self._ask(self.command, self.path, body)
            if fault == "lost":
                self._ask("DELETE", _object(self.path, body), b"")
            if fault == "drop after":
                return self._hang_up()
            return self._answer(status, headers, content)

        do_GET = do_PUT = do_POST = do_DELETE = do_HEAD = do_PATCH = _forward

        def _is_there(self, body: bytes) -> bool:
            return self._ask("GET", _object(self.path, body), b"")[0] == 200

        def _body(self) -> bytes:
            if self.headers.get("Transfer-Encoding", "").lower() == "chunked":
                chunks = []
                while size := int(self.rfile.readline().split(b";")[0], 16):
                    chunks.append(self.rfile.read(size))
                    self.rfile.readline()
                self.rfile.readline()
                return b"".join(chunks)
            return self.rfile.read(int(self.headers.get("Content-Length") or 0))

        def _ask(self, method: str, path: str, body: bytes):
            connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
            skipped = {"transfer-encoding", "content-length", "connection", "expect"}
            headers = {k: v for k, v in self.headers.items() if k.lower() not in skipped}
            connection.request(method, path, body, headers)
            answer = connection.getresponse()
            found = answer.status, dict(answer.getheaders()), answer.read()
            connection.close()
            return found

        def _answer(self, status: int, headers: dict[str, str], content: bytes) -> None:
            self.send_response_only(status)
            length = headers.get("Content-Length", str(len(content)))
            for name, value in headers.items():
                if name.lower() not in ("content-length", "transfer-encoding", "connection"):
                    self.send_header(name, value)
            length = length if self.command == "HEAD" else str(len(content))
            self.send_header("Content-Length", length)
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(content)

        def _hang_up(self) -> None:
            self.close_connection = True
            with contextlib.suppress(OSError):
                self.connection.shutdown(2)

    return Handler


def _object(path: str, body: bytes) -> str:
    """Where the object is that a request has written: S3's as it is, GCS's by the name in it."""
    parsed = urllib.parse.urlsplit(path)
    if not parsed.path.startswith("/upload/"):
        return parsed.path
    asked = urllib.parse.parse_qs(parsed.query).get("name")
    told = re.search(rb'"name": *("[^"]*")', body)
    name = asked[0] if asked else json.loads(told[1]) if told else ""
    return f"{parsed.path.removeprefix('/upload')}/{urllib.parse.quote(name, safe='')}"


@contextlib.contextmanager
def proxied(port: int) -> Iterator[tuple[str, Faults]]:
    """(address of a proxy before a server of this machine, what is to go wrong in it)."""
    faults = Faults()
    with _Proxy(("127.0.0.1", 0), _handler(port, faults)) as proxy:
        thread = threading.Thread(target=proxy.serve_forever, args=(0.02,), daemon=True)
        thread.start()
        try:
            yield f"http://127.0.0.1:{proxy.server_address[1]}", faults
        finally:
            proxy.shutdown()
            thread.join()


@contextlib.contextmanager
def gcs() -> Iterator[tuple[str, Faults, dict[str, str]]]:
    """(`gs://bucket`, faults, the environment in which all libraries find it) of an emulator."""
    from gcp_storage_emulator.server import create_server

    server = create_server("127.0.0.1", 0, in_memory=True, default_bucket=BUCKET)
    server.start()
    try:
        with proxied(server._api._httpd.socket.getsockname()[1]) as (address, faults):
            environment = {
                "STORAGE_EMULATOR_HOST": address,  # gcsfs
                "TENSORSTORE_GCS_HTTP_URL": address,
                "FSSPEC_GCS_TOKEN": "anon",
                "FSSPEC_GS_TOKEN": "anon",
                "GOOGLE_CLOUD_PROJECT": "test",
                **_REST_ONLY,
            }
            with mock.patch.dict(os.environ, environment), _told_to_fsspec():
                yield f"gs://{BUCKET}", faults, environment
    finally:
        server.stop()


@contextlib.contextmanager
def s3() -> Iterator[tuple[str, Faults, dict[str, str]]]:
    """The same of moto's server, `s3://bucket`."""
    import boto3
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer("127.0.0.1", 0, verbose=False)
    server.start()
    _, port = server.get_host_and_port()
    try:
        with proxied(port) as (address, faults):
            environment = {
                "AWS_ENDPOINT_URL": address,
                "AWS_ACCESS_KEY_ID": "test",
                "AWS_SECRET_ACCESS_KEY": "test",
                "AWS_DEFAULT_REGION": "us-east-1",
            }
            with mock.patch.dict(os.environ, environment), _told_to_fsspec():
                client = boto3.client("s3", endpoint_url=f"http://127.0.0.1:{port}")
                client.create_bucket(Bucket=BUCKET)
                yield f"s3://{BUCKET}", faults, environment
    finally:
        server.stop()


@contextlib.contextmanager
def _told_to_fsspec() -> Iterator[None]:
    """File systems of before know nothing of these servers, and those after not of others."""
    import fsspec
    from etils.epath import backend

    def forget():
        backend.fsspec_backend._get_filesystem.cache_clear()
        for name in ("gs", "s3"):
            fsspec.get_filesystem_class(name).clear_instance_cache()

    fsspec.config.set_conf_env(fsspec.config.conf)
    forget()
    try:
        yield
    finally:
        forget()
