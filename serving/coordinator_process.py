"""The process of a coordinator that is kept running: `python -m serving.coordinator_process FD` (serving.keeper).

The channel FD brings the options, and later which local workers have ended. It says

    listening {address}, say {line}, dismissed {rank, pid}, hold {host}, failed {kind, message}

and when the channel is closed it ends, with everything that belongs to it.
"""

from __future__ import annotations

import asyncio
import logging
import socket
import sys
from collections.abc import Callable

from serving.channel import Channel, ChannelClosed, Decoder, encode
from serving.options import Options
from serving.pipe import Pipe


class Link:
    """To the process that keeps this one and has the launcher. Belongs to the running event loop."""

    def __init__(self, sock: socket.socket, ended: Callable[[], None]) -> None:
        """ended: the other process is no more."""
        self.worker_ended: Callable[[int, int | None, str], None] = lambda rank, code, what: None
        self._decoder = Decoder()
        self._pipe = Pipe(sock.fileno(), self._received, ended)
        sock.close()

    def listening(self, address: str) -> None:
        self._pipe.write(encode({"type": "listening", "address": address}))

    def say(self, line: str) -> None:
        self._pipe.write(encode({"type": "say", "line": line}))

    def failed(self, error: BaseException) -> None:
        kind = next((k.__name__ for k in (ValueError, OSError) if isinstance(error, k)), "RuntimeError")
        if isinstance(error, (FileNotFoundError, NotADirectoryError, PermissionError)):
            kind = "ValueError"  # a path that was given
        self._pipe.write(encode({"type": "failed", "kind": kind, "message": str(error)[:4000]}))

    def dismissed(self, rank: int, pid: int) -> None:
        self._pipe.write(encode({"type": "dismissed", "rank": rank, "pid": pid}))

    def hold(self, host: str) -> None:
        self._pipe.write(encode({"type": "hold", "host": host}))

    async def close(self) -> None:
        """The workers are not this process's to end."""

    def _received(self, data: bytes) -> None:
        for message in self._decoder.feed(data):
            body = message.body
            self.worker_ended(body["rank"], body["code"], body["what"])


async def main() -> None:
    sock = socket.socket(fileno=int(sys.argv[1]))
    channel = Channel(sock)
    try:
        options = Options.from_json(channel.receive()[0].body)
    except ChannelClosed:
        return
    from serving import server

    gone = asyncio.Event()
    link = Link(sock, gone.set)
    try:
        await server.serve(options, *server.prepare(options), link.say, link, gone)
    except (ValueError, OSError, RuntimeError) as e:
        link.failed(e)


if __name__ == "__main__":
    logging.basicConfig(format="%(asctime)s %(name)s: %(message)s", level=logging.INFO)
    asyncio.run(main())
