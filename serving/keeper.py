"""`moe-jax serve --journal DIR`: a coordinator in a process of its own, started again when it dies or stands still, and
the workers of this machine, if there are any, which outlive it.

What the coordinator knows is in its journal, so here is nothing that could be lost: this process starts others, and
passes on what the coordinator wants done to local workers. When it ends, all of them end.

Starting Python and loading the libraries takes most of a second, several where the engines want the cores, too. So
while one coordinator serves, another process stands by that has done that and waits to be told.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import signal
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from serving.channel import Decoder, Message, encode
from serving.child import Child
from serving.environment import host_labels, with_packages
from serving.gateway import Gateway
from serving.launcher import Launcher
from serving.logs import use_json
from serving.options import Options
from serving.pipe import Pipe

_LOOK = 0.25  # seconds between two looks
_STOOD_STILL = 2.0  # seconds between two looks: this process stood still itself
_STOPPED = 5.0  # seconds that a coordinator may be stopped
_BACKOFF = (0.1, 5.0)  # seconds until it is started again: the first time, and at most
_ATTEMPTS = 5  # ends in a row, each before it had listened
_STAND_BY = 3.0  # seconds after a coordinator listens: what it has to do first has the cores to itself
_PATIENCE = 5.0  # seconds, beyond those it may take to drain, from asking it to end to killing it

log = logging.getLogger(__name__)


class Process:
    """A coordinator's, which serves or stands by. `obey` is told what it says, `gone` of its end."""

    def __init__(self, options: Options, obey: Callable[[Message], None], gone: Callable[[Process], None]) -> None:
        self.failure: Exception | None = None  # as it has said, before it ended
        self._decoder, self._obey = Decoder(), obey
        self.child = Child("coordinator", "serving.coordinator_process", ["{fd}"], with_packages(os.environ), log=2)
        self._pipe = Pipe(self.child.channel.fileno(), self._received, lambda: gone(self))
        self.child.channel.close()  # the pipe has it now
        self.tell({"type": "options", "options": options.to_json()})

    def _received(self, data: bytes) -> None:
        for message in self._decoder.feed(data):
            match message.body:
                case {"type": "failed", "kind": kind, "message": text}:
                    self.failure = {"ValueError": ValueError, "OSError": OSError}.get(kind, RuntimeError)(text)
                case _:
                    self._obey(message)

    def tell(self, body: dict[str, Any]) -> None:
        self._pipe.write(encode(body))

    def end(self) -> str:
        """At once, whatever it does. What became of it."""
        self._pipe.close()
        self.child.wait(0.1)  # for its exit code
        what = self.child.describe()
        self.child.kill()
        self.child.wait(5.0)
        self.child.close()
        return what


