"""What the service costs beside the engines: processor time for each streamed token, and time to first token.

    python scripts/bench_api.py [--hosts 2 --streams 64 --seconds 15 --journal]

A real cluster with the demo model under a steady load of streams. Processor time is the kernel's, of the coordinator,
the supervisors and the engines each. What the service adds to the first token is what a client waits beyond the time
from a request's place on a rank until its first token is there (moe_jax_request_prefill_time_seconds).
"""

from __future__ import annotations

import argparse
import asyncio
import json
import re
import statistics
import tempfile
import time
import urllib.request
from typing import Any

import grpc
from _cluster import cpu
from _service import free_port, served

from serving.protos import inference_pb2 as pb
from serving.protos import inference_pb2_grpc as rpc

_ALONE = 40  # requests one after the other, for the first token


def request(prompt: str, count: int, seed: int) -> pb.GenerateRequest:
    params = pb.SamplingParams(max_tokens=count, temperature=0.8, seed=seed, ignore_eos=True)
    return pb.GenerateRequest(prompt=prompt, params=params)


async def stream(stub: rpc.InferenceStub, i: int) -> None:
    while True:
        async for _ in stub.Generate(request("Once upon a time", 500, i)):
            pass


def prefill(web: str) -> tuple[float, float]:
    """(sum, count) of the histogram."""
    with urllib.request.urlopen(f"http://{web}/metrics", timeout=10) as answer:
        text = answer.read().decode()
    name = "moe_jax_request_prefill_time_seconds"
    found = (re.search(rf"^{name}_{part} (\S+)", text, re.MULTILINE) for part in ("sum", "count"))
    total, count = (float(one[1]) for one in found if one is not None)
    return total, count


async def measure(address: str, web: str, streams: int, seconds: float) -> dict[str, Any]:
    async with grpc.aio.insecure_channel(address) as channel:
        inference, admin = rpc.InferenceStub(channel), rpc.AdminStub(channel)
        before, firsts = prefill(web), []
        for i in range(_ALONE):
            begun = time.perf_counter()
            async for response in inference.Generate(request(f"{i} The capital of", 3, i)):
                if response.token_ids:
                    firsts.append(time.perf_counter() - begun)
                    break
            await asyncio.sleep(0.05)
        after = prefill(web)
        running = [asyncio.create_task(stream(inference, i)) for i in range(streams)]
        await asyncio.sleep(3)

        async def look() -> tuple[dict[str, Any], float]:
            return json.loads((await admin.Status(pb.StatusRequest())).json), time.perf_counter()

        status, begun = await look()
        groups = {
            "coordinator": [status["coordinator"]["pid"]],
            "supervisors": [rank["supervisor_pid"] for rank in status["ranks"]],
            "engines": [rank["pid"] for rank in status["ranks"]],
        }
        used = {name: cpu(pids) for name, pids in groups.items()}
        await asyncio.sleep(seconds)
        later, ended = await look()
        used = {name: cpu(pids) - used[name] for name, pids in groups.items()}
        for task in running:
            task.cancel()
        await asyncio.gather(*running, return_exceptions=True)
        tokens = later["requests"]["tokens"] - status["requests"]["tokens"]
        inside = (after[0] - before[0]) / (after[1] - before[1])
        return {
            "streams": streams,
            "tokens_per_second": round(tokens / (ended - begun), 1),
            "cpu_us_per_token": {name: round(1e6 * value / tokens, 1) for name, value in used.items()},
            "share_of_cpu": {name: round(value / sum(used.values()), 4) for name, value in used.items()},
            "first_token_ms": round(1e3 * statistics.mean(firsts), 2),
            "of_it_on_the_rank_ms": round(1e3 * inside, 2),
            "added_ms": round(1e3 * (statistics.mean(firsts) - inside), 2),
        }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hosts", type=int, default=2)
    parser.add_argument("--streams", type=int, default=64)
    parser.add_argument("--seconds", type=float, default=15.0)
    parser.add_argument("--journal", action="store_true", help="on disk")
    args = parser.parse_args()
    web = f"127.0.0.1:{free_port()}"
    with tempfile.TemporaryDirectory() as directory:
        journal = ("--journal", directory) if args.journal else ()
        with served("--web", web, "--hosts", str(args.hosts), *journal, quiet=True) as address:
            print(json.dumps(asyncio.run(measure(address, web, args.streams, args.seconds))))


if __name__ == "__main__":
    main()
