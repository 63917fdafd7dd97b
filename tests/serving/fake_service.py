"""The JAX service's side of the channel, without JAX: see tests/serving/fake_engine.py."""

import socket
import sys

from serving.channel import Channel
from serving.inbox import Inbox


def main() -> None:
    channel = Channel.inherited(int(sys.argv[1]))
    inbox = Inbox(channel)
    listening = socket.create_server(("127.0.0.1", 0))  # never accepts: those who connect only want to see it end
    channel.send({"type": "address", "address": f"127.0.0.1:{listening.getsockname()[1]}"})
    while True:
        for message in inbox.take(wait=True):
            match message.body["type"]:
                case "fence":
                    channel.send({"type": "fenced", "node": message.body["node"]})
                case "forget":
                    channel.send({"type": "forgot"})


if __name__ == "__main__":
    main()
