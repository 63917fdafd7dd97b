"""A coordinator that is killed, and another one that takes its workers over: no engine starts anew, and every stream
has exactly the tokens it would have had alone. Engines compute nothing here.
"""

from __future__ import annotations

import asyncio
import json
import os
import random
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import grpc
import pytest

from serving.launcher import Launcher
from serving.protos import inference_pb2 as pb
from serving.protos import inference_pb2_grpc as rpc
from tests.serving.fake_engine import tokens
from tests.serving.test_coordinator import alive

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(240)]

HOSTS = ("a", "b", "c")
CHANNEL = (("grpc.min_reconnect_backoff_ms", 20), ("grpc.initial_reconnect_backoff_ms", 20))
CHANNEL = (*CHANNEL, ("grpc.max_reconnect_backoff_ms", 100))
AGAIN = (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.CANCELLED)


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as sock:
        return sock.getsockname()[1]


class Cluster:
    """Workers in this process's care, a coordinator that is not."""

    def __init__(self, journal: Path, **options: Any) -> None:
        self.address = f"127.0.0.1:{free_port()}"
        options = {"hosts": HOSTS, "slots": 6, "fake": {"step": 0.005}, "heartbeat_timeout_s": 2.0} | options
        command = [sys.executable, "-m", "tests.serving.fake_coordinator", self.address, str(journal)]
        self._command = [*command, json.dumps(options)]
        self.coordinator: subprocess.Popen[bytes] | None = None
        self.streams: dict[str, list[int]] = {}

    async def __aenter__(self) -> Cluster:
        self.start()
        self.launcher = Launcher(self.address, HOSTS, "cpu", engine="tests.serving.fake_engine")
        self.launcher.start()
        self.channel = grpc.aio.insecure_channel(self.address, options=CHANNEL)
        self.inference, self.admin = rpc.InferenceStub(self.channel), rpc.AdminStub(self.channel)
        await self.until(lambda s: s["state"] == "SERVING")
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.channel.close()
        self.kill()
        await self.launcher.close()

    def start(self) -> None:
        self.coordinator = subprocess.Popen(self._command)

    def kill(self, number: int = signal.SIGKILL) -> None:
        assert self.coordinator is not None
        self.coordinator.send_signal(number)
        if number == signal.SIGKILL:
            self.coordinator.wait()

    async def status(self) -> dict[str, Any]:
        while True:
            try:
                return json.loads((await self.admin.Status(pb.StatusRequest(), timeout=5.0)).json)
            except grpc.aio.AioRpcError:
                await asyncio.sleep(0.02)

    async def until(self, done: Callable[[dict[str, Any]], Any], seconds: float = 30.0) -> dict[str, Any]:
        deadline = time.monotonic() + seconds
        while not done(status := await self.status()):
            assert time.monotonic() < deadline, status
            await asyncio.sleep(0.02)
        return status

    async def stream(self, name: str, seed: int, length: int) -> None:
        """Follow a request to its end, through as many coordinators as it takes."""
        params = pb.SamplingParams(max_tokens=length, seed=seed, ignore_eos=True)
        asked = pb.GenerateRequest(request_id=name, token_ids=pb.TokenIds(ids=[1, 2, 3]), params=params)
        got, accepted = self.streams.setdefault(name, []), False
        while True:
            resume = pb.ResumeRequest(request_id=name, offset=len(got))
            call = self.inference.Resume(resume) if accepted else self.inference.Generate(asked)
            try:
                async for response in call:
                    accepted = True
                    assert response.offset == len(got)
                    got += response.token_ids
                    if response.finish_reason:
                        assert response.finish_reason == "length" and got == tokens(seed, length)
                        return
            except grpc.aio.AioRpcError as e:
                assert e.code() in AGAIN, e
            await asyncio.sleep(0.01)

    async def flowing(self, more: int = 5) -> None:
        """Until every stream has so many tokens more than now, or all it is to have."""
        goal = {name: len(got) + more for name, got in self.streams.items()}
        deadline = time.monotonic() + 30
        while any(len(self.streams[name]) < count for name, count in goal.items() if name in self.open):
            assert time.monotonic() < deadline, await self.status()
            await asyncio.sleep(0.01)

    def begin(self, count: int, length: int) -> list[asyncio.Task[None]]:
        self.open: set[str] = set()
        tasks = []
        for _ in range(count):
            name = f"r{len(self.streams)}"
            task = asyncio.create_task(self.stream(name, len(self.streams), length))
            self.streams[name] = []
            self.open.add(name)
            task.add_done_callback(lambda _, name=name: self.open.discard(name))
            tasks.append(task)
        return tasks


def run(scenario: Callable[[Cluster], Awaitable[None]], journal: Path, **options: Any) -> None:
    async def main() -> None:
        async with Cluster(journal, **options) as cluster:
            await scenario(cluster)

    asyncio.run(main())


def pids(status: dict[str, Any]) -> list[tuple[int, int]]:
    return [(rank["pid"], rank["supervisor_pid"]) for rank in status["ranks"]]


def test_killed(tmp_path):
    """Engines, supervisors and the JAX service are the same after it, and no epoch was needed."""

    async def scenario(cluster: Cluster) -> None:
        streams = cluster.begin(16, 400)
        await cluster.flowing(20)
        before = await cluster.status()
        cluster.kill()
        cluster.start()
        after = await cluster.until(lambda s: s["state"] == "SERVING")
        assert pids(after) == pids(before) and after["service_pid"] == before["service_pid"]
        assert after["epoch"] == before["epoch"] and after["coordinator"]["took_over"] == [0, 1, 2]
        assert after["coordinator"]["pid"] != before["coordinator"]["pid"]
        os.kill(after["ranks"][1]["pid"], signal.SIGKILL)  # and it can do all that the other one could
        await asyncio.gather(*streams)
        await cluster.until(lambda s: s["epoch"] == before["epoch"] + 2 and s["state"] == "SERVING")

    run(scenario, tmp_path / "journal")


