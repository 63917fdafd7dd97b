"""Where the coordinator meets its engines: a TCP port, and a key for each engine that is expected.

A connection is one engine's for life, so nothing that one has said can be taken for another's.
"""

from __future__ import annotations

import asyncio
import contextlib
import secrets
import socket
from collections.abc import Callable

KEY_BYTES = 32  # of ASCII, first on every connection
_GREETING = 10.0  # seconds until a connection must have said its key
_MAX_STRANGERS = 256  # connections that have not


class FrameServer:
    """Belongs to the running event loop."""

    def __init__(self) -> None:
        self.port = 0
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
        loop, key = asyncio.get_running_loop(), b""
        with sock, contextlib.suppress(OSError, TimeoutError):
            async with asyncio.timeout(_GREETING):
                while len(key) < KEY_BYTES:
                    data = await loop.sock_recv(sock, KEY_BYTES - len(key))
                    if not data:
                        return
                    key += data
            connected = self._expected.pop(key, None)
            if connected is not None:
                connected(sock)  # it is duplicated there
