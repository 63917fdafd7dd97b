"""How long placing experts takes and how even it comes out, beside a placement in the way of EPLB.

    python scripts/bench_placement.py [--rounds 7]

A placement is what `moe-jax plan` makes without further options: the scatter width is chosen, then experts are placed.
Loads are drawn from a seed. Times are CPU time and wall time of one call, the best and the median of the rounds; other
work on the machine shows in the wall time. Balance is 1 / imbalance, 1 is perfect; the bound is what no placement that
keeps the promise can exceed (`imbalance_bound`). EPLB keeps no promise.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from moe_jax import placement
from moe_jax.placement import LOADS, eplb, make_load


def measure(rounds: int, call: Callable[..., Any], *arguments: Any) -> tuple[Any, str, str]:
    """The result, and the best / median milliseconds of CPU and of wall time."""
    result, cpu, wall = None, [], []
    for _ in range(rounds):
        start = time.process_time(), time.perf_counter()
        result = call(*arguments)
        cpu.append((time.process_time() - start[0]) * 1e3)
        wall.append((time.perf_counter() - start[1]) * 1e3)
    cpu, wall = (f"{min(t):.1f} / {statistics.median(t):.1f}" for t in (cpu, wall))
    return result, cpu, wall


def place(
    num_layers: int, num_experts: int, hosts: Sequence[str], slots: int, replication: int, load: np.ndarray
) -> tuple[int | None, np.ndarray]:
    """The width that was chosen, and the placement."""
    scatter = placement.choose_scatter(num_experts, hosts, slots, replication, load)
    return scatter, placement.plan(num_layers, num_experts, hosts, slots, replication, load, scatter)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7, help="calls of each function (2 of the largest plans)")
    rounds = parser.parse_args().rounds
    table = Table()
    for name in ("layers x experts x ranks", "slots", "r", "load", "call"):
        table.add_column(name, no_wrap=True)
    for name in ("CPU ms", "wall ms", "balance", "EPLB", "bound"):
        table.add_column(name, justify="right", no_wrap=True)

    sizes = [(58, 256, 32, 1, slots, r, kind) for slots, r in ((9, 1), (18, 2), (16, 2)) for kind in LOADS]
    sizes += [(100, e, 1024, 8, slots, 2, kind) for e, slots in ((256, 2), (1024, 4)) for kind in ("equal", "zipf")]
    for layers, experts, ranks, ranks_per_host, slots, replication, kind in sizes:
        load = make_load(kind, layers, experts)
        hosts = [f"host{i // ranks_per_host:03}" for i in range(ranks)]
        calls = rounds if ranks == 32 else 2
        (scatter, placed), cpu, wall = measure(calls, place, layers, experts, hosts, slots, replication, load)
        assert placement.survivable_host_losses(placed, hosts, experts) >= replication - 1
        uneven = [placement.imbalance(p, range(ranks), load, experts) for p in (placed, eplb(load, ranks, slots))]
        uneven.append(placement.imbalance_bound(ranks, slots, replication, load))
        row = (f"{layers} x {experts} x {ranks}", str(ranks * slots), str(replication), kind)
        call = f"plan, scatter {'all' if scatter is None else scatter}"
        table.add_row(*row, call, cpu, wall, *(f"{1 / u:.4f}" for u in uneven))
    table.add_section()

    hosts = [f"host{i:02}" for i in range(32)]
    for slots in (16, 18):
        placed = placement.plan(58, 256, hosts, slots, 2)
        row = ("58 x 256 x 32", str(32 * slots), "2", "equal")
        for lost in (0, 1, 2, 4):
            left = list(range(lost, 32))
            now, cpu, wall = measure(rounds, placement.repair, placed, left, hosts, 256)
            table.add_row(*row, f"{lost} lost, repair: {placement.moves(placed, now)} slots move", cpu, wall)
            routes, cpu, wall = measure(rounds, placement.routing, now[:, left], 256, 8)
            most = max(np.bincount(layer).max() for layer in routes[..., 0] // slots)
            table.add_row(*row, f"{lost} lost, routing: {most} primaries at most", cpu, wall)
            after, cpu, wall = measure(rounds, placement.restore, now, left, hosts, 256, 2)
            table.add_row(*row, f"{lost} lost, restore: {placement.moves(now, after)} slots move", cpu, wall)
    Console(width=160).print(table)


if __name__ == "__main__":
    main()
