"""The process of the JAX coordination service: `python -m serving.jax_service FD NUM_NODES HOST NAME`.

It holds no device, so that no rank's death takes the service along. It says its address on the channel FD and obeys:

    fence {node}   shut a node's present incarnation out; answer fenced {node}
    forget {}      before node 0 starts again; answer forgot

When the channel is closed it ends, or with the process that started it. With a NAME it first waits for another
coordinator to connect to the abstract Unix socket of that name, and obeys that one (serving.takeover).
"""

from __future__ import annotations

import contextlib
import os
import select
import socket
import struct
import sys
from typing import Any

from serving.channel import Channel, ChannelClosed, Message
from serving.inbox import bound_log

_TICK = 1.0  # seconds
PATIENCE = 60.0  # seconds without a coordinator: longer than workers go on without one


def reserve_port(host: str) -> tuple[socket.socket, int]:
    """A free port. It stays ours while the socket lives: gRPC may bind it too, nobody else is given it.

    gRPC sets SO_REUSEPORT, so two services that were handed the same port would both believe they have it.
    """
    sock = socket.socket()
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
    sock.bind((host, 0))
    return sock, sock.getsockname()[1]


class Coordinators:
    """One after the other; each is told the address when it comes."""

    def __init__(self, channel: Channel, name: str, hello: dict[str, Any]) -> None:
        self._channel, self._hello, self._parent = channel, hello, os.getppid()
        self._listening: socket.socket | None = None
        if name:
            self._listening = socket.socket(socket.AF_UNIX)
            self._listening.bind(f"\0{name}")
            self._listening.listen(1)
            self._listening.settimeout(PATIENCE)
        channel.send(hello)

    def receive(self) -> list[Message]:
        """As Channel.receive; raises ChannelClosed when no coordinator comes any more."""
        try:
            while not select.select([self._channel], [], [], _TICK)[0]:
                if self._listening is None and os.getppid() != self._parent:
                    raise ChannelClosed("a fork of the parent still holds the other end open")
            return self._channel.receive()
        except ChannelClosed:
            self._channel.close()
            self._channel = self._next()
            return []

    def send(self, body: dict[str, Any]) -> None:
        with contextlib.suppress(ChannelClosed):  # seen by `receive`
            self._channel.send(body)

    def _next(self) -> Channel:
        while self._listening is not None:
            try:
                sock, _ = self._listening.accept()
            except TimeoutError:
                break
            _, uid, _ = struct.unpack("3i", sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12))
            if uid == os.getuid():
                channel = Channel(sock)
                channel.send(self._hello)
                return channel
            sock.close()
        raise ChannelClosed("no other coordinator")


def main() -> None:
    channel, num_nodes, host, name = Channel.inherited(int(sys.argv[1])), int(sys.argv[2]), *sys.argv[3:5]
    from moe_jax.distributed import fence, forget_topology, start_service

    reserved, port = reserve_port(host)
    address = f"{host}:{port}"
    service = start_service(address, num_nodes)
    coordinators = Coordinators(channel, name, {"type": "address", "address": address})
    ghosts: dict[int, Any] = {}  # by node: the incarnation that took a fenced one's place
    while True:
        for message in coordinators.receive():
            match message.body["type"]:
                case "fence":
                    node = message.body["node"]
                    ghosts[node] = fence(address, node)
                    coordinators.send({"type": "fenced", "node": node})
                case "forget":
                    if ghosts:
                        forget_topology(next(iter(ghosts.values())))
                    coordinators.send({"type": "forgot"})
                case other:
                    raise ValueError(f"command: found {other!r}, expected fence or forget")
        bound_log()
        assert service is not None and reserved.fileno() >= 0


if __name__ == "__main__":
    try:
        main()
    except ChannelClosed:
        os._exit(0)  # at once: nothing in it is worth more than leaving no orphan