class Keeper:
    """Belongs to the running event loop."""

    def __init__(self, options: Options, say: Callable[[str], None]) -> None:
        self._options, self._say = options, say
        self._launcher: Launcher | None = None
        self._gateway: Gateway | None = None
        self._process: Process | None = None  # the coordinator
        self._next: Process | None = None  # what stands by
        self._running_at = self._looked = time.monotonic()
        self._failures = 0  # ends in a row
        self._stopping = self._listened = False
        self.failure: asyncio.Future[None] = asyncio.get_running_loop().create_future()  # raises it

    async def run(self, stop: asyncio.Event) -> None:
        """Until `stop`. Raises as serving.server.serve."""
        self._stop = stop
        stopped = asyncio.create_task(stop.wait())
        looking = asyncio.create_task(self._look())
        self._start()
        try:
            await asyncio.wait([stopped, self.failure], return_when=asyncio.FIRST_COMPLETED)
            stop.clear()
            if self.failure.done():
                self.failure.result()
        finally:
            self._stopping = True
            stopped.cancel()
            looking.cancel()
            await self._close()

    async def _close(self) -> None:
        if self._launcher is not None:
            self._launcher.retire()
        if self._next is not None:
            self._next.end()
        if (process := self._process) is not None:
            child = process.child
            with contextlib.suppress(ProcessLookupError):
                child.process.send_signal(signal.SIGTERM)
            deadline = time.monotonic() + self._options.grace + _PATIENCE
            while not child.ended and time.monotonic() < deadline:
                if self._stop.is_set():  # again: at once
                    self._stop.clear()
                    with contextlib.suppress(ProcessLookupError):
                        child.process.send_signal(signal.SIGTERM)
                await asyncio.sleep(0.02)
            process.end()
        if self._gateway is not None:
            await self._gateway.close()  # after what came through it has been answered
        if self._launcher is not None:
            await self._launcher.close()

    # The coordinator

    def _start(self) -> None:
        if self._stopping:
            return
        process, self._next = self._next, None
        if process is not None and (process.child.ended or process.child.stopped):
            process.end()
            process = None
        self._process = process or Process(self._options, self._obey, self._gone)
        self._running_at = time.monotonic()
        self._process.tell({"type": "serve", "address": self._options.address})

    def _prepare_next(self) -> None:
        if self._next is None and not self._stopping:
            self._next = Process(self._options, self._obey, self._gone)

    def _obey(self, message: Message) -> None:
        match message.body:
            case {"type": "listening", "address": address}:
                self._failures, self._listened = 0, True
                self._options = replace(self._options, address=address)  # the next one's, too
                if self._options.restart:
                    asyncio.get_running_loop().call_later(_STAND_BY, self._prepare_next)
                if self._launcher is None and self._options.workers:
                    self._start_workers(address)
                if self._gateway is None and self._options.openai_port is not None:
                    self._gateway = Gateway(address, self._options.openai_port, self._options.model)
            case {"type": "say", "line": line}:
                self._say(line)
            case {"type": "dismissed", "rank": rank, "pid": pid} if self._launcher is not None:
                self._launcher.dismissed(rank, pid)
            case {"type": "hold", "host": host} if self._launcher is not None:
                self._launcher.hold(host)
            case {"type": "release", "host": host} if self._launcher is not None:
                self._launcher.release(host)

    def _gone(self, process: Process) -> None:
        if self._stopping:
            return
        if process is self._next:  # there will be another one when the next coordinator listens
            self._next = None
            return log.warning("stood by: %s", process.end())
        if process is not self._process:
            return
        what, said, self._process = process.end(), process.failure, None
        self._failures += 1
        final = not self._listened and said is not None  # what was wrong at the start stays so
        if final or self._failures > _ATTEMPTS or not self._options.restart:
            if not self.failure.done():
                self.failure.set_exception(said or RuntimeError(what))
            return
        log.warning("%s: another one is started", said or what.partition("\n")[0])
        delay = 0.0 if self._failures == 1 else min(_BACKOFF[0] * 2**self._failures, _BACKOFF[1])
        asyncio.get_running_loop().call_later(delay, self._start)

    async def _look(self) -> None:
        """One that is stopped for long is as good as dead, but holds on to the journal and the address."""
        while True:
            await asyncio.sleep(_LOOK)
            now, process = time.monotonic(), self._process
            if process is None or not process.child.stopped or now - self._looked > _STOOD_STILL:
                self._running_at = now
            elif now - self._running_at > _STOPPED:
                process.child.kill()
            self._looked = now

    # The workers

    def _start_workers(self, address: str) -> None:
        options = self._options
        self._launcher = Launcher(
            address,
            host_labels(options.hosts, options.ranks_per_host),
            options.platform,
            restart=options.restart,
            log_dir=options.log_dir,
            ended=self._worker_ended,
            tls=options.tls,
            token=options.cluster_token,
        )
        self._launcher.start()

    def _worker_ended(self, rank: int, code: int | None, what: str) -> None:
        log.info("%s", what)
        if self._process is not None:
            self._process.tell({"type": "worker_ended", "rank": rank, "code": code, "what": what})


async def keep(options: Options, say: Callable[[str], None]) -> None:
    """As serving.server.serve, which runs in the processes that are kept."""
    stop, loop = asyncio.Event(), asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop.set)
    for directory in (options.journal, options.log_dir):
        if directory is not None:
            directory.mkdir(parents=True, exist_ok=True)
    if options.log_json:
        use_json(lambda: None)
    await Keeper(options, say).run(stop)
