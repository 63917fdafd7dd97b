"""How long the coordinator takes over many losses at once: simulated workers, real gRPC streams, no JAX.

    python scripts/bench_coordinator.py [--workers 1000 --lose 50 --rounds 5] [--json]

The coordinator is the real one, with its journal on disk; the JAX service that it fences through is the tests' fake,
which answers at once. In each round the process that holds the workers to be lost is killed (SIGKILL), and started
again once the others serve. Everything shares this machine's processors.

    detected    from the kill until the last of the lost was noticed and its fence asked for
    committed   until the epoch without any of them was on disk
    serving     until all others had entered it
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from _cluster import machine

from moe_jax import placement
from moe_jax.scheduler import Limits
from serving.cluster import Cluster, Repairs
from serving.coordinator import Coordinator, Watcher
from serving.epoch import Slots
from serving.journal import Journal
from serving.membership import Rules

WORKERS = Path(__file__).with_name("_simulated_workers.py")


def make_cluster(workers: int, layers: int, experts: int) -> Cluster:
    hosts = tuple(f"host{rank:04}" for rank in range(workers))
    slots = -(-2 * experts // workers)
    planned = placement.plan(layers, experts, hosts, slots, 2)

    def plan(ranks: Any) -> Slots | None:
        return planned if len(ranks) == workers else None

    repairs = Repairs(hosts, experts)
    rules = Rules(workers, hosts, plan, repairs, lambda held, ranks: held, orders="sorted", start_grace_s=120.0)
    limits = Limits(page_size=16, num_pages=1 << 12, max_batch=16, max_prefill_rows=16, max_model_len=1 << 14)
    start = {"config": {}, "path": "", "load_format": "auto", "cache": None, "timeout": 60}
    return Cluster(rules, limits, experts, start, repairs, service="tests.serving.fake_service")


class Losses:
    """A coordinator and its workers, of which the last `lose` are in a process that is killed."""

    def __init__(self, workers: int, lose: int, layers: int, experts: int, journal: Path) -> None:
        self.workers, self.lose = workers, lose
        self.epochs: list[tuple[float, frozenset[int]]] = []  # when all its members had entered it, and these
        self.cluster = make_cluster(workers, layers, experts)
        watcher = Watcher(served=lambda epoch: self.epochs.append((time.monotonic(), frozenset(epoch.order))))
        self.coordinator = Coordinator(self.cluster, Journal(journal), watcher)
        self._children: list[subprocess.Popen[bytes]] = []

    async def start(self) -> float:
        """Seconds until all serve."""
        begun = time.monotonic()
        self.address = await self.coordinator.start()
        self._start(0, self.workers - self.lose)
        self._victims = self._start(self.workers - self.lose, self.lose)
        await self._until(lambda: self._serving == self.workers, 180.0)
        return time.monotonic() - begun

    async def round(self) -> dict[str, Any]:
        await asyncio.sleep(1.5)  # for what is worked out ahead
        known = len(self.epochs)
        killed = time.monotonic()
        self._victims.send_signal(signal.SIGKILL)
        left = self.workers - self.lose
        await self._until(lambda: len(self.epochs) > known and self._serving == left, 60.0)
        self._victims.wait()
        made = [r for r in self.coordinator.recoveries if r.began > killed]
        lost = [rank for r in made for rank in r.lost]
        assert sorted(lost) == list(range(left, self.workers)), lost
        found = {
            "detected": max(r.fenced or r.began for r in made) - killed,
            "committed": (made[-1].committed or 0) - killed,
            "serving": self.epochs[-1][0] - killed,
        }
        self._victims = self._start(left, self.lose)
        await self._until(lambda: self._serving == self.workers, 120.0)
        return {name: round(1e3 * seconds, 1) for name, seconds in found.items()} | {"epochs": len(made)}

    @property
    def _serving(self) -> int:
        return len(self.epochs[-1][1]) if self.epochs else 0

    async def _until(self, done: Callable[[], bool], seconds: float) -> None:
        async with asyncio.timeout(seconds):
            while not done():
                await asyncio.sleep(0.01)

    def _start(self, first: int, count: int) -> subprocess.Popen[bytes]:
        paths = os.pathsep.join([str(WORKERS.parents[1]), os.environ.get("PYTHONPATH", "")])
        command = [sys.executable, str(WORKERS), self.address, str(first), str(count)]
        self._children.append(subprocess.Popen(command, env={**os.environ, "PYTHONPATH": paths}))
        return self._children[-1]

    async def close(self) -> None:
        for child in self._children:
            if child.poll() is None:
                child.kill()
                child.wait()
        await self.coordinator.close()


async def measure(workers: int, lose: int, rounds: int, layers: int, experts: int) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as directory:
        losses = Losses(workers, lose, layers, experts, Path(directory) / "journal.sqlite")
        try:
            started = await losses.start()
            found = [await losses.round() for _ in range(rounds)]
        finally:
            await losses.close()
    return {"workers": workers, "lost": lose, "start_s": round(started, 2), "rounds": found}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workers", type=int, default=1000)
    parser.add_argument("--lose", type=int, default=50)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--layers", type=int, default=58)
    parser.add_argument("--experts", type=int, default=256)
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    result = asyncio.run(measure(args.workers, args.lose, args.rounds, args.layers, args.experts))
    if args.json:
        print(json.dumps(machine() | result))
        return
    print(f"{machine()}\n{args.workers} workers serve {result['start_s']} s after the first was started")
    for name in ("detected", "committed", "serving"):
        times = [found[name] for found in result["rounds"]]
        print(f"{args.lose} lost, {name}: median {statistics.median(times):.0f} ms, worst {max(times):.0f} ms")
    print(f"epochs in each round: {[found['epochs'] for found in result['rounds']]}")


if __name__ == "__main__":
    main()
