"""One end of a socket in an asyncio event loop: bytes in, bytes out, and its end, all without blocking.

Bytes, not messages; `serving.channel` has these.
"""

from __future__ import annotations

import asyncio
import os
import socket
import ssl
from collections.abc import Callable

MAX_UNSENT = 64 << 20  # bytes: another end that is so far behind is not listening
_RECEIVE = 1 << 18
_NOT_NOW = (BlockingIOError, ssl.SSLWantReadError, ssl.SSLWantWriteError)


class Pipe:
    """Belongs to the running event loop. `received` is called with what arrives, `closed` once, when the other end is
    gone or does not listen; not when `close` was called here."""

    def __init__(self, fd: int | socket.socket, received: Callable[[bytes], None], closed: Callable[[], None]) -> None:
        """`fd` is duplicated, and made non-blocking for all who share it; a connected TLS socket is taken as it is."""
        self._loop = asyncio.get_running_loop()
        self._socket = fd if isinstance(fd, socket.socket) else socket.socket(fileno=os.dup(fd))
        self._socket.setblocking(False)
        self._received, self._closed = received, closed
        self._unsent = bytearray()
        self._loop.add_reader(self._socket, self._read)

    @property
    def open(self) -> bool:
        return self._socket.fileno() >= 0

    def write(self, data: bytes) -> None:
        """In order, and in the background where the other end is behind. Nothing happens once it is closed."""
        if not self.open:
            return
        was_empty = not self._unsent
        self._unsent += data
        if was_empty:
            self._flush()
        if len(self._unsent) > MAX_UNSENT:
            self._end()

    def close(self) -> None:
        """The other end sees it. May be called twice."""
        if self.open:
            self._loop.remove_reader(self._socket)
            self._loop.remove_writer(self._socket)
            self._socket.close()

    def read(self) -> None:
        """Receive what is there, now."""
        while self.open and self._read():
            pass

    def _read(self) -> bool:
        """Whether there was something."""
        try:
            data = self._socket.recv(_RECEIVE)
        except _NOT_NOW:
            return False
        except OSError:
            data = b""
        if data:
            self._received(data)
        else:
            self._end()
        return bool(data)

    def _flush(self) -> None:
        try:
            del self._unsent[: self._socket.send(self._unsent)]
        except _NOT_NOW:
            pass
        except OSError:
            self._unsent.clear()  # its end is seen by the reader, after what it said last
        if self._unsent:
            self._loop.add_writer(self._socket, self._flush)
        else:
            self._loop.remove_writer(self._socket)

    def _end(self) -> None:
        self.close()
        self._closed()
