"""The processes of coordinators that are kept running: `python -m serving.coordinator_process FD` (serving.keeper).

What takes time is to load all that a coordinator needs. This process does that once, and touches nothing that a
coordinator may have, neither journal nor address. Each message on the socket FD

    fork {options}

brings another socket along: the link of a new coordinator, which is a fork of this process, and begins at once. On it
the coordinator hears

    worker_ended {rank, code, what}

and says

    started {pid}, listening {address}, say {line}, dismissed {rank, pid}, hold {host}, release {host},
    failed {kind, message}, ended {code}

the last one being said for it, when it has. When its link is closed it ends, with everything that belongs to it. When
FD is closed this process ends, but no coordinator.
"""

from __future__ import annotations

import asyncio
import gc
import importlib.util
import logging
import os
import select
import socket
import sys
from collections.abc import Callable
from contextlib import suppress
from typing import Any

from moe_jax.config import ModelConfig
from moe_jax.text import Tokenizer
from serving.channel import Decoder, encode
from serving.cluster import Cluster
from serving.options import Options
from serving.pipe import Pipe

_RECEIVE = 1 << 18


class Link:
    """To the process that keeps this one and has the launcher. Belongs to the running event loop."""

    def __init__(self, sock: socket.socket) -> None:
        self.worker_ended: Callable[[int, int | None, str], None] = lambda rank, code, what: None
        self.gone = asyncio.Event()  # the other process is no more
        self._decoder = Decoder()
        self._pipe = Pipe(sock, self._received, self.gone.set)
        self._say({"type": "started", "pid": os.getpid()})

    def listening(self, address: str) -> None:
        self._say({"type": "listening", "address": address})

    def say(self, line: str) -> None:
        self._say({"type": "say", "line": line})

    def failed(self, error: BaseException) -> None:
        kind = next((k.__name__ for k in (ValueError, OSError) if isinstance(error, k)), "RuntimeError")
        if isinstance(error, (FileNotFoundError, NotADirectoryError, PermissionError)):
            kind = "ValueError"  # a path that was given
        self._say({"type": "failed", "kind": kind, "message": str(error)[:4000]})

    def dismissed(self, rank: int, pid: int) -> None:
        self._say({"type": "dismissed", "rank": rank, "pid": pid})

    def hold(self, host: str) -> None:
        self._say({"type": "hold", "host": host})

    def release(self, host: str) -> None:
        self._say({"type": "release", "host": host})

    async def close(self) -> None:
        """The workers are not this process's to end."""

    def _say(self, body: dict[str, Any]) -> None:
        self._pipe.write(encode(body))

    def _received(self, data: bytes) -> None:
        for message in self._decoder.feed(data):
            match message.body:
                case {"type": "worker_ended", "rank": rank, "code": code, "what": what}:
                    self.worker_ended(rank, code, what)


Prepared = tuple[Cluster, ModelConfig, Tokenizer] | Exception  # what serving.server.prepare has returned, or raised


def prepare(options: Options) -> Prepared:
    from serving import server

    try:
        return server.prepare(options)
    except (ValueError, OSError) as e:
        return e


def fork_coordinators(sock: socket.socket) -> tuple[socket.socket, Options, Prepared] | None:
    """Returns in each fork, with its link, and in this process, with None, when nobody is there any more to ask."""
    decoder, fds, prepared = Decoder(), [], None
    links: dict[int, tuple[int, socket.socket]] = {}  # by pidfd: the process of a coordinator, and its link
    while True:
        ready: list[int] = select.select([sock.fileno(), *links], [], [])[0]
        for fd in ready:
            if fd in links:
                pid, link = links.pop(fd)
                code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
                with link, suppress(OSError):
                    link.send(encode({"type": "ended", "code": code}), socket.MSG_DONTWAIT)
                os.close(fd)
                continue
            data, more, _, _ = socket.recv_fds(sock, _RECEIVE, 1)
            if not data:
                return None
            fds += more
            for message in decoder.feed(data):
                link, options = socket.socket(fileno=fds.pop(0)), Options.from_json(message.body["options"])
                if prepared is None:
                    prepared = prepare(options)
                    gc.collect()
                    gc.freeze()  # so that it stays shared
                pid = os.fork()
                if not pid:
                    os.setsid()
                    for other in (sock, *(link for _, link in links.values())):
                        other.close()
                    for fd in links:
                        os.close(fd)
                    return link, options, prepared
                links[os.pidfd_open(pid)] = pid, link


async def coordinate(sock: socket.socket, options: Options, prepared: Prepared) -> None:
    from serving import server

    link = Link(sock)
    try:
        if isinstance(prepared, Exception):
            raise prepared
        await server.serve(options, *prepared, link.say, link, link.gone)
    except (ValueError, OSError, RuntimeError) as e:
        link.failed(e)


def main() -> None:
    from serving import kserve_face, server  # noqa: F401

    if importlib.util.find_spec("smg_grpc_proto") is not None:
        from serving import vllm_face  # noqa: F401

    forked = fork_coordinators(socket.socket(fileno=int(sys.argv[1])))
    if forked is not None:
        asyncio.run(coordinate(*forked))


if __name__ == "__main__":
    logging.basicConfig(format="%(asctime)s %(name)s: %(message)s", level=logging.INFO)
    main()
