"""The workers of one machine: started, started again when they end, and ended with whoever started them.

It knows processes, not membership: what a worker is worth is for the coordinator to say.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from serving.access import TOKEN_VARIABLE
from serving.child import Child
from serving.environment import Platform, sharing_cores, with_packages
from serving.pipe import Pipe
from serving.tls import Tls

# Seconds until a worker is started again: the first time, and at most. The first second of a loss is the survivors': on
# a machine with few cores, starting Python beside them would double the pause.
_BACKOFF = (1.0, 5.0)
_SETTLED = 10.0  # seconds of life after which an end counts as the first one again
_LOOK = 0.25  # seconds between two looks at those whose end nobody told
_PATIENCE = 2.0  # seconds from asking to killing


@dataclass
class Worker:
    rank: int
    host: str
    child: Child | None = None
    pipe: Pipe | None = None
    begun: float = 0.0
    failures: int = 0  # ends in a row, each soon after a start
    restart: asyncio.TimerHandle | None = None


class Launcher:
    """Belongs to the running event loop. Ranks of one label are one host: `kill_host` ends them together."""

    def __init__(
        self,
        coordinator: str,
        hosts: Sequence[str],
        platform: Platform,
        *,
        restart: bool = True,
        environ: Mapping[str, str] = os.environ,
        log_dir: Path | None = None,
        engine: str = "serving.engine_process",
        ended: Callable[[int, int | None, str], None] = lambda rank, code, what: None,
        tls: Tls | None = None,
        token: str | None = None,
    ) -> None:
        """hosts: the label of each rank. log_dir: where each rank's log goes, rank0.log and so on; none are kept
        without. engine: the engine's module. ended: called with (rank, exit code, what became of its worker). tls,
        token: what the workers show to the coordinator.
        """
        self._coordinator, self._platform, self._engine = coordinator, platform, engine
        self._environ = sharing_cores(len(hosts), platform, with_packages(environ))
        self._log_dir, self._ended, self._restart = log_dir, ended, restart
        self._tls = tls
        if token is not None:
            self._environ = {**self._environ, TOKEN_VARIABLE: token}  # command lines are anybody's to read
        self._workers = [Worker(rank, host) for rank, host in enumerate(hosts)]
        self._held: set[str] = set()
        self._looking: asyncio.Task[None] | None = None
        self._closed = False

    def start(self, ranks: Sequence[int] | None = None) -> None:
        """Start the workers of `ranks`, by default of all, that are not running."""
        if self._looking is None:
            self._looking = asyncio.get_running_loop().create_task(self._look())
        for worker in self._workers if ranks is None else [self._workers[r] for r in ranks]:
            self._held.discard(worker.host)
            if worker.child is None:
                self._spawn(worker)

    @property
    def pids(self) -> dict[int, int]:
        """Of the supervisors that run, by rank; each leads a process group that its engine belongs to."""
        return {w.rank: w.child.pid for w in self._workers if w.child is not None}

    def log_tail(self, rank: int) -> str:
        """The last lines of a running worker's log."""
        child = self._workers[rank].child
        return "" if child is None else child.log_tail()

    def kill(self, rank: int) -> None:
        """SIGKILL to a rank's supervisor and engine at once."""
        child = self._workers[rank].child
        if child is not None:
            child.kill()

    def kill_host(self, host: str) -> None:
        for worker in self._workers:
            if worker.host == host:
                self.kill(worker.rank)

    def hold(self, host: str) -> None:
        """Do not start this host's workers again, until `release`: it was drained."""
        self._held.add(host)
        for worker in self._workers:
            if worker.host == host and worker.restart is not None:
                worker.restart.cancel()

    def release(self, host: str) -> None:
        """Start what is not running of a host that was held."""
        self.hold(host)  # nothing is about to be started
        self.start([worker.rank for worker in self._workers if worker.host == host])

    def retire(self) -> None:
        """Whatever ends from now on is not started again: `close` follows."""
        self._restart = False

    def dismissed(self, rank: int, pid: int) -> None:
        """The coordinator has told this supervisor to exit. One that does not hear it, because it is stopped, is
        killed after a while, since nothing else would bring the rank back; not without restarts."""
        if self._restart and not self._closed:
            loop = asyncio.get_running_loop()
            loop.call_later(_PATIENCE, lambda: self.pids.get(rank) == pid and self.kill(rank))

    async def close(self) -> None:
        """End all, within seconds."""
        self._closed = True
        if self._looking is not None:
            self._looking.cancel()
        children = [w.child for w in self._workers if w.child is not None]
        for worker in self._workers:
            if worker.restart is not None:
                worker.restart.cancel()
            if worker.pipe is not None:
                worker.pipe.close()  # a worker exits when it sees that
        deadline = time.monotonic() + _PATIENCE
        while time.monotonic() < deadline and not all(child.ended for child in children):
            await asyncio.sleep(0.01)
        for child in children:
            _sweep(child)

    # One worker

    def _spawn(self, worker: Worker) -> None:
        worker.restart, worker.begun = None, time.monotonic()
        arguments = ["--coordinator", self._coordinator, "--rank", str(worker.rank), "--host", worker.host]
        arguments += ["--platform", self._platform, "--engine", self._engine, "--parent", "{fd}"]
        if self._tls is not None:
            files = {"--tls-ca": self._tls.ca, "--tls-cert": self._tls.cert, "--tls-key": self._tls.key}
            arguments += [word for name, file in files.items() if file is not None for word in (name, str(file))]
        log = None if self._log_dir is None else self._log_dir / f"rank{worker.rank}.log"
        child = Child(f"rank {worker.rank}", "serving.worker", arguments, self._environ, log=log)
        worker.child = child
        worker.pipe = Pipe(child.channel.fileno(), lambda data: None, lambda: self._gone(worker, child))
        child.channel.close()  # the pipe has it now

    def _gone(self, worker: Worker, child: Child) -> None:
        if worker.child is not child or self._closed:
            return
        if worker.pipe is not None:
            worker.pipe.close()
        with contextlib.suppress(Exception):
            child.process.wait(0.02)  # for its exit code
        what = child.describe()
        _sweep(child)
        worker.child = worker.pipe = None
        worker.failures = worker.failures + 1 if time.monotonic() - worker.begun < _SETTLED else 1
        if self._restart and worker.host not in self._held:
            delay = min(_BACKOFF[0] * 2 ** (worker.failures - 1), _BACKOFF[1])
            worker.restart = asyncio.get_running_loop().call_later(delay, self._spawn, worker)
        self._ended(worker.rank, child.process.returncode, what)

    async def _look(self) -> None:
        """A fork of somebody may hold a dead worker's socket open."""
        while True:
            await asyncio.sleep(_LOOK)
            for worker in self._workers:
                if worker.child is not None and worker.child.ended:
                    self._gone(worker, worker.child)


def _sweep(child: Child) -> None:
    """End what is left of a worker, its engine above all, which may be stopped and see nothing."""
    child.kill()
    with contextlib.suppress(Exception):
        child.process.wait(5.0)
    child.close()
