"""`moe-jax serve --journal DIR`: a coordinator in a process of its own, started again when it dies or stands still, and
the workers of this machine, which outlive it.

What the coordinator knows is in its journal, so here is nothing that could be lost: this process starts others, and
passes on what the coordinator wants done to local workers. When it ends, all of them end.
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
_PATIENCE = 5.0  # seconds, beyond those it may take to drain, from asking it to end to killing it

log = logging.getLogger(__name__)


class Keeper:
    """Belongs to the running event loop."""

    def __init__(self, options: Options, say: Callable[[str], None]) -> None:
        self._options, self._say = options, say
        self._launcher: Launcher | None = None
        self._gateway: Gateway | None = None
        self._child: Child | None = None
        self._pipe: Pipe | None = None
        self._running_at = self._looked = time.monotonic()
        self._failures = 0  # ends in a row
        self._said: Exception | None = None  # by the coordinator that has just ended: why
        self._stopping = False
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
        if self._gateway is not None:
            await self._gateway.close()
        if self._launcher is not None:
            self._launcher.retire()
        child = self._child
        if child is not None:
            with contextlib.suppress(ProcessLookupError):
                child.process.send_signal(signal.SIGTERM)
            deadline = time.monotonic() + self._options.grace + _PATIENCE
            while not child.ended and time.monotonic() < deadline:
                if self._stop.is_set():  # again: at once
                    self._stop.clear()
                    with contextlib.suppress(ProcessLookupError):
                        child.process.send_signal(signal.SIGTERM)
                await asyncio.sleep(0.02)
            child.kill()
            child.wait(5.0)
            child.close()
        if self._pipe is not None:
            self._pipe.close()
        if self._launcher is not None:
            await self._launcher.close()

    # The coordinator

    def _start(self) -> None:
        if self._stopping:
            return
        environ = with_packages(os.environ)
        self._child = child = Child("coordinator", "serving.coordinator_process", ["{fd}"], environ, log=2)
        self._said, self._running_at, decoder = None, time.monotonic(), Decoder()

        def received(data: bytes) -> None:
            for message in decoder.feed(data):
                self._obey(message)

        self._pipe = Pipe(child.channel.fileno(), received, lambda: self._gone(child))
        child.channel.close()  # the pipe has it now
        self._pipe.write(encode(self._options.to_json()))

    def _obey(self, message: Message) -> None:
        match message.body:
            case {"type": "listening", "address": address}:
                self._failures = 0
                self._options = replace(self._options, address=address)  # the next one's, too
                if self._launcher is None:
                    self._start_workers(address)
                    if self._options.openai_port is not None:
                        self._gateway = Gateway(address, self._options.openai_port, self._options.model)
            case {"type": "say", "line": line}:
                self._say(line)
            case {"type": "dismissed", "rank": rank, "pid": pid} if self._launcher is not None:
                self._launcher.dismissed(rank, pid)
            case {"type": "hold", "host": host} if self._launcher is not None:
                self._launcher.hold(host)
            case {"type": "failed", "kind": kind, "message": text}:
                self._said = {"ValueError": ValueError, "OSError": OSError}.get(kind, RuntimeError)(text)

    def _gone(self, child: Child) -> None:
        if child is not self._child or self._stopping:
            return
        child.wait(0.1)  # for its exit code
        what, self._child = child.describe(), None
        child.kill()
        child.close()
        self._failures += 1
        final = self._launcher is None and self._said is not None  # what was wrong at the start stays so
        if final or self._failures > _ATTEMPTS or not self._options.restart:
            if not self.failure.done():
                self.failure.set_exception(self._said or RuntimeError(what))
            return
        log.warning("%s: another one is started", self._said or what.partition("\n")[0])
        delay = 0.0 if self._failures == 1 else min(_BACKOFF[0] * 2**self._failures, _BACKOFF[1])
        asyncio.get_running_loop().call_later(delay, self._start)

    async def _look(self) -> None:
        """One that is stopped for long is as good as dead, but holds on to the journal and the address."""
        while True:
            await asyncio.sleep(_LOOK)
            now, child = time.monotonic(), self._child
            if child is None or not child.stopped or now - self._looked > _STOOD_STILL:
                self._running_at = now
            elif now - self._running_at > _STOPPED:
                child.kill()
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
        if self._pipe is not None:
            self._pipe.write(encode({"type": "worker_ended", "rank": rank, "code": code, "what": what}))


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
