"""The JAX service's side of the channel, without JAX: see tests/serving/fake_engine.py."""

import os
import socket
import sys

from serving.channel import Channel, ChannelClosed
from serving.jax_service import Coordinators


def main() -> None:
    listening = socket.create_server(("127.0.0.1", 0))  # never accepts: those who connect only want to see it end
    hello = {"type": "address", "address": f"127.0.0.1:{listening.getsockname()[1]}"}
    coordinators = Coordinators(Channel.inherited(int(sys.argv[1])), sys.argv[4], hello)
    while True:
        for message in coordinators.receive():
            match message.body["type"]:
                case "fence":
                    coordinators.send({"type": "fenced", "node": message.body["node"]})
                case "forget":
                    coordinators.send({"type": "forgot"})


if __name__ == "__main__":
    try:
        main()
    except ChannelClosed:
        os._exit(0)
