"""What more load than it can bear does to the service, and what idle clients cost it.

    python scripts/bench_overload.py [--hosts 2 --seconds 60 --times 10 --idle 2000]

A real cluster with the demo model and a journal. First its capacity, by a closed loop of clients, and what one request
takes alone. Then requests come at `times` that rate, whatever becomes of them, for `seconds`; then none. Then `idle`
streams that wait: calls of Watch, to whom nothing happens, and requests that never have their turn while others with a
higher priority keep all ranks busy. Memory is what is resident of the coordinator, in MiB; processor time is the
kernel's. Prints one JSON object; exit code 1 if an accepted request was not served in full, or a refused one was not
told when to come again.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import itertools
import json
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import grpc
from _cluster import Resources, cpu, machine
from _service import served
from google.rpc import error_details_pb2
from grpc_status import rpc_status

from serving.protos import inference_pb2 as pb
from serving.protos import inference_pb2_grpc as rpc

_TOKENS = 64  # of each output
_CHANNELS = 16
_ALONE = 20  # requests one after the other
_LOOK = 0.25  # seconds between two looks at the memory
_NORMAL = 2.0  # times what a request takes alone: as good as that


@dataclass
class Results:
    """Of many requests; times are seconds."""

    first: list[float] = field(default_factory=list)  # until the first token, of accepted ones
    whole: list[float] = field(default_factory=list)
    refused: int = 0
    delays: list[float] = field(default_factory=list)  # that refused ones were told
    wrong: list[str] = field(default_factory=list)


class Clients:
    def __init__(self, address: str) -> None:
        options = [("grpc.use_local_subchannel_pool", 1), ("grpc.enable_http_proxy", 0)]
        self._channels = [grpc.aio.insecure_channel(address, options=options) for _ in range(_CHANNELS)]
        self.stubs = [rpc.InferenceStub(channel) for channel in self._channels]
        self.admins = [rpc.AdminStub(channel) for channel in self._channels]
        self._numbers = itertools.count()

    async def __aenter__(self) -> Clients:
        return self

    async def __aexit__(self, *_: object) -> None:
        for channel in self._channels:
            await channel.close()

    async def status(self) -> dict[str, Any]:
        return json.loads((await self.admins[0].Status(pb.StatusRequest(), timeout=60)).json)

    async def ask(self, results: Results, priority: int = 0, tokens: int = _TOKENS) -> None:
        number = next(self._numbers)
        params = pb.SamplingParams(max_tokens=tokens, temperature=0.8, seed=number, ignore_eos=True)
        request = pb.GenerateRequest(prompt=f"{number} Once upon a time", params=params, priority=priority)
        begun, got = time.perf_counter(), 0
        try:
            async for response in self.stubs[number % _CHANNELS].Generate(request):
                if not got and response.token_ids:
                    results.first.append(time.perf_counter() - begun)
                got += len(response.token_ids)
        except grpc.aio.AioRpcError as e:
            if e.code() != grpc.StatusCode.RESOURCE_EXHAUSTED:
                results.wrong.append(f"{e.code().name}: {e.details()}")
                return
            results.refused += 1
            if (delay := retry_delay(e)) is None:
                results.wrong.append("refused without RetryInfo")
            else:
                results.delays.append(delay)
            return
        if got == tokens:
            results.whole.append(time.perf_counter() - begun)
        else:
            results.wrong.append(f"{got} of {tokens} tokens")


def retry_delay(error: grpc.aio.AioRpcError) -> float | None:
    status, info = rpc_status.from_call(error), error_details_pb2.RetryInfo()  # type: ignore[arg-type]
    if status is None or not any(packed.Unpack(info) for packed in status.details):
        return None
    return info.retry_delay.ToTimedelta().total_seconds()


@contextlib.asynccontextmanager
async def watched(pid: int) -> AsyncIterator[list[int]]:
    """The process's memory, as it changes."""
    seen: list[int] = []

    async def look() -> None:
        while True:
            seen.append(memory(pid))
            await asyncio.sleep(_LOOK)

    looking = asyncio.create_task(look())
    try:
        yield seen
    finally:
        looking.cancel()


def memory(pid: int) -> int:
    found = Resources.of(pid)
    assert found is not None, "the coordinator has ended"
    return found.memory


def spread(values: Sequence[float]) -> dict[str, float]:
    """In milliseconds."""
    ordered = sorted(values) or [float("nan")]
    at = {"median": 0.5, "p99": 0.99, "most": 1.0}
    return {name: round(1e3 * ordered[min(len(ordered) - 1, int(q * len(ordered)))], 1) for name, q in at.items()}


def say(text: str) -> None:
    print(f"{time.strftime('%H:%M:%S')} {text}", file=sys.stderr, flush=True)


async def alone(clients: Clients, count: int = _ALONE) -> Results:
    results = Results()
    for _ in range(count):
        await clients.ask(results)
        await asyncio.sleep(0.02)
    return results


async def capacity(clients: Clients, streams: int, seconds: float) -> float:
    """Requests a second."""
    results, ends = Results(), time.perf_counter() + seconds

    async def follow() -> None:
        while time.perf_counter() < ends:
            await clients.ask(results)

    begun = time.perf_counter()
    await asyncio.gather(*(follow() for _ in range(streams)))
    return len(results.whole) / (time.perf_counter() - begun)


