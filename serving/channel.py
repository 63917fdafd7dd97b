"""Messages between two processes of one machine, over a Unix socket pair.

A message is a JSON object and, for arrays, raw bytes behind it. One frame:

    uint32 length of the JSON · uint32 length of the bytes · JSON (UTF-8) · bytes

Both ends are this package and were started together, so there is no version in it; no pickle either. A Unix socket and
not TCP, because a rank that loses a peer shuts down every TCP socket of its process. Imports nothing but the standard
library: an engine process listens before it has loaded anything else.
"""

from __future__ import annotations

import json
import socket
import struct
import threading
from typing import Any, NamedTuple

MAX_MESSAGE = 64 << 20  # bytes, JSON and blob each: far above what is ever sent, so more means a broken stream
_HEADER = struct.Struct("<II")
_RECEIVE = 1 << 18
_SEND_TURN = 5.0  # seconds: a process that reports its end while another of its threads is stuck in a send


class Message(NamedTuple):
    body: dict[str, Any]
    blob: bytes = b""


class ChannelClosed(ConnectionError):
    """The other end is closed: that process has ended, or is about to."""


def encode(body: dict[str, Any], blob: bytes | memoryview = b"") -> bytes:
    """One frame. Raises ValueError for what is longer than MAX_MESSAGE."""
    text = json.dumps(body, separators=(",", ":")).encode()
    if max(len(text), len(blob)) > MAX_MESSAGE:
        raise ValueError(f"message: found {len(text)} + {len(blob)} bytes, expected at most {MAX_MESSAGE} each")
    return b"".join((_HEADER.pack(len(text), len(blob)), text, blob))


def whole_frames(data: bytes | bytearray) -> int:
    """How many of the first bytes of `data` are whole frames. Raises ValueError when the stream is broken."""
    end = 0
    while len(data) - end >= _HEADER.size:
        text, blob = _HEADER.unpack_from(data, end)
        if max(text, blob) > MAX_MESSAGE:
            raise ValueError(f"message: found a length of {max(text, blob)} bytes, expected at most {MAX_MESSAGE}")
        if len(data) - end < _HEADER.size + text + blob:
            break
        end += _HEADER.size + text + blob
    return end


class Decoder:
    """Cuts a stream of bytes, however it arrives, into messages."""

    def __init__(self) -> None:
        self._buffer = bytearray()

    def feed(self, data: bytes) -> list[Message]:
        """The messages that `data` completes. Raises ValueError when the stream is broken; it stays so."""
        self._buffer += data
        messages: list[Message] = []
        start = 0
        while len(self._buffer) - start >= _HEADER.size:
            text, blob = _HEADER.unpack_from(self._buffer, start)
            if max(text, blob) > MAX_MESSAGE:
                raise ValueError(f"message: found a length of {max(text, blob)} bytes, expected at most {MAX_MESSAGE}")
            middle = start + _HEADER.size + text
            if len(self._buffer) < middle + blob:
                break
            body = json.loads(self._buffer[start + _HEADER.size : middle])
            messages.append(Message(body, bytes(self._buffer[middle : middle + blob])))
            start = middle + blob
        del self._buffer[:start]
        return messages


class Channel:
    """One end. Messages arrive in the order they were sent. Threads may send while another receives."""

    def __init__(self, sock: socket.socket, timeout: float | None = None) -> None:
        """`timeout`: seconds that a `send` or `receive` may take; TimeoutError ends it."""
        sock.settimeout(timeout)
        self._socket, self._decoder = sock, Decoder()
        self._sending = threading.Lock()
        self._rest = b""  # of a frame that was begun

    @staticmethod
    def pair(timeout: float | None = None) -> tuple[Channel, socket.socket]:
        """(this process's end, the socket to be inherited by the other)."""
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
        return Channel(ours, timeout), theirs

    @staticmethod
    def inherited(fd: int) -> Channel:
        """The other end, in the process that was started with this file descriptor."""
        return Channel(socket.socket(fileno=fd))

    def fileno(self) -> int:
        return self._socket.fileno()

    def send(self, body: dict[str, Any], blob: bytes | memoryview = b"") -> None:
        """Blocks while the other end is behind. Raises ChannelClosed, TimeoutError, or ValueError as `encode`."""
        self.send_all(encode(body, blob))

    def send_all(self, frame: bytes) -> None:
        """As `send`, what `encode` gave; behind the rest of what `send_some` began."""
        if not self._sending.acquire(timeout=_SEND_TURN):
            raise TimeoutError(f"send: another thread has been sending for {_SEND_TURN} s")
        try:
            self._socket.sendall(self._rest + frame)
            self._rest = b""
        except (BrokenPipeError, ConnectionResetError) as e:
            raise ChannelClosed(str(e)) from None
        finally:
            self._sending.release()

    def send_some(self, frame: bytes) -> bool:
        """Send without waiting for the other end. False: not all of it; the rest goes before whatever is sent next.
        Raises ChannelClosed."""
        with self._sending:
            try:
                sent = 0 if self._rest else self._socket.send(frame, socket.MSG_DONTWAIT)
            except BlockingIOError:
                sent = 0
            except (BrokenPipeError, ConnectionResetError) as e:
                raise ChannelClosed(str(e)) from None
            self._rest += frame[sent:]
            return not self._rest

    def receive(self) -> list[Message]:
        """The messages completed by what has arrived; blocks until something has. Raises ChannelClosed at the end."""
        try:
            data = self._socket.recv(_RECEIVE)
        except ConnectionResetError as e:
            raise ChannelClosed(str(e)) from None
        if not data:
            raise ChannelClosed("end of stream")
        return self._decoder.feed(data)

    def close(self) -> None:
        self._socket.close()
