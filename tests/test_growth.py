"""scripts/_growth.py: what it calls flat, on measurements that are made up."""

import random
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "scripts"))

from _cluster import Resources  # noqa: E402  # pyright: ignore[reportMissingImports]
from _growth import by_age, by_process, with_age  # noqa: E402  # pyright: ignore[reportMissingImports]


def measured(count: int, growth: float, lives: int) -> dict[int, dict[str, Resources]]:
    """Two engines, replaced after `lives` faults each, that grow by so many MiB a fault; a supervisor that gets another
    thread with each."""
    draw, pid, born, found = random.Random(1), 100, [0, 0], {}
    pids = [100, 101]
    for n in range(1, count + 1):
        found[n] = {"supervisor 0": Resources(7, 40, 10 + n, 9)}
        for i in range(2):
            if n - born[i] > lives:
                pid, born[i], pids[i] = pid + 2, n, pid + 2 + i
            memory = int(450 + growth * (n - born[i]) + draw.uniform(-10, 10))
            found[n][f"engine {i}"] = Resources(pids[i], memory, 26, 6 + n % 7)
    return found


def test_what_does_not_grow_is_flat() -> None:
    samples = measured(100, 0.0, 30)
    grown = by_process(samples)
    assert {role: growth.flat for role, growth in grown.items()} == {
        "supervisor 0": False,
        "engine 0": True,
        "engine 1": True,
    }
    assert grown["supervisor 0"].row() == ["40 → 40, ≤ 40", "18 → 108, ≤ 110", "9 → 9, ≤ 9", "NO"]
    aged = with_age(by_age(samples))
    assert aged is not None and aged.flat and aged.most.sockets <= 12


def test_what_grows_and_is_replaced_grows_with_age() -> None:
    ages = by_age(measured(100, 3.0, 30))
    assert [least for least, _ in ages] == [1, 3, 6, 11, 21] and list(ages)[-1] == (21, 30)
    aged = with_age(ages)
    assert aged is not None and not aged.flat


def test_few_faults_say_nothing() -> None:
    assert by_process(measured(9, 0.0, 30)) == {}
    assert with_age(by_age(measured(4, 0.0, 30))) is None
