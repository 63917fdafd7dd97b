"""The status page of a cluster before, during and after a host is killed, as pictures: needs Chromium.

    python scripts/screenshots.py --out DIR [--hosts 4]

The cluster is a real one, under load; the host is killed and comes back.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import grpc

from serving.protos import inference_pb2 as pb
from serving.protos import inference_pb2_grpc as rpc

_WEB = "127.0.0.1:50080"


def picture(browser: str, target: Path) -> None:
    flags = ("--headless=new", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", "--window-size=1400,900")
    command = [browser, *flags, "--virtual-time-budget=1500", f"--screenshot={target}", f"http://{_WEB}/"]
    subprocess.run(command, check=True, stderr=subprocess.DEVNULL, timeout=60)


async def load(address: str, streams: int) -> None:
    async def stream(channel: grpc.aio.Channel, i: int) -> None:
        stub = rpc.InferenceStub(channel)
        while True:
            params = pb.SamplingParams(max_tokens=400, temperature=0.8, seed=i, ignore_eos=True)
            async for _ in stub.Generate(pb.GenerateRequest(prompt="Once upon a time", params=params)):
                pass

    async with grpc.aio.insecure_channel(address) as channel:
        await asyncio.gather(*(stream(channel, i) for i in range(streams)))


def status() -> dict:
    with urllib.request.urlopen(f"http://{_WEB}/status.json", timeout=10) as answer:
        return json.load(answer)


async def until_whole() -> None:
    """At the latest after two minutes: on a busy machine a rank may have been taken for lost."""
    deadline = time.monotonic() + 120
    while any(rank["state"] != "live" for rank in status()["ranks"]) and time.monotonic() < deadline:
        await asyncio.sleep(0.2)


async def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--hosts", type=int, default=4)
    parser.add_argument("--streams", type=int, default=16)
    args = parser.parse_args()
    browser = shutil.which("chromium") or shutil.which("google-chrome")
    if browser is None:
        sys.exit("chromium: found none, expected it on the path: install it")
    args.out.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, "-m", "serving.cli", "serve", "--address", "127.0.0.1:0", "--web", _WEB]
    with subprocess.Popen([*command, "--hosts", str(args.hosts)], stdout=subprocess.PIPE, text=True) as server:
        try:
            assert server.stdout is not None
            found = re.match(r"serving at (\S+):", server.stdout.readline())
            assert found is not None
            running = asyncio.create_task(load(found[1], args.streams))
            await asyncio.sleep(20)
            await until_whole()
            await asyncio.to_thread(picture, browser, args.out / "before.png")
            await until_whole()
            os.kill(status()["ranks"][1]["pid"], signal.SIGKILL)
            await asyncio.to_thread(picture, browser, args.out / "during.png")
            await until_whole()
            await asyncio.sleep(5)
            await asyncio.to_thread(picture, browser, args.out / "after.png")
            running.cancel()
        finally:
            server.terminate()
            server.wait(60)
    print(f"{args.out}: before.png, during.png, after.png")


if __name__ == "__main__":
    asyncio.run(main())
