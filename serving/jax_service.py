"""The process of the JAX coordination service: `python -m serving.jax_service FD NUM_NODES`.

It holds no device, so that no rank's death takes the service along. It says its address on the channel FD and ends when
that is closed, or with the process that started it.
"""

from __future__ import annotations

import socket
import sys

from serving.channel import Channel
from serving.inbox import Inbox


def reserve_port() -> tuple[socket.socket, int]:
    """A free port of 127.0.0.1. It stays ours while the socket lives: gRPC may bind it too, nobody else is given it.

    gRPC sets SO_REUSEPORT, so two services that were handed the same port would both believe they have it.
    """
    sock = socket.socket()
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
    sock.bind(("127.0.0.1", 0))
    return sock, sock.getsockname()[1]


def main() -> None:
    channel, num_nodes = Channel.inherited(int(sys.argv[1])), int(sys.argv[2])
    inbox = Inbox(channel)
    from moe_jax.distributed import start_service

    reserved, port = reserve_port()
    address = f"127.0.0.1:{port}"
    service = start_service(address, num_nodes)
    channel.send({"type": "address", "address": address})
    while True:
        inbox.take(wait=True)  # the process ends inside, with the channel; commands come with elastic epochs
        assert service is not None and reserved.fileno() >= 0


if __name__ == "__main__":
    main()
