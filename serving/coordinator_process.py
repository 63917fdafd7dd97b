"""The process of a coordinator that is kept running: `python -m serving.coordinator_process FD` (serving.keeper).

The channel FD brings

    options {…}, serve {address}, worker_ended {rank, code, what}

Between the first two it stands by: all is loaded that takes time, and nothing is touched that another coordinator may
have, neither journal nor address. It says

    listening {address}, say {line}, dismissed {rank, pid}, hold {host}, release {host}, failed {kind, message}

and when the channel is closed it ends, with everything that belongs to it.
"""

from __future__ import annotations

import asyncio
import logging
import socket
import sys
from collections.abc import Callable
from dataclasses import replace

from serving.channel import Decoder, encode
from serving.options import Options
from serving.pipe import Pipe


class Link:
    """To the process that keeps this one and has the launcher. Belongs to the running event loop."""

    def __init__(self, sock: socket.socket) -> None:
        loop = asyncio.get_running_loop()
        self.worker_ended: Callable[[int, int | None, str], None] = lambda rank, code, what: None
        self.options: asyncio.Future[Options] = loop.create_future()
        self.address: asyncio.Future[str] = loop.create_future()  # where to serve, once it is time to
        self.gone = asyncio.Event()  # the other process is no more
        self._decoder = Decoder()
        self._pipe = Pipe(sock.fileno(), self._received, self.gone.set)
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

    def release(self, host: str) -> None:
        self._pipe.write(encode({"type": "release", "host": host}))

    async def close(self) -> None:
        """The workers are not this process's to end."""

    def _received(self, data: bytes) -> None:
        for message in self._decoder.feed(data):
            match message.body:
                case {"type": "options", "options": options}:
                    self.options.set_result(Options.from_json(options))
                case {"type": "serve", "address": address}:
                    self.address.set_result(address)
                case {"type": "worker_ended", "rank": rank, "code": code, "what": what}:
                    self.worker_ended(rank, code, what)


async def run(link: Link) -> None:
    """Raises as serving.server.serve."""
    options = await link.options
    from serving import server

    prepared = server.prepare(options)
    address = await link.address
    await server.serve(replace(options, address=address), *prepared, link.say, link, link.gone)


async def main() -> None:
    link = Link(socket.socket(fileno=int(sys.argv[1])))
    running, gone = asyncio.create_task(run(link)), asyncio.create_task(link.gone.wait())
    # While it serves, that is how it learns that it is alone. Before that there is nothing to end.
    await asyncio.wait([running, gone], return_when=asyncio.FIRST_COMPLETED)
    if not running.done() and not link.address.done():
        return
    try:
        await running
    except (ValueError, OSError, RuntimeError) as e:
        link.failed(e)


if __name__ == "__main__":
    logging.basicConfig(format="%(asctime)s %(name)s: %(message)s", level=logging.INFO)
    asyncio.run(main())
