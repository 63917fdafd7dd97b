"""A cluster of real processes on this machine that computes nothing: fake engines, a fake JAX service."""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from moe_jax import placement
from moe_jax.request import Request, SamplingParams, TokenEvent
from moe_jax.scheduler import Limits
from serving.cluster import Cluster, Repairs, keep_in_place
from serving.coordinator import Coordinator, Watcher
from serving.environment import Platform
from serving.journal import Journal
from serving.launcher import Launcher
from serving.ledger import Entry
from serving.membership import Rules
from serving.rebalancing import Policy
from tests.serving.fake_engine import tokens

LAYERS, EXPERTS = 2, 8
FAST: dict[str, float] = {"heartbeat_timeout_s": 0.6, "start_grace_s": 10.0, "restart_grace_s": 1.0}


def fake_cluster(
    hosts: Sequence[str],
    slots: int = 4,
    replication: int = 2,
    fake: dict[str, Any] | None = None,
    policy: Policy | None = None,
    **times: float,
) -> Cluster:
    def plan(ranks: Sequence[int]) -> np.ndarray | None:
        placed = np.full((LAYERS, len(hosts), slots), -1, np.int32)
        labels = [hosts[r] for r in ranks]
        for r in range(min(replication, len(set(labels))), 0, -1):
            try:
                placed[:, list(ranks)] = placement.plan(LAYERS, EXPERTS, labels, slots, r)
                return placed
            except ValueError:
                pass
        return None

    def rebalance(held: np.ndarray, ranks: Sequence[int], load: np.ndarray | None, within: float) -> np.ndarray:
        if load is not None:
            return placement.rebalance(held, ranks, hosts, EXPERTS, replication, load, within)
        wanted = plan(ranks)
        return held if wanted is None else keep_in_place(held, wanted)

    repairs = Repairs(hosts, EXPERTS)
    rules = Rules(
        len(hosts),
        tuple(hosts),
        plan,
        repairs,
        lambda held, ranks: placement.restore(held, ranks, hosts, EXPERTS, replication),
        lambda held, goal: placement.part(held, goal, 1),
        **{**FAST, **times},  # type: ignore[arg-type]
    )
    start = {"config": {"fake": fake or {}}, "path": "", "load_format": "auto", "cache": None, "timeout": 60}
    limits = Limits(page_size=16, num_pages=1 << 12, max_batch=16, max_prefill_rows=16, max_model_len=1 << 14)
    service, engine = "tests.serving.fake_service", "tests.serving.fake_engine"
    return Cluster(rules, limits, EXPERTS, start, repairs, rebalance, policy or Policy(), service, engine)


class Running:
    """`async with Running(cluster) as r`: started, and ended with everything it started."""

    def __init__(
        self,
        cluster: Cluster,
        restart: bool = True,
        ranks: Sequence[int] | None = None,
        journal: Journal | None = None,
        platform: Platform = "cpu",
    ) -> None:
        """platform: what workers take the fake engines' to be."""
        self.cluster, self._restart, self._ranks, self._journal = cluster, restart, ranks, journal
        self._platform: Platform = platform
        self.streams: dict[str, list[TokenEvent]] = {}
        self.entries: dict[str, Entry] = {}
        self.ended: list[tuple[int, int | None]] = []  # (rank, exit code) of workers
        self.states: list[str] = []

    async def __aenter__(self) -> Running:
        watcher = Watcher(changed=lambda state, reason: self.states.append(state))
        self.coordinator = Coordinator(self.cluster, self._journal, watcher)
        address = await self.coordinator.start()
        self.launcher = Launcher(
            address,
            self.cluster.rules.hosts,
            self._platform,
            restart=self._restart,
            engine=self.cluster.engine,
            ended=lambda rank, code, what: self.ended.append((rank, code)),
        )
        watcher.dismissed, watcher.drained = self.launcher.dismissed, self.launcher.hold
        watcher.wanted = self.launcher.release
        self.launcher.start(self._ranks)
        await self.serving(self._ranks)
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.coordinator.close()
        await self.launcher.close()

    # Looking

    def status(self) -> dict[str, Any]:
        return self.coordinator.status()

    def live(self) -> list[int]:
        return [r["rank"] for r in self.status()["ranks"] if r["state"] == "live"]

    def engine(self, rank: int) -> int:
        return self.status()["ranks"][rank]["pid"]

    def supervisor(self, rank: int) -> int:
        return self.launcher.pids[rank]

    async def until(self, done: Callable[[], bool], seconds: float = 15.0) -> None:
        deadline = time.monotonic() + seconds
        while not done():
            assert time.monotonic() < deadline, self.status()
            await asyncio.sleep(0.005)

    async def serving(self, ranks: Sequence[int] | None = None, after: int = 0) -> None:
        """Until these ranks, by default all, serve in an epoch later than `after`, and none is awaited."""
        expected = list(range(len(self.cluster.rules.hosts)) if ranks is None else ranks)

        def done() -> bool:
            status = self.status()
            return status["state"] == "SERVING" and self.live() == expected and status["epoch"] > after

        await self.until(done)

    # Requests

    def submit(self, count: int, length: int) -> None:
        """Streams whose tokens `finish` knows."""
        for _ in range(count):
            seed = len(self.streams)
            events: list[Any] = []
            params = SamplingParams(max_tokens=length, seed=seed, ignore_eos=True)
            self.entries[f"r{seed}"] = self.coordinator.submit(Request(f"r{seed}", [1, 2, 3], params), events.append)
            self.streams[f"r{seed}"] = events

    async def flowing(self, more: int = 5) -> None:
        """Until every stream that is here now and has not ended has so many tokens more."""
        wanted = [(events, len(events) + more) for events in self.streams.values()]
        await self.until(
            lambda: all(len(events) >= n or (events and events[-1].finish_reason is not None) for events, n in wanted)
        )

    async def finish(self) -> None:
        """Until all have ended. Every stream has exactly the tokens that it would have had alone, in order, once."""
        await self.until(lambda: all(s and s[-1].finish_reason is not None for s in self.streams.values()), 60.0)
        for name, events in self.streams.items():
            length = self.entries[name].asked.params.max_tokens
            assert [e.index for e in events] == list(range(length))
            assert [e.token for e in events] == tokens(int(name[1:]), length)
        counts = self.status()["requests"]
        assert counts["gaps"] == 0 and counts["open"] == 0 and counts["waiting"] == 0


def kill(pid: int, number: int) -> float:
    """The signal, and when it was sent."""
    os.kill(pid, number)
    return time.monotonic()
