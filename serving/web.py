"""What a browser and Prometheus are shown: `/`, a live status page, `/status.json` and `/metrics`. It only reads.

In threads of their own, beside the event loop, which is asked for the status alone. With API keys one is needed here as
well: as a bearer token, or as the password that a browser asks for.
"""

from __future__ import annotations

import asyncio
import base64
import concurrent.futures
import json
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable
from importlib import resources
from itertools import pairwise
from socketserver import ThreadingMixIn
from typing import Any
from urllib.parse import parse_qs
from wsgiref.simple_server import WSGIRequestHandler, WSGIServer, make_server

from prometheus_client import CONTENT_TYPE_LATEST

from serving.access import Guard
from serving.metrics import Metrics
from serving.tls import Tls

_ANSWER = 5.0  # seconds for the event loop to say the status
_IDLE = 10.0  # seconds that a connection may take to say what it wants
_EVERY, _SAMPLES = 0.5, 241  # seconds between two samples for the page's chart, and how many are kept
_HEADERS = [
    ("Cache-Control", "no-store"),
    ("X-Content-Type-Options", "nosniff"),
    ("Content-Security-Policy", "default-src 'self'; style-src 'unsafe-inline'; script-src 'unsafe-inline'"),
]


class _Server(ThreadingMixIn, WSGIServer):
    daemon_threads = True
    request_queue_size = 32


class _Handler(WSGIRequestHandler):
    timeout = _IDLE

    def log_message(self, format: str, *args: Any) -> None:
        """Nobody wants to read of every look."""


class Web:
    """status: called in the running event loop; slots: whether placements are wanted, too."""

    def __init__(
        self, status: Callable[[bool], dict[str, Any]], metrics: Metrics, guard: Guard, tls: Tls | None
    ) -> None:
        self._status, self._metrics, self._guard, self._tls = status, metrics, guard, tls
        self._loop = asyncio.get_running_loop()
        self._server: WSGIServer | None = None
        self._samples: deque[tuple[float, int, str, int]] = deque(maxlen=_SAMPLES)  # time, tokens, state, epoch
        self._sampling: asyncio.TimerHandle | None = None
        self._page = resources.files("serving").joinpath("status_page.html").read_bytes()

    def start(self, address: str) -> str:
        """Listen at "host:port"; returns it with the port. Raises OSError."""
        host, _, port = address.rpartition(":")
        server = make_server(host.strip("[]"), int(port), self._answer, _Server, _Handler)
        if self._tls is not None:
            server.socket = self._tls.server_context().wrap_socket(
                server.socket, server_side=True, do_handshake_on_connect=False
            )
        self._server = server
        self._sample()
        threading.Thread(target=server.serve_forever, name="web", daemon=True).start()
        return f"{host}:{server.server_port}"

    def close(self) -> None:
        if self._sampling is not None:
            self._sampling.cancel()
        if self._server is not None:
            self._server.shutdown()
            self._server.server_close()

    def _sample(self) -> None:
        status = self._status(False)
        self._samples.append((time.monotonic(), status["requests"]["tokens"], status["state"], status["epoch"]))
        self._sampling = self._loop.call_later(_EVERY, self._sample)

    def _history(self) -> list[dict[str, Any]]:
        """Of the last minutes, oldest first: seconds ago, tokens per second since the one before, state, epoch."""
        now = time.monotonic()
        return [
            {"ago": round(now - at, 3), "rate": (tokens - before) / (at - since), "state": state, "epoch": epoch}
            for (since, before, _, _), (at, tokens, state, epoch) in pairwise(self._samples)
        ]

    def _answer(self, environ: dict[str, Any], start_response: Callable[..., Any]) -> Iterable[bytes]:
        def reply(status: str, kind: str, body: bytes, *headers: tuple[str, str]) -> list[bytes]:
            start_response(status, [("Content-Type", kind), ("Content-Length", str(len(body))), *_HEADERS, *headers])
            return [b"" if environ["REQUEST_METHOD"] == "HEAD" else body]

        if environ["REQUEST_METHOD"] not in ("GET", "HEAD"):
            return reply("405 Method Not Allowed", "text/plain", b"only GET and HEAD\n")
        if not self._guard.knows(_bearer(environ.get("HTTP_AUTHORIZATION", ""))):
            wanted = ("WWW-Authenticate", 'Basic realm="moe-jax: the password is an API key"')
            return reply("401 Unauthorized", "text/plain", b"an API key is needed\n", wanted)
        path = environ["PATH_INFO"]
        if path == "/":
            return reply("200 OK", "text/html; charset=utf-8", self._page)
        if path not in ("/status.json", "/metrics"):
            return reply("404 Not Found", "text/plain", b"found here: / /status.json /metrics\n")
        try:
            wanted = parse_qs(environ.get("QUERY_STRING", ""))
            status = self._ask("slots" in wanted, "history" in wanted)
        except (TimeoutError, concurrent.futures.CancelledError, RuntimeError):
            return reply("503 Service Unavailable", "text/plain", b"the coordinator does not answer\n")
        if path == "/metrics":
            return reply("200 OK", CONTENT_TYPE_LATEST, self._metrics.render(status))
        return reply("200 OK", "application/json", json.dumps(status).encode())

    def _ask(self, slots: bool, history: bool) -> dict[str, Any]:
        async def ask() -> dict[str, Any]:
            return self._status(slots) | ({"history": self._history()} if history else {})

        return asyncio.run_coroutine_threadsafe(ask(), self._loop).result(_ANSWER)


def _bearer(authorization: str) -> str:
    """What a browser says of a password, as a client would."""
    kind, _, rest = authorization.partition(" ")
    if kind.lower() != "basic":
        return authorization
    try:
        return "Bearer " + base64.b64decode(rest).decode().partition(":")[2]
    except ValueError:
        return ""
