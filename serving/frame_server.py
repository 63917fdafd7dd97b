"""Where the coordinator meets its engines: a TCP port, and a key for each engine that is expected.

A connection is one engine's for life, so nothing that one has said can be taken for another's.
"""

from __future__ import annotations

import asyncio
import contextlib
import secrets
import socket
import ssl
from collections.abc import Callable
from functools import partial
from typing import TypeVar

T = TypeVar("T")
KEY_BYTES = 32  # of ASCII, first on every connection
_GREETING = 10.0  # seconds until a connection must have said its key
_MAX_STRANGERS = 256  # connections that have not


class FrameServer:
    """Belongs to the running event loop."""

    def __init__(self, context: ssl.SSLContext | None = None) -> None:
        """context: of a server that speaks TLS."""
        self.port, self._context = 0, context
        self._expected: dict[bytes, Callable[[socket.socket], None]] = {}
        self._listening: socket.socket | None = None
        self._tasks: set[asyncio.Task[None]] = set()

    def start(self, host: str) -> None:
        """Listen at any port of the interface `host`, a name or an address. Raises OSError."""
        family, _, _, _, address = socket.getaddrinfo(host, 0, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
        self._listening = socket.create_server(address[:2], family=family, backlog=128)
        self._listening.setblocking(False)
        self.port = self._listening.getsockname()[1]
        asyncio.get_running_loop().add_reader(self._listening, self._accept)

    def expect(self, connected: Callable[[socket.socket], None]) -> str:
        """A key; whoever comes with it, once, is `connected`."""
        key = secrets.token_hex(KEY_BYTES // 2)
        self._expected[key.encode()] = connected
        return key

    def forget(self, key: str) -> None:
        self._expected.pop(key.encode(), None)

    def close(self) -> None:
        if self._listening is not None:
            asyncio.get_running_loop().remove_reader(self._listening)
            self._listening.close()
            self._listening = None
        for task in self._tasks:
            task.cancel()

    def _accept(self) -> None:
        assert self._listening is not None
        with contextlib.suppress(OSError):
            sock, _ = self._listening.accept()
            if len(self._tasks) >= _MAX_STRANGERS:
                return sock.close()
            task = asyncio.get_running_loop().create_task(self._greet(sock))
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)

    async def _greet(self, sock: socket.socket) -> None:
        sock.setblocking(False)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        with contextlib.ExitStack() as stack, contextlib.suppress(OSError, TimeoutError):
            stack.callback(sock.close)
            async with asyncio.timeout(_GREETING):
                if self._context is not None:
                    sock = self._context.wrap_socket(sock, server_side=True, do_handshake_on_connect=False)
                    stack.callback(sock.close)
                    await _attempt(sock, sock.do_handshake)
                key = b""
                while len(key) < KEY_BYTES:
                    data = await _attempt(sock, partial(sock.recv, KEY_BYTES - len(key)))
                    if not data:
                        return
                    key += data
            connected = self._expected.pop(key, None)
            if connected is not None:
                stack.pop_all()
                connected(sock)


async def _attempt(sock: socket.socket, attempt: Callable[[], T]) -> T:
    """Do what does not block, as soon as it can be done."""
    loop = asyncio.get_running_loop()
    while True:
        try:
            return attempt()
        except (BlockingIOError, ssl.SSLWantReadError):
            add, remove = loop.add_reader, loop.remove_reader
        except ssl.SSLWantWriteError:
            add, remove = loop.add_writer, loop.remove_writer
        able = loop.create_future()
        add(sock, lambda able=able: able.done() or able.set_result(None))
        try:
            await able
        finally:
            remove(sock)
