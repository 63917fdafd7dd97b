"""`moe-jax serve --journal DIR`: who dies, stands still or does not start, and who stands by. No workers."""

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


async def standing_by(kept: Keeper) -> int:
    """The process id of what stands by."""
    await until(lambda: kept._next is not None)
    assert kept._next is not None
    return kept._next.child.pid


def test_who_stands_by_takes_the_place(tmp_path, monkeypatch):
    """At the same address, as often as it takes. One that stands by and ends, or stands still, is in nobody's way."""
    monkeypatch.setattr(keeper, "_STAND_BY", 0.0)

    async def scenario(kept: Keeper) -> None:
        await until(lambda: kept._listened)
        address = kept._options.address
        await lives(address)
        for fate in (None, signal.SIGKILL, signal.SIGSTOP):
            assert kept._process is not None
            serves, next_ = kept._process.child.pid, await standing_by(kept)
            if fate is not None:
                os.kill(next_, fate)
            if fate is signal.SIGKILL:
                await until(lambda: kept._next is None)
            os.kill(serves, signal.SIGKILL)
            await until(lambda: kept._process is not None and kept._process.child.pid != serves)  # noqa: B023
            assert (kept._process.child.pid == next_) == (fate is None)
            await lives(address)
            assert kept._options.address == address

    run(options(tmp_path / "journal"), scenario)


def test_what_is_wrong_at_the_start_stays_so(tmp_path):
    async def scenario(kept: Keeper) -> None:
        await asyncio.Event().wait()

    with socket.create_server(("127.0.0.1", 0)) as taken, pytest.raises(OSError, match="cannot listen there"):
        run(options(tmp_path, f"127.0.0.1:{taken.getsockname()[1]}"), scenario)
