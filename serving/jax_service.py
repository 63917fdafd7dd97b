"""The process of the JAX coordination service: `python -m serving.jax_service FD NUM_NODES [HOST]`.

It holds no device, so that no rank's death takes the service along. It says its address on the channel FD and obeys:

    fence {node}   shut a node's present incarnation out; answer fenced {node}
    forget {}      before node 0 starts again; answer forgot

It ends when the channel is closed, or with the process that started it.
"""

from __future__ import annotations

import socket
import sys
from typing import Any

from serving.channel import Channel
from serving.inbox import Inbox


def reserve_port(host: str) -> tuple[socket.socket, int]:
    """A free port. It stays ours while the socket lives: gRPC may bind it too, nobody else is given it.

    gRPC sets SO_REUSEPORT, so two services that were handed the same port would both believe they have it.
    """
    sock = socket.socket()
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
    sock.bind((host, 0))
    return sock, sock.getsockname()[1]


def main() -> None:
    channel, num_nodes = Channel.inherited(int(sys.argv[1])), int(sys.argv[2])
    host = sys.argv[3] if len(sys.argv) > 3 else "127.0.0.1"
    inbox = Inbox(channel)
    from moe_jax.distributed import fence, forget_topology, start_service

    reserved, port = reserve_port(host)
    address = f"{host}:{port}"
    service = start_service(address, num_nodes)
    channel.send({"type": "address", "address": address})
    ghosts: dict[int, Any] = {}  # by node: the incarnation that took a fenced one's place
    while True:
        for message in inbox.take(wait=True):
            match message.body["type"]:
                case "fence":
                    node = message.body["node"]
                    ghosts[node] = fence(address, node)
                    channel.send({"type": "fenced", "node": node})
                case "forget":
                    if ghosts:
                        forget_topology(next(iter(ghosts.values())))
                    channel.send({"type": "forgot"})
                case other:
                    raise ValueError(f"command: found {other!r}, expected fence or forget")
        assert service is not None and reserved.fileno() >= 0


if __name__ == "__main__":
    main()
