"""An S3 server in a process of its own, a proxy before it that does what networks do, and a web server.

Google's stores are asked in the words of S3 (its XML interface), so the same server answers for gs://.
"""

import datetime
import functools
import ipaddress
import json
import os
import socket
import ssl
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.client import HTTPConnection
from http.server import BaseHTTPRequestHandler, SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import NamedTuple
from urllib.parse import unquote

import pytest

from clt.remote.store import Patience

BUCKET = "bucket"
QUICK = Patience(attempts=6, first_wait=0.01, longest_wait=0.05, silence=20)
IMPATIENT = QUICK._replace(silence=0.5)
FAULTS = ("unavailable", "cut", "short", "altered", "slow")
"""503; the connection closed in the middle of a body; a body that ends early and says so; one wrong byte; and
no answer for a while."""
ELSEWHERE = "elsewhere"
"""What S3 says of a bucket in another region: a redirect to no place."""
SIGNED = "AWS4-HMAC-SHA256 Credential=a/20260101/us-east-1/s3/aws4_request, SignedHeaders=host, Signature=0"
"""A signature, which moto does not check."""
SLOW = 0.8
"""Seconds"""

Fault = Callable[[str, str, int], str | None]
"""(method, path, which request for that path, from 0) -> one of FAULTS, ELSEWHERE, or None."""


class Request(NamedTuple):
    method: str
    path: str
    fault: str | None


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 128  # of 5, those that come at once are refused and try again a second later


class Proxy(_Server):
    """Hands requests on, and spoils the answers that `fault` names."""

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
        fault = self.server.note(self.command, unquote(self.path.partition("?")[0]))
        if fault == "slow":
            time.sleep(SLOW)
        if fault in ("unavailable", ELSEWHERE):
            self.send_response(503 if fault == "unavailable" else 301)
            self.send_header("Content-Length", "0")
            self.end_headers()
            return
        behind = HTTPConnection("127.0.0.1", self.server.behind)
        headers = {name.lower(): value for name, value in self.headers.items()}
        if not headers.get("authorization", "").startswith("AWS4"):  # Google's; the server knows S3's alone
            headers["authorization"] = SIGNED
        behind.request(self.command, self.path, body, headers)
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
    """The environment in which obstore speaks to a server on loopback, for s3:// and gs://."""
    google = {"gcs_base_url": f"http://127.0.0.1:{port}", "disable_oauth": True}
    google |= dict.fromkeys(("client_email", "private_key", "private_key_id"), "")
    return {
        "GOOGLE_SERVICE_ACCOUNT_KEY": json.dumps(google),
        "GOOGLE_ALLOW_HTTP": "true",
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


class FolderHandler(SimpleHTTPRequestHandler):
    """Gives the files of a folder, and says nothing."""

    def log_message(self, *what: object) -> None:
        pass


@contextmanager
def web_server(
    folder: Path, certificate: Path | None = None, handler: type[FolderHandler] = FolderHandler
) -> Iterator[str]:
    """Any web server with a folder behind it, without a listing; its address, https with a certificate."""
    with _Server(("127.0.0.1", 0), functools.partial(handler, directory=str(folder))) as server:
        if certificate is not None:
            context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
            context.load_cert_chain(certificate)
            server.socket = context.wrap_socket(server.socket, server_side=True)
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        yield f"{'https' if certificate else 'http'}://127.0.0.1:{server.server_address[1]}"
        server.shutdown()
        thread.join()


def write_certificate(path: Path) -> Path:
    """Of localhost, signed by itself, with its key in the same file."""
    from cryptography import x509
    from cryptography.hazmat.primitives import hashes, serialization
    from cryptography.hazmat.primitives.asymmetric import ec

    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "localhost")])
    now, day = datetime.datetime.now(datetime.UTC), datetime.timedelta(days=1)
    hosts = [x509.DNSName("localhost"), x509.IPAddress(ipaddress.ip_address("127.0.0.1"))]
    certificate = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(1)
        .not_valid_before(now - day)
        .not_valid_after(now + day)
        .add_extension(x509.SubjectAlternativeName(hosts), critical=False)
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .sign(key, hashes.SHA256())
    )
    pem = serialization.Encoding.PEM
    secret = key.private_bytes(pem, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    path.write_bytes(certificate.public_bytes(pem) + secret)
    return path
