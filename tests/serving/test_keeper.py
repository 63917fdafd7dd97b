"""`moe-jax serve --journal DIR`: who dies, stands still or does not start, and who takes its place. No workers."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
from collections.abc import Awaitable, Callable
from pathlib import Path

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from moe_jax.llm import model_directory
from serving import keeper
from serving.keeper import Keeper
from serving.options import Options

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(120)]


def options(journal: Path, address: str = "127.0.0.1:0") -> Options:
    return Options(model_directory("demo"), address, "cpu", 2, workers=False, journal=journal)


def run(given: Options, scenario: Callable[[Keeper], Awaitable[None]]) -> None:
    async def main() -> None:
        stop, kept = asyncio.Event(), Keeper(given, lambda line: None)
        running = asyncio.create_task(kept.run(stop))
        done = asyncio.create_task(asyncio.wait_for(scenario(kept), 60))
        await asyncio.wait([running, done], return_when=asyncio.FIRST_COMPLETED)
        stop.set()
        await running
        await done

    asyncio.run(main())


async def until(done: Callable[[], object]) -> None:
    while not done():
        await asyncio.sleep(0.01)


async def lives(address: str) -> None:
    """Until the server there says so."""
    async with grpc.aio.insecure_channel(address) as channel:
        health = health_pb2_grpc.HealthStub(channel)
        answer = await health.Check(health_pb2.HealthCheckRequest(), wait_for_ready=True)  # type: ignore[attr-defined]
        assert answer.status == health_pb2.HealthCheckResponse.SERVING


async def another(kept: Keeper, before: int | None) -> int:
    """The process id of the next coordinator."""
    await until(lambda: kept._process is not None and kept._process.pid not in (None, before))
    assert kept._process is not None and kept._process.pid is not None
    return kept._process.pid


def parent(pid: int) -> int:
    return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])


def test_another_one_takes_the_place(tmp_path, monkeypatch, caplog):
    """At the same address, as often as it takes; whatever it is a fork of may end or stand still, now or before."""
    monkeypatch.setattr(keeper, "_STOPPED", 1.0)

    async def scenario(kept: Keeper) -> None:
        await until(lambda: kept._listened)
        address, serves = kept._options.address, await another(kept, None)
        await lives(address)
        for forks, coordinator in (
            (None, signal.SIGKILL),
            (None, signal.SIGSTOP),
            (signal.SIGSTOP, signal.SIGKILL),
            (signal.SIGKILL, None),
            (None, signal.SIGKILL),
        ):
            assert kept._forks is not None
            before, loaded = serves, kept._forks.pid
            if forks is not None:
                os.kill(loaded, forks)
            if coordinator is not None:
                os.kill(serves, coordinator)
                serves = await another(kept, before)
            else:
                await until(lambda: kept._forks is not None and kept._forks.pid != loaded)  # noqa: B023
            assert kept._forks is not None and (kept._forks.pid == loaded) == (forks is None)
            await lives(address)
            assert kept._options.address == address and (coordinator is None or parent(serves) == kept._forks.pid)

    run(options(tmp_path / "journal"), scenario)
    assert caplog.text.count("was ended by SIGKILL: another one is started") == 2


def test_what_is_wrong_at_the_start_stays_so(tmp_path):
    async def scenario(kept: Keeper) -> None:
        await asyncio.Event().wait()

    with socket.create_server(("127.0.0.1", 0)) as taken, pytest.raises(OSError, match="cannot listen there"):
        run(options(tmp_path, f"127.0.0.1:{taken.getsockname()[1]}"), scenario)
