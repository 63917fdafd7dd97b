"""How long placing experts takes and how even it comes out, beside a placement in the way of EPLB.

    python scripts/bench_placement.py [--rounds 7]

Loads are drawn from a seed. Times are CPU time and wall time of one call, the best and the median of the rounds; other
work on the machine shows in the wall time. Balancedness is mean over most loaded rank, averaged over layers; 1 is
perfect. The bound is what no placement with the promise can exceed: a replica of the hottest expert, which can be split
only over the slots that the promise leaves, sits on some rank.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from moe_jax import placement

LOADS = ("equal", "uniform", "zipf", "lognormal")


def make_load(kind: str, num_layers: int, num_experts: int, seed: int = 0) -> np.ndarray:
    """Load [layers, experts], every layer drawn or shuffled on its own. kind: one of LOADS."""
    random, shape = np.random.default_rng(seed), (num_layers, num_experts)
    match kind:
        case "equal":
            return np.ones(shape)
        case "uniform":
            return random.random(shape)
        case "zipf":
            return random.permuted(np.tile(1 / np.arange(1, num_experts + 1), (num_layers, 1)), axis=1)
        case "lognormal":
            return random.lognormal(size=shape)
    raise ValueError(f"load: found {kind!r}, expected one of {LOADS}")


def eplb(load: np.ndarray, ranks: int, slots: int) -> np.ndarray:
    """A placement [layers, ranks, slots] by the idea of DeepSeek's EPLB (github.com/deepseek-ai/EPLB), without groups.

    Every expert has one replica; each further slot goes to the expert whose replicas carry the most. Replicas then go,
    the heaviest first, to the rank with the least load that still has a slot. Nothing keeps replicas of one expert
    apart. load [layers, experts].
    """
    num_layers, num_experts = load.shape
    layers = np.arange(num_layers)
    count = np.ones(load.shape)
    replica = np.tile(np.arange(num_experts), (num_layers, 1))
    for _ in range(ranks * slots - num_experts):
        expert = (load / count).argmax(1)
        count[layers, expert] += 1
        replica = np.column_stack([replica, expert])
    weight = np.take_along_axis(load / count, replica, 1)
    placed = np.full((num_layers, ranks, slots), -1, np.int32)
    total, filled = np.zeros((num_layers, ranks)), np.zeros((num_layers, ranks), np.int64)
    for i in np.argsort(-weight, axis=1, kind="stable").T:
        rank = np.where(filled < slots, total, np.inf).argmin(1)
        placed[layers, rank, filled[layers, rank]] = replica[layers, i]
        total[layers, rank] += weight[layers, i]
        filled[layers, rank] += 1
    return placed


def bound(load: np.ndarray, ranks: int, slots: int, replication: int) -> float:
    """What balancedness cannot exceed, averaged over layers."""
    layers, count = np.arange(len(load)), np.full(load.shape, replication)
    for _ in range(ranks * slots - load.shape[1] * replication):
        count[layers, (load / count).argmax(1)] += 1
    return float(np.minimum(1, load.sum(1) / ranks / (load / count).max(1)).mean())


def measure(rounds: int, call: Callable[[], Any]) -> tuple[Any, str, str]:
    """The result, and best / median milliseconds of CPU and of wall time."""
    result, cpu, wall = None, [], []
    for _ in range(rounds):
        start = time.process_time(), time.perf_counter()
        result = call()
        cpu.append((time.process_time() - start[0]) * 1e3)
        wall.append((time.perf_counter() - start[1]) * 1e3)
    return result, *(f"{min(t):.1f} / {statistics.median(t):.1f}" for t in (cpu, wall))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7)
    rounds = parser.parse_args().rounds
    table = Table(title="Placement")
    for name in ("layers x experts x ranks", "slots", "r", "load", "call"):
        table.add_column(name, no_wrap=True)
    for name in ("CPU ms", "wall ms", "balancedness", "EPLB", "bound"):
        table.add_column(name, justify="right", no_wrap=True)

    hosts = [f"host{i:02}" for i in range(32)]
    for slots, replication in ((9, 1), (18, 2), (16, 2)):
        for kind in LOADS:
            load = make_load(kind, 58, 256)
            placed, cpu, wall = measure(rounds, lambda: placement.plan(58, 256, hosts, slots, replication, load))
            balance = [1 / placement.imbalance(p, range(32), load, 256) for p in (placed, eplb(load, 32, slots))]
            figures = [f"{b:.4f}" for b in (*balance, bound(load, 32, slots, replication))]
            table.add_row("58 x 256 x 32", str(32 * slots), str(replication), kind, "plan", cpu, wall, *figures)
    table.add_section()

    for slots in (16, 18):
        placed = placement.plan(58, 256, hosts, slots, 2)
        for lost in (0, 1, 2, 4):
            left, now = list(range(lost, 32)), placed
            row = ("58 x 256 x 32", str(32 * slots), "2", "equal")
            now, cpu, wall = measure(rounds, lambda: placement.repair(placed, left, hosts, 256))
            table.add_row(*row, f"repair, {lost} lost: {placement.moves(placed, now)} slots", cpu, wall)
            routes, cpu, wall = measure(rounds, lambda: placement.routing(now[:, left], 256, 8))
            most = max(np.bincount(layer).max() for layer in routes[..., 0] // slots)
            label = f"routing, {lost} lost: at most {most} primaries, even {-(-256 // len(left))}"
            table.add_row(*row, label, cpu, wall)
            after, cpu, wall = measure(rounds, lambda: placement.restore(now, left, hosts, 256, 2))
            table.add_row(*row, f"restore, {lost} lost: {placement.moves(now, after)} slots", cpu, wall)
    table.add_section()

    for ranks, experts, slots in ((1024, 256, 2), (1024, 1024, 4)):
        names = [f"host{i // 8:03}" for i in range(ranks)]
        for kind in ("equal", "zipf"):
            load = make_load(kind, 100, experts)
            placed, cpu, wall = measure(2, lambda: placement.plan(100, experts, names, slots, 2, load))
            balance = [
                1 / placement.imbalance(p, range(ranks), load, experts) for p in (placed, eplb(load, ranks, slots))
            ]
            figures = [f"{b:.4f}" for b in (*balance, bound(load, ranks, slots, 2))]
            size = f"100 x {experts} x {ranks}, 8 a host"
            table.add_row(size, str(ranks * slots), "2", kind, "plan", cpu, wall, *figures)
    Console(width=170).print(table)


if __name__ == "__main__":
    main()
