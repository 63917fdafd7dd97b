"""The simulation of goodput, where the answer is known."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "scripts"))

import simulate  # noqa: E402  # pyright: ignore[reportMissingImports]

DAY = 86400.0
NEVER = simulate.Times(1e12, 3600, 1, 1, 1, 1, 10, 100)
OFTEN = simulate.Times(10 * 3600, 60.0, 0.5, 0.2, 5, 10, 10, 150)


def test_without_failures_nothing_is_lost() -> None:
    for way in (simulate.elastic, simulate.restarting):
        found = way(8, NEVER, DAY, 0.5, np.random.default_rng(0))
        assert (found.goodput, found.stopped, found.failures) == (1.0, 0.0, 0)


def test_each_failure_costs_its_pause() -> None:
    """Repairs take a minute and pauses hardly overlap, so the time that is lost can be counted."""
    found = simulate.elastic(8, OFTEN, 30 * DAY, 0.5, np.random.default_rng(0))
    assert found.failures == pytest.approx(30 * 24 / 10 * 8, rel=0.1)
    assert found.stopped == pytest.approx(found.failures * 0.7 / (30 * DAY), rel=0.05)
    other = simulate.restarting(8, OFTEN, 30 * DAY, 0.5, np.random.default_rng(0), eager=True)
    assert other.stopped > 50 * found.stopped and other.goodput < found.goodput


def test_too_few_hosts_serve_nothing() -> None:
    broken = simulate.Times(3600, 1e12, 0, 0, 0, 0, 0, 0)
    found = simulate.elastic(4, broken, 1000 * DAY, 0.9, np.random.default_rng(0))
    assert found.goodput < 0.001 and found.stopped > 0.999


def test_measured_times_are_those_of_a_run(tmp_path: Path) -> None:
    file = tmp_path / "measured"
    file.write_text('a table\n{"pause_ms": {"median": 500}, "rejoin_ms": {"median": 260}, "restart_ms": 4331.0}\n')
    assert simulate.measured(file) == {"pause": 0.5, "rejoin": 0.26, "restart": 4.331}
    file.write_text('{"pause_ms": {}}')
    with pytest.raises(ValueError, match="expected what bench_recovery.py --json printed"):
        simulate.measured(file)
