"""What passes frames between an engine and the coordinator, in the supervisor's process and unread.

Two threads that block in the kernel: a step's tokens cost one `recv` and one `send` here, and an engine that is behind
holds up nobody but itself. The engine has a Unix socket, as it must; whatever TCP there is ends here. Only whole frames
are passed on, so that either end may be replaced between two of them.
"""

from __future__ import annotations

import contextlib
import os
import select
import socket
import ssl
import sys
import threading
from collections.abc import Callable

from serving.channel import whole_frames
from serving.tls import Stream

_CONNECT = 10.0  # seconds
_RECEIVE = 1 << 18

Connection = socket.socket | Stream
Reach = Callable[[], Connection]


class Relay:
    def __init__(self, engine: int, first: bytes, reach: Reach, greeting: bytes, ended: Callable[[], None]) -> None:
        """engine: file descriptor of the supervisor's end of its channel, duplicated. first: frames for it.

        reach: connects with the coordinator, which is told `greeting` first. ended: called in a thread, once, when the
        engine's end has been closed; that of the coordinator makes no difference, for it has other means to be missed.
        What the engine says while there is no coordinator is dropped: the next one asks (serving.takeover).
        """
        self._engine = socket.socket(fileno=os.dup(engine))
        self._coordinator: Connection | None = None
        self._down: threading.Thread | None = None
        self._attaching = threading.Lock()
        self._closed, self._ended = False, ended
        self._up = threading.Thread(target=self._run, args=(first, reach, greeting), name="relay", daemon=True)
        self._up.start()

    def attach(self, reach: Reach, greeting: bytes) -> None:
        """Another coordinator takes the place of the one before. Blocks for some seconds at most; raises OSError if
        there is none."""
        with self._attaching:
            coordinator = reach()
            coordinator.sendall(greeting)
            before, self._coordinator = self._coordinator, coordinator
            if before is not None and self._down is not None:
                _shut(before)
                self._down.join()  # or frames of both could get mixed up
            self._down = threading.Thread(target=_pass, args=(coordinator, self._engine), name="down", daemon=True)
            self._down.start()

    def close(self) -> None:
        """Both ends see it. `ended` is not called any more."""
        self._closed = True
        _shut(self._engine)
        if self._coordinator is not None:
            _shut(self._coordinator)
        self._up.join(1.0)
        self._engine.close()

    def _run(self, first: bytes, reach: Reach, greeting: bytes) -> None:
        with contextlib.suppress(OSError):
            self._engine.sendall(first)
            self.attach(reach, greeting)
        with contextlib.suppress(OSError, ValueError):
            self._pass_up()
        _wait_for_end(self._engine)
        if not self._closed:
            self._ended()

    def _pass_up(self) -> None:
        rest = bytearray()
        while data := self._engine.recv(_RECEIVE):
            rest += data
            size = whole_frames(rest)
            coordinator = self._coordinator
            if size and coordinator is not None:
                with contextlib.suppress(OSError):
                    coordinator.sendall(memoryview(rest)[:size])
            rest = rest[size:]


def _shut(sock: Connection) -> None:
    with contextlib.suppress(OSError):
        sock.shutdown(socket.SHUT_RDWR)


def connect(address: tuple[str, int], context: ssl.SSLContext | None) -> Connection:
    """Raises OSError, and says so in the log. context: of a client, where the server speaks TLS."""
    try:
        sock = socket.create_connection(address, _CONNECT)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        if context is not None:
            return Stream(context.wrap_socket(sock, server_hostname=address[0]))
    except OSError as e:
        print(f"coordinator: port {address[1]} of {address[0]}, for frames: {e}", file=sys.stderr, flush=True)
        raise
    sock.settimeout(None)
    return sock


def _pass(source: Connection, target: Connection) -> None:
    """Until either end is no more. `source` is closed then."""
    rest = bytearray()
    with source, contextlib.suppress(OSError, ValueError):
        while data := source.recv(_RECEIVE):
            rest += data
            size = whole_frames(rest)
            if size:
                target.sendall(memoryview(rest)[:size])
                rest = rest[size:]


def _wait_for_end(sock: socket.socket) -> None:
    """Read nothing, and return when the other end has been closed."""
    poller = select.poll()
    poller.register(sock, select.POLLRDHUP)
    poller.poll()
