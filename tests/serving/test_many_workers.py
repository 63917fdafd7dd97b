"""The coordinator and more workers than fit processes: simulated ones, over real gRPC streams (bench_coordinator)."""

from __future__ import annotations

import asyncio
import sys
from pathlib import Path

import numpy as np
import pytest

from moe_jax import placement
from serving.cluster import Repairs, sizes_after
from serving.status import ready_for

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "scripts"))

import bench_coordinator  # noqa: E402  # pyright: ignore[reportMissingImports]


@pytest.mark.cluster
@pytest.mark.timeout(90)
def test_many_losses_at_once() -> None:
    """Every one of them is fenced, in an epoch that leaves out no other, and they come back. Twice."""
    found = asyncio.run(bench_coordinator.measure(workers=60, lose=10, rounds=2, layers=4, experts=60))
    assert [0 < r["detected"] <= r["committed"] < r["serving"] for r in found["rounds"]] == [True, True]


def test_repairs_ahead_are_bounded_and_right(monkeypatch: pytest.MonkeyPatch) -> None:
    hosts = [f"host{i}" for i in range(12)]
    slots = placement.plan(2, 24, hosts, 4, 2)
    monkeypatch.setattr("serving.cluster._KEPT", 20 * slots.nbytes)
    repairs = Repairs(hosts, 24)
    repairs.expect(slots, range(12))
    for _ in range(100):
        repairs.work()
    assert len(repairs._known) == 20
    for lost in ([0], [11], [0, 1], [4, 9], [1, 2, 3]):
        ranks = [r for r in range(12) if r not in lost]
        expected = placement.repair(slots, ranks, hosts, 24)
        for given in (slots, slots.copy()):
            assert np.array_equal(repairs(given, ranks), expected)  # type: ignore[arg-type]
    other = placement.plan(2, 24, hosts, 4, 2, placement.make_load("zipf", 2, 24))
    ranks = list(range(1, 12))
    assert np.array_equal(repairs(other, ranks), placement.repair(other, ranks, hosts, 24))  # type: ignore[arg-type]


def test_sizes_after_losses() -> None:
    even, odd = ["a", "a", "b", "b", "c", "c"], ["a", "b", "b", "c", "c", "c"]
    assert [sizes_after(even, k) for k in range(5)] == [{6}, {4}, {2}, {0}, set()]
    assert [sizes_after(odd, k) for k in range(4)] == [{6}, {5, 4, 3}, {3, 2, 1}, {0}]


def test_losses_that_need_no_compiling() -> None:
    """As many as every live rank has the programs for, whichever hosts they are."""

    def ready(hosts: list[str], *sizes: list[int]) -> int:
        return ready_for(hosts, [set(own) for own in sizes])

    assert ready(["a", "b", "c"], [3, 2], [3, 2, 1], [3, 2, 1]) == 1
    assert ready(["a", "b", "c"], [3], [3, 2], [3, 2, 1]) == 0
    assert ready(["a", "b", "c"], [], [3, 2], [3, 2]) == 0
    assert ready(["a", "a", "b"], [3, 2], [3, 2], [3, 2]) == 0, "a may be lost, which leaves one rank"
    assert ready(["a", "a", "b", "b"], *[[4, 2]] * 4) == 1
