"""`moe-jax serve --journal DIR`: a coordinator in a process of its own, started again when it dies or stands still, and
the workers of this machine, if there are any, which outlive it.

What the coordinator knows is in its journal, so here is nothing that could be lost: this process starts others, and
passes on what the coordinator wants done to local workers. When it ends, all of them end.

Starting Python and loading the libraries takes a second, and several where the engines want the cores, too. So that is
done once, in a process that coordinators are forks of (serving.coordinator_process).
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import signal
import socket
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from serving.channel import Decoder, Message, encode
from serving.child import Child, Relative, fate_of
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
_END = 5.0  # seconds from SIGKILL to the end
_PATIENCE = 5.0  # seconds, beyond those it may take to drain, from asking it to end to killing it

log = logging.getLogger(__name__)


class Process:
    """A coordinator's. `obey` is told what it says, `gone` of its end."""

    def __init__(
        self, forks: Child, options: Options, obey: Callable[[Message], None], gone: Callable[[], None]
    ) -> None:
        """forks: a process of serving.coordinator_process. If that has ended, so has this one."""
        self.failure: Exception | None = None  # as it has said, before it ended
        self._forks, self._decoder, self._obey = forks, Decoder(), obey
        self._itself: Relative | None = None  # once it has been forked
        self._code: int | None = None  # exit code
        link, theirs = socket.socketpair()
        self._pipe = Pipe(link, self._received, gone)
        request = encode({"type": "fork", "options": options.to_json()})
        with theirs, socket.socket(fileno=os.dup(forks.channel.fileno())) as sock, contextlib.suppress(BrokenPipeError):
            socket.send_fds(sock, [request], [theirs.fileno()])

    @property
    def pid(self) -> int | None:
        return None if self._itself is None else self._itself.pid

    @property
    def ended(self) -> bool:
        return not self._pipe.open

    @property
    def stopped(self) -> bool:
        """Whether it stands still, or what it is a fork of and would tell of its end."""
        return self._forks.stopped or (self._itself is not None and self._itself.stopped)

    def tell(self, body: dict[str, Any]) -> None:
        self._pipe.write(encode(body))

    def signal(self, number: int) -> None:
        if self._itself is not None:
            self._itself.signal(number)

    def describe(self) -> str:
        """What became of it, for an error message."""
        if self._itself is None:
            self._forks.wait(_END)
            return self._forks.describe()
        return f"coordinator: process {self.pid} {'has ended' if self._code is None else fate_of(self._code)}"

    def close(self) -> None:
        """End it at once, whatever it does."""
        self.signal(signal.SIGKILL)
        self._pipe.close()
        if self._itself is not None:
            self._itself.wait(_END)
            self._itself.close()
        self._itself = None

    def _received(self, data: bytes) -> None:
        for message in self._decoder.feed(data):
            match message.body:
                case {"type": "started", "pid": pid}:
                    with contextlib.suppress(OSError):  # it has ended already
                        self._itself = Relative("coordinator", pid)
                case {"type": "ended", "code": code}:
                    self._code = code
                case {"type": "failed", "kind": kind, "message": text}:
                    self.failure = {"ValueError": ValueError, "OSError": OSError}.get(kind, RuntimeError)(text)
                case _:
                    self._obey(message)


class Keeper:
    """Belongs to the running event loop."""

    def __init__(self, options: Options, say: Callable[[str], None]) -> None:
        self._options, self._say = options, say
        self._launcher: Launcher | None = None
        self._gateway: Gateway | None = None
        self._forks: Child | None = None  # what coordinators are forks of
        self._process: Process | None = None  # the coordinator
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
        if (process := self._process) is not None:
            process.signal(signal.SIGTERM)
            deadline = time.monotonic() + self._options.grace + _PATIENCE
            while not process.ended and time.monotonic() < deadline:
                if self._stop.is_set():  # again: at once
                    self._stop.clear()
                    process.signal(signal.SIGTERM)
                await asyncio.sleep(0.02)
            process.close()
        self._end_forks()
        if self._gateway is not None:
            await self._gateway.close()  # after what came through it has been answered
        if self._launcher is not None:
            await self._launcher.close()

    # The coordinator

    def _start(self) -> None:
        if self._stopping:
            return
        if self._forks is None or self._forks.ended or self._forks.stopped:
            self._load()
        assert self._forks is not None
        self._running_at = time.monotonic()
        self._process = Process(self._forks, self._options, self._obey, self._gone)

    def _load(self) -> None:
        """Have a process that coordinators can be forks of. It needs one core's arithmetic, not a thread for each."""
        self._end_forks()
        environ = {"OPENBLAS_NUM_THREADS": "1", **with_packages(os.environ)}
        self._forks = Child("coordinator", "serving.coordinator_process", ["{fd}"], environ, log=2)

    def _end_forks(self) -> None:
        if self._forks is not None:
            self._forks.kill()
            self._forks.wait(_END)
            self._forks.close()
        self._forks = None

    def _obey(self, message: Message) -> None:
        match message.body:
            case {"type": "listening", "address": address}:
                self._failures, self._listened = 0, True
                self._options = replace(self._options, address=address)  # the next one's, too
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

    def _gone(self) -> None:
        process, self._process = self._process, None
        if self._stopping or process is None:
            return
        what, said = process.describe(), process.failure
        process.close()
        self._failures += 1
        final = not self._listened and said is not None  # what was wrong at the start stays so
        if final or self._failures > _ATTEMPTS or not self._options.restart:
            if not self.failure.done():
                self.failure.set_exception(said or RuntimeError(what))
            return
        log.warning("%s: another one is started", said or what)
        delay = 0.0 if self._failures == 1 else min(_BACKOFF[0] * 2**self._failures, _BACKOFF[1])
        asyncio.get_running_loop().call_later(delay, self._start)

    async def _look(self) -> None:
        """One that is stopped for long is as good as dead, but holds on to the journal and the address. And there is
        always something to make the next one of."""
        while True:
            await asyncio.sleep(_LOOK)
            now, process = time.monotonic(), self._process
            if process is None or not process.stopped or now - self._looked > _STOOD_STILL:
                self._running_at = now
            elif now - self._running_at > _STOPPED:
                self._kill(process)
            if self._forks is not None and self._forks.ended and self._options.restart:
                self._load()
            self._looked = now

    def _kill(self, process: Process) -> None:
        """It, or what it is a fork of, whichever stands still; its end is seen then."""
        if self._forks is not None and self._forks.stopped:
            self._forks.kill()
        else:
            process.signal(signal.SIGKILL)

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
