"""A real S3 server, and a proxy before it that answers late, refuses, or cuts connections."""

import http.client
import socket
import subprocess
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from tests.consumers.environments import installed

MOTO = ("moto[s3]==5.2.5", "flask==3.1.3", "flask-cors==6.0.5", "boto3==1.44.8")
BUCKET = "fleet-bucket"
Rule = Callable[[int, str, str], str | int | None]
KEY_ID, SECRET = "AKIDOFTHETESTS", "secret-of-the-tests"


@dataclass(frozen=True)
class Server:
    port: int

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def uploads(self) -> int:
        """Multipart uploads that were begun and neither completed nor given up."""
        with urllib.request.urlopen(f"{self.url}/{BUCKET}?uploads") as answer:
            return answer.read().count(b"<Upload>")


@contextmanager
def served(folder: Path) -> Iterator[Server]:
    """moto's server with an empty bucket, in an environment of its own."""
    python = installed("moto", MOTO)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        server = Server(free.getsockname()[1])
    with (folder / "moto.log").open("wb") as log:
        command = [python, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(server.port)]
        process = subprocess.Popen(command, stdout=log, stderr=log)
    try:
        for _ in range(600):
            try:
                made = urllib.request.Request(f"{server.url}/{BUCKET}", method="PUT")
                urllib.request.urlopen(made).close()
                break
            except OSError:
                assert process.poll() is None, (folder / "moto.log").read_text()
                time.sleep(0.05)
        yield server
    finally:
        process.kill()
        process.wait()


def speak_to(monkeypatch: pytest.MonkeyPatch, url: str) -> None:
    """Have this process, and those that it starts, take a server for S3."""
    for name in ("AWS_PROFILE", "AWS_SESSION_TOKEN", "AWS_ENDPOINT_URL_S3", "AWS_DEFAULT_REGION"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("AWS_ENDPOINT_URL", url)
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", KEY_ID)
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", SECRET)
    monkeypatch.setenv("AWS_REGION", "us-east-1")


@dataclass
class Proxy:
    """seen: method and path of each request; rule: (count of the request, method, path) → a status to answer with,
    "hang", "cut" (the answer ends in its middle), "lost" (carried out, and no answer), "unconditional" (without its
    If-… headers), or None to pass it on."""

    server: Server
    rule: Rule = lambda count, method, path: None
    seen: list[tuple[str, str]] = field(default_factory=list)
    url: str = ""
    hang: float = 3.0


CODES = {403: "AccessDenied", 503: "SlowDown", 507: "InsufficientStorage", 500: "InternalError"}


@contextmanager
def proxied(server: Server) -> Iterator[Proxy]:
    proxy = Proxy(server)
    turn = threading.Lock()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def handle_one_request(self) -> None:
            self.raw_requestline = self.rfile.readline(65537)
            if not self.raw_requestline or not self.parse_request():
                self.close_connection = True
                return
            body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            with turn:
                proxy.seen.append((self.command, self.path))
                count = len(proxy.seen)
            self._answer(proxy.rule(count, self.command, self.path), body)

        def _answer(self, what: str | int | None, body: bytes) -> None:
            if isinstance(what, int):
                told = f"<Error><Code>{CODES[what]}</Code><Message>{KEY_ID}</Message></Error>".encode()
                self._send(what, [("Content-Type", "application/xml")], told, len(told))
                return
            if what == "hang":
                time.sleep(proxy.hang)
                self.close_connection = True
                return
            upstream = http.client.HTTPConnection("127.0.0.1", server.port)
            passed = {k: v for k, v in self.headers.items() if what != "unconditional" or not k.startswith("if-")}
            upstream.request(self.command, self.path, body, passed)
            answer = upstream.getresponse()
            content = answer.read()
            headers = [(k, v) for k, v in answer.getheaders() if k.lower() not in _HOPS]
            length = int(answer.getheader("Content-Length") or len(content))
            upstream.close()
            if what == "lost":
                self.close_connection = True
            elif what == "cut":
                self._send(answer.status, headers, content[: len(content) // 2], length)
                self.close_connection = True
            else:
                self._send(answer.status, headers, b"" if self.command == "HEAD" else content, length)

        def _send(self, status: int, headers: list[tuple[str, str]], content: bytes, length: int) -> None:
            self.send_response_only(status)
            for name, value in headers:
                self.send_header(name, value)
            self.send_header("Content-Length", str(length))
            self.end_headers()
            self.wfile.write(content)
            self.wfile.flush()

    class Quiet(ThreadingHTTPServer):
        daemon_threads = True

        def handle_error(self, request: object, client_address: object) -> None:
            """A client that has gone."""

    listening = Quiet(("127.0.0.1", 0), Handler)
    proxy.url = f"http://127.0.0.1:{listening.server_address[1]}"
    thread = threading.Thread(target=listening.serve_forever, daemon=True)
    thread.start()
    try:
        yield proxy
    finally:
        listening.shutdown()
        listening.server_close()


_HOPS = frozenset({"content-length", "transfer-encoding", "connection", "server", "date"})
