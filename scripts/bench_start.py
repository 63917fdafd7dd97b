"""Time to first token of a cluster that finds nothing compiled, and of one that finds everything; and what recoveries
compile.

    python scripts/bench_start.py [--hosts 4 --lose 2] [--json]
    python scripts/bench_start.py --shape qwen3-30b-a3b --only warm [--layers 8] --max-batch 16

One run, in directories of its own:

    cold      an empty cache: the first engine processes compile what they need
    warm-up   `moe-jax warmup --lose K` into another empty cache
    warm      a second cluster, on that cache; then K hosts (or --kill) are killed, one after the other
    copied    a third one, on a copy of that cache at another path, at another port; the first hosts are killed, so that
              other ranks are left

--only takes some of these. A compilation is one that XLA is asked for, counted in every engine since its process was
started. --shape: one of bench_serving.py's models with random weights; further options are those of `moe-jax serve`,
and ranks may share a GPU (MOE_JAX_SHARE_GPU=1).
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import grpc
from _cluster import machine, send
from _shapes import add_model_options, write_model

from serving.protos import inference_pb2 as pb
from serving.protos import inference_pb2_grpc as rpc

_START = 900.0  # seconds


async def first_token(channel: grpc.aio.Channel) -> None:
    params = pb.SamplingParams(max_tokens=1, temperature=0.0)
    request = pb.GenerateRequest(request_id=os.urandom(8).hex(), prompt="The capital of", params=params)
    async for message in rpc.InferenceStub(channel).Generate(request, wait_for_ready=True):
        if message.token_ids:
            return


async def status(channel: grpc.aio.Channel) -> dict[str, Any]:
    return json.loads((await rpc.AdminStub(channel).Status(pb.StatusRequest())).json)


async def measure(hosts: int, cache: Path, victims: list[str], options: list[str]) -> dict[str, Any]:
    """Start a cluster, have a token of it, kill these hosts one after the other, and end it."""
    command = [sys.executable, "-m", "serving.cli", "serve", "--hosts", str(hosts), "--address", "127.0.0.1:0"]
    environ = {**os.environ, "MOE_JAX_CACHE": str(cache)}
    begun = time.monotonic()
    server = await asyncio.create_subprocess_exec(
        *command, "--no-restart", *options, env=environ, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
    )
    try:
        assert server.stdout is not None
        line = (await asyncio.wait_for(server.stdout.readline(), _START)).decode()
        address = line.removeprefix("serving at ").partition(": ")[0]
        serving = time.monotonic() - begun
        async with grpc.aio.insecure_channel(address) as channel:
            await first_token(channel)
            found: dict[str, Any] = {
                "serving_s": round(serving, 2),
                "first_token_s": round(time.monotonic() - begun, 2),
            }
            now = await status(channel)
            found["compilations"] = sum(r["compilations"] for r in now["ranks"])
            async with asyncio.timeout(_START):
                while victims and now["survivable_without_compiling"] < len(victims):
                    await asyncio.sleep(0.2)
                    now = await status(channel)
            found["ready_after_s"] = round(time.monotonic() - begun, 2)
            found["recoveries"] = [await _kill(channel, now, host) for host in victims]
        return found
    finally:
        server.send_signal(signal.SIGTERM)
        await server.wait()


async def _kill(channel: grpc.aio.Channel, before: dict[str, Any], host: str) -> dict[str, Any]:
    before = await status(channel)
    rank = next(r for r in before["ranks"] if r["host"] == host)
    send([rank["supervisor_pid"], rank["pid"]], signal.SIGKILL)
    while True:
        now = await status(channel)
        if now["state"] == "SERVING" and now["epoch"] > before["epoch"]:
            break
        await asyncio.sleep(0.01)
    begun = time.monotonic()
    await first_token(channel)
    now = await status(channel)
    live = [r["rank"] for r in now["ranks"] if r["state"] == "live"]
    old = {r["rank"]: r["compilations"] for r in before["ranks"]}
    compiled = sum(r["compilations"] - old[r["rank"]] for r in now["ranks"] if r["rank"] in live)
    return {"left": live, "compilations": compiled, "first_token_ms": round(1e3 * (time.monotonic() - begun), 1)}


def warm_up(hosts: int, lose: int, cache: Path, options: list[str]) -> dict[str, Any]:
    begun = time.monotonic()
    command = [sys.executable, "-m", "serving.cli", "warmup", "--hosts", str(hosts), "--lose", str(lose), "--json"]
    done = subprocess.run([*command, "--cache", str(cache), *options], stdout=subprocess.PIPE, check=True)
    entries = json.loads(done.stdout)["entries"]
    return {
        "seconds": round(time.monotonic() - begun, 1),
        "entries": len(entries),
        "megabytes": round(sum(e["bytes"] for e in entries) / 1e6, 2),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hosts", type=int, default=4)
    parser.add_argument("--lose", type=int, default=2)
    parser.add_argument("--kill", type=int, help="hosts that are killed (default: as many as --lose)")
    parser.add_argument("--only", nargs="+", choices=("cold", "warm", "copied"), default=["cold", "warm", "copied"])
    add_model_options(parser)
    parser.add_argument("--json", action="store_true")
    args, options = parser.parse_known_args()
    names = [f"host{i}" for i in range(args.hosts)]
    kill = args.lose if args.kill is None else args.kill
    with tempfile.TemporaryDirectory() as directory:
        root = Path(directory)
        result: dict[str, Any] = {"hosts": args.hosts, "lose": args.lose, **machine()}
        if args.shape != "demo":
            options += ["--model", str(write_model(args.shape, args.layers, root / "model")), "--load-format", "dummy"]
        if "cold" in args.only:
            result["cold"] = asyncio.run(measure(args.hosts, root / "cold", [], options))
        warm, copy = root / "warm", root / "elsewhere" / "copy"
        if {"warm", "copied"} & set(args.only):
            result["warmup"] = warm_up(args.hosts, args.lose, warm, options)
        if "warm" in args.only:
            victims = names[: -kill - 1 : -1]
            result["warm"] = asyncio.run(measure(args.hosts, warm, victims, options))
        if "copied" in args.only:
            shutil.copytree(warm, copy)
            shutil.rmtree(warm)
            result["copied"] = asyncio.run(measure(args.hosts, copy, names[:kill], options))
    if args.json:
        print(json.dumps(result))
        return
    print(machine())
    if "warmup" in result:
        print("warm-up: {entries} entries, {megabytes} MB, {seconds} s".format(**result["warmup"]))
    for name in args.only:
        found = result[name]
        print(f"{name}: serving after {found['serving_s']} s, first token after {found['first_token_s']} s, ", end="")
        print(f"{found['compilations']} compilations in all engines")
        for recovery in found["recoveries"]:
            print(f"  left {recovery['left']}: {recovery['compilations']} compilations")


if __name__ == "__main__":
    main()