@pytest.mark.slow
def test_killed_while_a_rank_is_lost_or_returns(tmp_path):
    async def scenario(cluster: Cluster) -> None:
        streams = cluster.begin(8, 1500)
        for victim, pause in ((0, 0.0), (1, 0.1), (2, 0.5)):
            await cluster.flowing()
            status = await cluster.until(lambda s: all(r["state"] == "live" for r in s["ranks"]))
            os.kill(status["ranks"][victim]["pid"], signal.SIGKILL)
            await asyncio.sleep(pause)
            cluster.kill()
            cluster.start()
        await asyncio.gather(*streams)

    run(scenario, tmp_path / "journal", fake={"step": 0.005, "enter": 0.1, "load": 0.3})


def test_killed_while_a_host_is_drained(tmp_path):
    """The next one goes on with it; and it says so to whoever wants the host back, which it has not started."""

    async def scenario(cluster: Cluster) -> None:
        streams = cluster.begin(8, 1000)
        await cluster.flowing()
        cluster.launcher.hold("c")
        drain = asyncio.ensure_future(cluster.admin.Drain(pb.DrainRequest(host="c")))
        await cluster.until(lambda s: s["state"] == "DRAINING")
        cluster.kill()
        cluster.start()
        with pytest.raises(grpc.aio.AioRpcError, match="UNAVAILABLE"):
            await drain
        after = await cluster.until(lambda s: s["state"] == "SERVING" and s["ranks"][2]["state"] == "lost")
        assert after["coordinator"]["took_over"]
        assert (await cluster.admin.Drain(pb.DrainRequest(host="c"))).epoch == after["epoch"]
        with pytest.raises(grpc.aio.AioRpcError, match="not started from here"):
            await cluster.admin.Undrain(pb.UndrainRequest(host="c"))
        await asyncio.gather(*streams)

    run(scenario, tmp_path / "journal", fake={"step": 0.005, "enter": 0.3})


def test_a_rank_and_the_coordinator_at_once(tmp_path):
    """The other coordinator finds some ranks gone: that is a loss like any other."""

    async def scenario(cluster: Cluster) -> None:
        streams = cluster.begin(8, 500)
        await cluster.flowing()
        before = await cluster.status()
        cluster.kill()
        cluster.launcher.kill(1)
        cluster.start()
        after = await cluster.until(lambda s: s["epoch"] > before["epoch"] and all(r["pid"] for r in s["ranks"]))
        assert [pids(after)[r] for r in (0, 2)] == [pids(before)[r] for r in (0, 2)]
        await asyncio.gather(*streams)

    run(scenario, tmp_path / "journal")


@pytest.mark.slow
def test_the_service_and_the_coordinator_at_once(tmp_path):
    async def scenario(cluster: Cluster) -> None:
        streams = cluster.begin(8, 500)
        await cluster.flowing()
        before = await cluster.status()
        cluster.kill()
        os.kill(before["service_pid"], signal.SIGKILL)
        cluster.start()
        await asyncio.gather(*streams)
        after = await cluster.status()
        assert after["generation"] == before["generation"] + 1
        assert [s for _, s in pids(after)] == [s for _, s in pids(before)]  # new engines, the same workers

    run(scenario, tmp_path / "journal")


@pytest.mark.slow
def test_stopped_and_continued(tmp_path):
    """Nobody is judged by the time in which the coordinator itself stood still."""

    async def scenario(cluster: Cluster) -> None:
        streams = cluster.begin(8, 400)
        await cluster.flowing()
        before = await cluster.status()
        cluster.kill(signal.SIGSTOP)
        await asyncio.sleep(3.0)
        cluster.kill(signal.SIGCONT)
        await asyncio.gather(*streams)
        after = await cluster.status()
        assert pids(after) == pids(before) and after["epoch"] == before["epoch"]

    run(scenario, tmp_path / "journal")


@pytest.mark.slow
def test_nobody_comes(tmp_path):
    """Workers wait no longer than they are told to, and all ends with them."""

    async def scenario(cluster: Cluster) -> None:
        status = await cluster.status()
        cluster.kill()
        await cluster.launcher.close()
        cluster.start()
        cluster.launcher = Launcher(cluster.address, HOSTS, "cpu", engine="tests.serving.fake_engine")
        cluster.launcher.start()
        after = await cluster.until(lambda s: s["state"] == "SERVING")
        assert after["generation"] == status["generation"] + 1 and not alive(status["service_pid"])

    run(scenario, tmp_path / "journal")


@pytest.mark.slow
def test_twenty_kills_under_load(tmp_path):
    draw = random.Random(int(os.environ.get("TAKEOVER_SEED", "0")))

    async def scenario(cluster: Cluster) -> None:
        before = await cluster.status()
        streams = cluster.begin(64, 6000)
        for _ in range(20):
            await cluster.flowing(1)
            await asyncio.sleep(draw.uniform(0.0, 1.5))
            cluster.kill()
            cluster.start()
        await asyncio.gather(*streams)
        after = await cluster.status()
        assert pids(after) == pids(before) and after["epoch"] == before["epoch"]

    run(scenario, tmp_path / "journal")
