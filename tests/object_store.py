"""An S3 server in a process of its own, and a proxy before it that does what networks do."""

import os
import socket
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.client import HTTPConnection
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import NamedTuple

import pytest

BUCKET = "bucket"
FAULTS = ("unavailable", "cut", "short", "altered", "slow")
"""503; the connection closed in the middle of a body; a body that ends early and says so; one wrong byte; and
no answer for a while."""
SLOW = 0.8
"""Seconds"""

Fault = Callable[[str, str, int], str | None]
"""(method, path, which request for that path, from 0) -> one of FAULTS, or None."""


class Request(NamedTuple):
    method: str
    path: str
    fault: str | None


class Proxy(ThreadingHTTPServer):
    """Hands requests on, and spoils the answers that `fault` names."""

    daemon_threads = True

    def __init__(self, behind: int) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.behind = behind
        self.fault: Fault = lambda method, path, nth: None
        self.requests: list[Request] = []
        self._seen: Counter[tuple[str, str]] = Counter()
        self._lock = threading.Lock()

    def handle_error(self, *what: object) -> None:
        """Of a client that has given up."""

    def note(self, method: str, path: str) -> str | None:
        with self._lock:
            nth = self._seen[method, path]
            self._seen[method, path] += 1
            fault = self.fault(method, path, nth)
            self.requests.append(Request(method, path, fault))
            return fault

    def begin(self, fault: Fault = lambda method, path, nth: None) -> None:
        """Forget what was asked, and spoil from now on what `fault` says."""
        with self._lock:
            self.fault = fault
            self.requests.clear()
            self._seen.clear()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Proxy

    def handle_request(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        fault = self.server.note(self.command, self.path.partition("?")[0])
        if fault == "slow":
            time.sleep(SLOW)
        if fault == "unavailable":
            self.send_response(503)
            self.send_header("Content-Length", "0")
            self.end_headers()
            return
        behind = HTTPConnection("127.0.0.1", self.server.behind)
        behind.request(self.command, self.path, body, dict(self.headers.items()))
        answer = behind.getresponse()
        data, length = answer.read(), answer.getheader("Content-Length")
        behind.close()
        if fault == "altered" and data:
            data = data[:-1] + bytes([data[-1] ^ 1])
        if fault == "short":
            data = data[: len(data) // 2]
            length = str(len(data))
        self._send(answer.status, answer.getheaders(), length, data, cut=fault == "cut")

    def _send(
        self, status: int, headers: list[tuple[str, str]], length: str | None, data: bytes, cut: bool
    ) -> None:
        self.send_response_only(status)
        for name, value in headers:
            if name.lower() not in ("content-length", "connection", "transfer-encoding"):
                self.send_header(name, value)
        self.send_header("Content-Length", length or str(len(data)))
        self.end_headers()
        self.wfile.write(data[: len(data) // 2] if cut else data)
        if cut:
            self.wfile.flush()
            self.connection.shutdown(socket.SHUT_RDWR)
            self.close_connection = True

    do_GET = do_PUT = do_HEAD = do_POST = do_DELETE = handle_request

    def log_message(self, *what: object) -> None:
        pass


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


def settings(port: int) -> dict[str, str]:
    """The environment in which obstore speaks to a server on loopback."""
    return {
        "AWS_ENDPOINT_URL": f"http://127.0.0.1:{port}",
        "AWS_ACCESS_KEY_ID": "someone",
        "AWS_SECRET_ACCESS_KEY": "something",
        "AWS_REGION": "us-east-1",
        "AWS_ALLOW_HTTP": "true",
    }


@contextmanager
def spoiling_proxy(behind: int, environment: pytest.MonkeyPatch) -> Iterator[Proxy]:
    """A proxy before the server at a port, to which obstore speaks from now on."""
    with Proxy(behind) as proxy:
        thread = threading.Thread(target=proxy.serve_forever, daemon=True)
        thread.start()
        for name, value in settings(proxy.server_address[1]).items():
            environment.setenv(name, value)
        yield proxy
        proxy.shutdown()
        thread.join()


@contextmanager
def s3_server() -> Iterator[int]:
    """moto's server in a process of its own, with an empty bucket; its port."""
    port = free_port()
    command = [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)]
    quiet = subprocess.DEVNULL
    server = subprocess.Popen(command, stdout=quiet, stderr=quiet, env=os.environ | settings(port))
    try:
        for _ in range(600):
            try:
                connection = HTTPConnection("127.0.0.1", port)
                connection.request("PUT", f"/{BUCKET}")
                assert connection.getresponse().status == 200
                break
            except OSError:
                assert server.poll() is None, "moto's server did not start"
                time.sleep(0.1)
        yield port
    finally:
        server.kill()
        server.wait()