async def flood(clients: Clients, rate: float, seconds: float) -> Results:
    """Until the last request that was accepted has ended."""
    results, tasks, begun = Results(), set[asyncio.Task[None]](), time.perf_counter()
    for number in itertools.count():
        due = begun + number / rate
        if due > begun + seconds:
            break
        await asyncio.sleep(max(0.0, due - time.perf_counter()))
        tasks.add(task := asyncio.create_task(clients.ask(results)))
        task.add_done_callback(tasks.discard)
    await asyncio.gather(*tasks)
    return results


async def overload(
    clients: Clients, pid: int, streams: int, times: float, seconds: float
) -> tuple[dict[str, Any], bool]:
    say("alone")
    before = await alone(clients)
    say("capacity")
    most = await capacity(clients, streams, 10.0)
    quiet = memory(pid)
    begun = time.perf_counter()
    say(f"{times:g} times {most:.1f} requests/s")
    async with watched(pid) as seen:
        results = await flood(clients, times * most, seconds)
    ended = time.perf_counter()
    normal = spread(before.whole)["median"]
    after = await alone(clients)
    back = next((i for i, value in enumerate(after.whole) if 1e3 * value <= _NORMAL * normal), None)
    await asyncio.sleep(2)
    asked = len(results.whole) + results.refused + len(results.wrong)
    found = {
        "capacity_per_second": round(most, 1),
        "asked_per_second": round(asked / seconds, 1),
        "accepted": len(results.whole),
        "refused": results.refused,
        "told_to_wait_s": {"least": min(results.delays, default=None), "most": max(results.delays, default=None)},
        "served_per_second": round(len(results.whole) / (ended - begun), 1),
        "until_all_were_served_s": round(ended - begun - seconds, 1),
        "first_token_ms": spread(results.first),
        "whole_ms": spread(results.whole),
        "alone_before_ms": {"first": spread(before.first), "whole": spread(before.whole)},
        "alone_after_ms": {"first": spread(after.first), "whole": spread(after.whole)},
        "requests_until_normal": back,
        "memory_mib": {"before": quiet, "peak": max(seen), "after": memory(pid)},
        "wrong": results.wrong[:10],
    }
    return found, not results.wrong and len(results.delays) == results.refused > 0


async def idle(clients: Clients, pid: int, count: int, streams: int) -> dict[str, Any]:
    """What so many streams cost that wait."""

    async def cost(seconds: float = 8.0) -> dict[str, float]:
        before, used, begun = (await clients.status())["requests"]["tokens"], cpu([pid]), time.perf_counter()
        await asyncio.sleep(seconds)
        tokens, took = (await clients.status())["requests"]["tokens"] - before, time.perf_counter() - begun
        return {
            "cpu_percent": round(100 * (cpu([pid]) - used) / took, 2),
            "tokens_per_second": round(tokens / took, 1),
            "memory_mib": memory(pid),
        }

    seen = 0  # calls of Watch that were told the present state

    async def watch(i: int) -> None:
        nonlocal seen
        async for _ in clients.admins[i % _CHANNELS].Watch(pb.WatchRequest()):
            seen += 1

    async def busy() -> None:
        while True:
            await clients.ask(Results(), priority=9, tokens=400)

    async def while_open(
        tasks: Sequence[asyncio.Task[None]], ready: Callable[[dict[str, Any]], bool]
    ) -> dict[str, float]:
        while not ready(await clients.status()):
            await asyncio.sleep(0.2)
        await asyncio.sleep(2)
        found = await cost()
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        return found

    say("idle streams")
    found: dict[str, Any] = {"streams": count, "nobody": await cost()}
    found["watching"] = await while_open(
        [asyncio.create_task(watch(i)) for i in range(count)], lambda status: seen >= count
    )
    running = [asyncio.create_task(busy()) for _ in range(2 * streams)]  # more than have a place at once
    await asyncio.sleep(3)
    found["busy"] = await cost()
    waiting = [asyncio.create_task(clients.ask(Results())) for _ in range(count)]
    found["busy_and_waiting"] = await while_open(waiting, lambda status: status["requests"]["waiting"] > 0.9 * count)
    for task in running:
        task.cancel()
    await asyncio.gather(*running, return_exceptions=True)
    await asyncio.sleep(3)
    found["after"] = await cost(2.0)
    return found


async def measure_overload(address: str, args: argparse.Namespace) -> tuple[dict[str, Any], bool]:
    async with Clients(address) as clients:
        pid = (await clients.status())["coordinator"]["pid"]
        return await overload(clients, pid, args.streams, args.times, args.seconds)


async def measure_idle(address: str, args: argparse.Namespace) -> dict[str, Any]:
    async with Clients(address) as clients:
        pid = (await clients.status())["coordinator"]["pid"]
        return await idle(clients, pid, args.idle, args.streams)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hosts", type=int, default=2)
    parser.add_argument("--streams", type=int, default=64, help="of the closed loop")
    parser.add_argument("--seconds", type=float, default=60.0, help="0: no overload")
    parser.add_argument("--times", type=float, default=10.0)
    parser.add_argument("--idle", type=int, default=2000, help="0: none")
    args = parser.parse_args()
    hosts, found, waits, good = ("--hosts", str(args.hosts)), None, None, True
    with tempfile.TemporaryDirectory() as directory:
        if args.seconds:
            with served(*hosts, "--journal", f"{directory}/a", quiet=True) as address:
                found, good = asyncio.run(measure_overload(address, args))
        if args.idle:  # whoever waits there would have been refused
            with served(*hosts, "--journal", f"{directory}/b", "--max-queue-seconds", "1e6", quiet=True) as address:
                waits = asyncio.run(measure_idle(address, args))
    print(json.dumps({"machine": machine(), "hosts": args.hosts, "overload": found, "idle": waits}))
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
