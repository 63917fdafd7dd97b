"""`ClusterBackend`: what `LLM` uses with several hosts. Coordinator and workers of this machine, driven from a script.

The coordinator runs in a thread of its own with an event loop; it holds no device, and neither does this process for
it. A script that does not poll, or computes for minutes, is none of the cluster's business. Lost workers are started
again and requests go on; only what cannot go on is an error, and then nothing runs any more.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import os
import queue
import threading
import time
import warnings
import weakref
from collections.abc import Callable, Coroutine, Sequence
from pathlib import Path
from typing import Any, TypeVar

import jax
import numpy as np

from moe_jax.checkpoint import CheckpointError
from moe_jax.config import ConfigError
from moe_jax.request import Request, TokenEvent
from serving.cluster import Cluster, make_cluster
from serving.coordinator import Coordinator, Watcher
from serving.environment import Platform, compilation_cache, engine_environment, guess_platform, host_labels
from serving.epoch import Epoch
from serving.launcher import Launcher
from serving.ledger import Entry
from serving.rebalancing import Policy
from serving.recycling import recycle
from serving.worker import DISMISSED

_T = TypeVar("_T")
_ATTEMPTS = 2  # ends of a rank's worker before all have served; the others would go on without it
_LOOK = 0.25  # seconds between two looks at whether it is still worth waiting
_CLOSE = 15.0  # seconds


class ClusterBackend:
    """`hosts` × `ranks_per_host` workers. One thread at a time may use it, any thread may build it.

    Options beside those of EngineConfig: startup_timeout and stall_timeout, seconds that starting may take and that
    work may stand still; heartbeat_timeout and window, seconds as in membership.Rules; restart, whether lost workers
    are started again; rebalance_above, as in rebalancing.Policy; cache_dir, where compiled programs are kept.
    Failing to start is a CheckpointError, a ConfigError, or a RuntimeError that names the rank and quotes its log.
    """

    def __init__(self, path: Path, hosts: int, ranks_per_host: int, load_format: Any, options: dict[str, Any]) -> None:
        options = dict(options)
        startup = _seconds("startup_timeout", options.pop("startup_timeout", None), 300.0)
        self._stall = _seconds("stall_timeout", options.pop("stall_timeout", None), 120.0)
        self._startup = startup
        times = {
            "heartbeat_timeout_s": _seconds("heartbeat_timeout", options.pop("heartbeat_timeout", None), 1.0),
            "window_s": _seconds("window", options.pop("window", None), 0.02),
        }
        restart = options.pop("restart", None) is not False
        above = options.pop("rebalance_above", None)
        cache_dir = options.pop("cache_dir", None)
        labels = host_labels(hosts, ranks_per_host)
        platform = guess_platform(jax.config.jax_platforms)  # type: ignore[attr-defined]
        cache = _directory(compilation_cache(platform, cache_dir, os.environ))
        cluster, self.model, self.config = make_cluster(
            path,
            labels,
            platform,
            load_format,
            cache,
            startup,
            times,
            Policy.above if above is None else above,
            **options,
        )
        for rank in range(len(labels)):
            engine_environment(rank, platform, os.environ)  # raises for what every worker would raise
        self._setup(cluster, platform, restart)

    def _setup(self, cluster: Cluster, platform: Platform, restart: bool) -> None:
        """Start, and wait until requests are served."""
        self._requests: dict[str, Entry] = {}
        self._moved = self._looked = time.monotonic()
        self._running = _Running(cluster, platform, restart)
        # Ends the processes when this object is collected or the interpreter exits, but not in a fork of it.
        self._finalizer = weakref.finalize(self, self._running.close, os.getpid())
        try:
            self._running.wait_until_serving(self._startup)
        except BaseException:
            self.close()
            raise

    # Backend

    def submit(self, request: Request) -> None:
        """Raises ValueError for what can never be served, QueueFull for what cannot be now."""
        self._check_open()
        if request.request_id in self._requests:
            raise ValueError(f"request_id: found {request.request_id!r}, which is being served, expected a new one")
        if not self._requests:
            self._moved = time.monotonic()
        running = self._running
        self._requests[request.request_id] = running.call(
            lambda: running.coordinator.submit(request, running.events.put, wait=True)
        )

    def cancel(self, request_id: str) -> None:
        entry = self._requests.pop(request_id, None)
        if entry is not None and self._finalizer.alive and self._running.failure is None:
            self._running.call(lambda: self._running.coordinator.cancel(entry))

    def poll(self, timeout: float | None) -> list[TokenEvent]:
        """New tokens; blocks until there are some, at most `timeout` seconds, and not when nothing is being served."""
        self._check_open()
        deadline = None if timeout is None else time.monotonic() + timeout
        events = self._received(0.0)
        while not events and self._requests:
            left = _LOOK if deadline is None else min(_LOOK, deadline - time.monotonic())
            if left <= 0:
                break
            events = self._received(left)
            self._check_open()
            self._check_progress()
        return events

    def score(self, token_ids: Sequence[int], chunk: int | None) -> np.ndarray:
        self._check_open()
        self._moved = time.monotonic()
        scored = self._running.begin(self._running.coordinator.score(token_ids, chunk))
        while True:
            try:
                return scored.result(_LOOK)
            except concurrent.futures.TimeoutError:
                self._check_open()
                self._check_progress()

    def close(self) -> None:
        """End all processes, within seconds. May be called twice."""
        self._finalizer()
        self._requests.clear()

    def _received(self, timeout: float) -> list[TokenEvent]:
        """What has arrived of the requests that are still wanted, waiting for the first."""
        events: list[TokenEvent] = []
        try:
            event = self._running.events.get(timeout > 0, timeout or None)
            while True:
                if event is not None and event.request_id in self._requests:
                    events.append(event)
                    if event.finish_reason is not None:
                        del self._requests[event.request_id]
                event = self._running.events.get_nowait()
        except queue.Empty:
            pass
        if events:
            self._moved = time.monotonic()
        return events

    def _check_open(self) -> None:
        if self._running.failure is not None:
            self.close()
            raise self._running.failure
        if not self._finalizer.alive:
            raise RuntimeError("this LLM is closed")

    def _check_progress(self) -> None:
        """Raises RuntimeError when work has stood still for too long."""
        now = time.monotonic()
        if now - self._looked > 1 + _LOOK:
            self._moved = now  # this process stood still itself, or was busy, and can judge nobody
        self._looked = now
        state = self.cluster_state
        allowed = self._stall + (self._startup if state[0] in ("STARTING", "RECOVERING") else 0.0)
        if now - self._moved > allowed:
            reason = f" ({state[1]})" if state[1] else ""
            self._running.failure = RuntimeError(
                f"no step was done for {allowed:g} s while work is waiting; the cluster is {state[0]}{reason}"
            )
            self._check_open()

    # For tests and tools

    @property
    def cluster_state(self) -> tuple[str, str]:
        """(state, reason) as in `status`."""
        return self._running.state

    def status(self) -> dict[str, Any]:
        """As `moe-jax status --json` prints it."""
        self._check_open()
        return self._running.call(self._running.coordinator.status)

    def engines(self) -> list[dict[str, Any]]:
        """What each engine of the mesh says of itself now: compilations, steps, level, bells, whether it is parked."""
        self._check_open()
        answers = self._running.begin(self._running.coordinator.ask({"type": "status"})).result()
        return [answers[rank] for rank in sorted(answers)]

    def compilations(self) -> list[int]:
        """Programs that each rank has compiled or loaded from the cache so far."""
        return [answer["compilations"] for answer in self.engines()]

    @property
    def pids(self) -> list[int | None]:
        """Of the engine processes, by rank."""
        return [rank["pid"] for rank in self.status()["ranks"]]

    @property
    def launcher(self) -> Launcher:
        """Its methods belong into `call`."""
        return self._running.launcher

    def call(self, function: Callable[[], _T]) -> _T:
        """Run it where coordinator and launcher live."""
        self._check_open()
        return self._running.call(function)


class _Running:
    """The event loop's thread and what lives in it, apart from ClusterBackend so that a finalizer can hold it."""

    def __init__(self, cluster: Cluster, platform: Platform, restart: bool) -> None:
        self.events: queue.SimpleQueue[TokenEvent | None] = queue.SimpleQueue()  # None: to wake who waits
        self.failure: Exception | None = None
        self.state = ("STARTING", "")
        self._cluster, self._restart = cluster, restart
        self._platform: Platform = platform
        self._served = threading.Event()  # by all ranks together; or failed
        self._ends: dict[int, int] = {}  # of each rank's worker before that
        self._said: dict[int, str] = {}  # by its engine, the last time
        self._recycling: asyncio.Task[None] | None = None
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._run, name="coordinator", daemon=True)
        self._thread.start()
        try:
            self.begin(self._start()).result()
        except BaseException:
            self.close(os.getpid())
            raise

    def call(self, function: Callable[[], _T]) -> _T:
        async def run() -> _T:
            return function()

        return self.begin(run()).result()

    def begin(self, coroutine: Coroutine[Any, Any, _T]) -> concurrent.futures.Future[_T]:
        return asyncio.run_coroutine_threadsafe(coroutine, self._loop)

    def wait_until_serving(self, timeout: float) -> None:
        if not self._served.wait(timeout):
            ranks = self.call(self.coordinator.status)["ranks"]
            logs = {r["rank"]: self.launcher.log_tail(r["rank"]) for r in ranks if r["state"] != "live"}
            tails = "".join(f"\nthe end of the log of rank {rank}:\n{tail}" for rank, tail in logs.items() if tail)
            raise RuntimeError(f"start: not done after {timeout:g} s; {self.state[0]} {self.state[1]}{tails}")
        if self.failure is not None:
            raise self.failure

    def close(self, owner: int) -> None:
        """End everything, in the process `owner` that started it."""
        if os.getpid() != owner or not self._thread.is_alive():
            return
        try:
            self.begin(self._stop()).result(_CLOSE)
        except concurrent.futures.TimeoutError:
            warnings.warn("LLM: the cluster's processes did not end in time", stacklevel=2)
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(_CLOSE)

    # In the loop

    def _run(self) -> None:
        asyncio.set_event_loop(self._loop)
        self._loop.run_forever()
        self._loop.close()

    async def _start(self) -> None:
        cluster = self._cluster
        watcher = Watcher(
            engine_failed=self._engine_failed, changed=self._changed, served=self._epoch_served, failed=self._fail
        )
        self.coordinator = Coordinator(cluster, watcher=watcher)
        address = await self.coordinator.start()
        self.launcher = Launcher(
            address,
            cluster.rules.hosts,
            self._platform,
            restart=self._restart,
            environ=cluster.environ,
            engine=cluster.engine,
            ended=self._worker_ended,
        )
        watcher.dismissed, watcher.drained = self.launcher.dismissed, self.launcher.hold
        self.launcher.start()
        if self._restart:
            self._recycling = self._loop.create_task(recycle(self.coordinator))

    async def _stop(self) -> None:
        if self._recycling is not None:
            self._recycling.cancel()
        if hasattr(self, "coordinator"):
            await self.coordinator.close()
        if hasattr(self, "launcher"):
            await self.launcher.close()

    def _changed(self, state: str, reason: str) -> None:
        self.state = state, reason

    def _epoch_served(self, epoch: Epoch) -> None:
        if len(epoch.order) == len(self._cluster.rules.hosts):
            self._served.set()

    def _engine_failed(self, rank: int, kind: str, text: str) -> None:
        self._said[rank] = text
        errors = {"CheckpointError": CheckpointError, "ConfigError": ConfigError}
        if kind in errors and not self._served.is_set():
            self._fail(errors[kind](f"rank {rank}: {text}"))

    def _worker_ended(self, rank: int, code: int | None, what: str) -> None:
        if self._served.is_set() or code == DISMISSED:
            return
        self._ends[rank] = self._ends.get(rank, 0) + 1
        if self._ends[rank] >= _ATTEMPTS or not self._restart:
            self._fail(RuntimeError(self._said.get(rank, what)))

    def _fail(self, error: Exception) -> None:
        if self.failure is None:
            self.failure = error
        self._served.set()
        self.events.put(None)


def _directory(path: Path) -> Path | None:
    """The directory, made if need be; None if it cannot be written."""
    try:
        path.mkdir(parents=True, exist_ok=True)
        if not os.access(path, os.W_OK):
            raise PermissionError(13, "not writable")
    except OSError as e:
        warnings.warn(f"{path}: compiled programs cannot be kept there ({e.strerror})", stacklevel=4)
        return None
    return path


def _seconds(name: str, value: Any, default: float) -> float:
    if value is None:
        return default
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not value > 0:
        raise ConfigError(f"{name}: found {value!r}, expected seconds above 0")
    return float(value)
