"""Kills the coordinator of a real cluster at random moments under load, and judges what clients saw.

    python scripts/chaos_coordinator.py [--kills 20 --hosts 3 --streams 64 --seed 0]

Each stream follows its request through as many coordinators as it takes, by Resume; its tokens must be those that one
host gives that nothing happens to. No engine may start anew. Prints one JSON object; exit code 1 unless all is well.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import random
import signal
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import grpc
from _cluster import Cluster, Shape, Traffic, expected_outputs, machine, make_jobs, run


async def status(cluster: Cluster) -> dict[str, Any]:
    """Of whichever coordinator there is."""
    while True:
        try:
            return await cluster.status()
        except grpc.aio.AioRpcError:
            await asyncio.sleep(0.02)


async def main(args: argparse.Namespace) -> int:
    shape, draw = Shape(args.hosts, max_batch=32), random.Random(args.seed)
    jobs = make_jobs(2 * args.streams, args.seed)
    expected = expected_outputs(jobs, shape)
    away: list[float] = []  # seconds from a kill to the next coordinator's serving
    with tempfile.TemporaryDirectory() as directory:
        async with Cluster(shape, Path(directory)) as cluster:
            before = await cluster.until_settled(120, "start")
            traffic = Traffic(cluster.address, jobs, expected, args.streams, hang=120.0, resume=True)
            traffic.start()
            while not traffic.tally.tokens:
                await asyncio.sleep(0.1)
            for _ in range(args.kills):
                await asyncio.sleep(draw.uniform(0.0, args.every))
                victim = (await status(cluster))["coordinator"]["pid"]
                os.kill(victim, signal.SIGKILL)
                begun = time.monotonic()
                while True:
                    found = await status(cluster)
                    if found["coordinator"]["pid"] != victim and found["state"] == "SERVING":
                        break
                    await asyncio.sleep(0.02)
                away.append(time.monotonic() - begun)
                await traffic.all_moved(time.monotonic())
            await traffic.stop()
            after = await status(cluster)
    same = all(
        [rank[name] for rank in after["ranks"]] == [rank[name] for rank in before["ranks"]]
        for name in ("pid", "supervisor_pid")
    )
    tally = traffic.tally
    print(
        json.dumps(
            {
                "machine": machine(),
                "kills": args.kills,
                **{name: value for name, value in vars(tally).items() if name != "details"},
                "resumed": traffic.resumed,
                "same_engines": same,
                "epochs": after["epoch"] - before["epoch"],
                "until_serving_s": {"median": sorted(away)[len(away) // 2], "most": max(away)},
                "each_s": [round(seconds, 2) for seconds in away],
                "longest_gap_s": traffic.longest_gap_after(0.0),
                "details": tally.details,
            }
        )
    )
    return 0 if tally.clean and same else 1


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--every", type=float, default=2.0, help="seconds from all going on to the kill, at most")
    parser.add_argument("--hosts", type=int, default=3)
    parser.add_argument("--streams", type=int, default=64)
    parser.add_argument("--seed", type=int, default=0)
    sys.exit(run(main(parser.parse_args())))
