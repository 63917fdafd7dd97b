"""ClusterBackend over fake engines: what a script sees when processes fail to start, die, or stand still."""

from __future__ import annotations

import gc
import os
import time
from pathlib import Path
from signal import SIGKILL
from typing import Any

import numpy as np
import pytest

from moe_jax.checkpoint import CheckpointError
from moe_jax.request import Request, SamplingParams
from serving.cluster import Cluster
from serving.cluster_backend import ClusterBackend
from tests.serving.clusters import fake_cluster, kill
from tests.serving.fake_engine import tokens

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(90)]

FOUR = ("a", "b", "c", "d")


class Backend(ClusterBackend):
    def __init__(self, cluster: Cluster, startup: float = 30.0, stall: float = 30.0, restart: bool = True) -> None:
        self._startup, self._stall = startup, stall
        self._setup(cluster, "cpu", restart)


def engine(backend: Backend, rank: int) -> int:
    pid = backend.pids[rank]
    assert pid is not None
    return pid


def children() -> set[int]:
    found = set()
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            fields = (entry / "stat").read_text().rpartition(")")[2].split()
            if int(fields[1]) == os.getpid() and fields[0] != "Z" and b"-m" in (entry / "cmdline").read_bytes():
                found.add(int(entry.name))
        except OSError:
            pass
    return found


def generate(backend: Backend, count: int, length: int, disturb: Any = lambda: None) -> None:
    """Streams, and in their middle a disturbance."""
    got: dict[str, list[int]] = {f"r{i}": [] for i in range(count)}
    for i, name in enumerate(got):
        backend.submit(Request(name, [1, 2], SamplingParams(max_tokens=length, seed=i, ignore_eos=True)))
    disturbed = False
    while not all(len(seen) == length for seen in got.values()):
        for event in backend.poll(5.0):
            assert event.index == len(got[event.request_id])
            got[event.request_id].append(event.token)
        if not disturbed and all(len(seen) > length // 4 for seen in got.values()):
            disturb()
            disturbed = True
    assert all(seen == tokens(i, length) for i, seen in enumerate(got.values()))
    assert backend.poll(None) == []


def test_generating_through_losses():
    before = children()
    backend = Backend(fake_cluster(FOUR, fake={"step": 0.005}))
    generate(backend, 8, 300, lambda: kill(engine(backend, 1), SIGKILL))
    generate(backend, 8, 300, lambda: backend.call(lambda: backend.launcher.kill_host("c")))
    assert np.array_equal(backend.score([1, 2, 3], None), np.zeros((3, 64), np.float32))
    while sum(r["state"] == "live" for r in backend.status()["ranks"]) < 4:
        time.sleep(0.02)
    assert len(backend.status()["recoveries"]) >= 4 and len(children() - before) == 5
    backend.submit(Request("x", [1], SamplingParams(max_tokens=9999, seed=0, ignore_eos=True)))
    with pytest.raises(ValueError, match="'x', which is being served"):
        backend.submit(Request("x", [1], SamplingParams(seed=0)))
    assert backend.poll(None)
    backend.cancel("x")
    assert backend.poll(0.05) == [] and backend.compilations() == [0] * len(backend.engines())
    begun = time.monotonic()
    backend.close()
    backend.close()
    assert time.monotonic() - begun < 3 and children() == before
    with pytest.raises(RuntimeError, match="closed"):
        backend.submit(Request("y", [1], SamplingParams(seed=0)))


def test_an_error_at_the_start_is_raised_as_it_is():
    before = children()
    error = {"rank": 2, "kind": "CheckpointError", "message": "model.safetensors: found a hole"}
    with pytest.raises(CheckpointError, match="^rank 2: model.safetensors: found a hole"):
        Backend(fake_cluster(FOUR, fake={"error": error}))
    assert children() == before


@pytest.mark.parametrize("at", ["start", "ready"])
def test_an_engine_that_always_dies_is_named(at):
    before = children()
    with pytest.raises(RuntimeError, match=r"rank 1: process \d+ was ended by SIGKILL"):
        Backend(fake_cluster(FOUR, fake={"die": {"rank": 1, "at": at}}))
    assert children() == before


def test_a_start_that_takes_too_long():
    before = children()
    with pytest.raises(RuntimeError, match="start: not done after 1.5 s; STARTING"):
        Backend(fake_cluster(FOUR, fake={"load": 30}), startup=1.5)
    assert children() == before


def test_nothing_can_be_served_for_too_long():
    before = children()
    backend = Backend(fake_cluster(FOUR[:2], replication=1, fake={"step": 0.005}), stall=1.0, restart=False)
    with pytest.raises(RuntimeError, match=r"no step was done for 1 s .* UNSERVABLE \(ranks \[0\] have too few slots"):
        generate(backend, 4, 300, lambda: kill(engine(backend, 1), SIGKILL))
    assert children() == before
    with pytest.raises(RuntimeError, match="UNSERVABLE"):
        backend.poll(0.0)


def test_forgotten():
    before = children()
    backend = Backend(fake_cluster(FOUR[:2]))
    assert len(children() - before) == 3
    del backend
    gc.collect()
    assert children() == before
