"""`moe-jax serve` with the demo model as scripts need it: started, found, hurt, and ended."""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import grpc

from serving.protos import inference_pb2 as pb
from serving.protos import inference_pb2_grpc as rpc


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as sock:
        return sock.getsockname()[1]


@contextlib.contextmanager
def served(*arguments: str, quiet: bool = False) -> Iterator[str]:
    """Its address, once it serves. arguments: more for `moe-jax serve`. Raises RuntimeError if it does not start."""
    command = [sys.executable, "-m", "serving.cli", "serve", "--address", "127.0.0.1:0", *arguments]
    log = subprocess.DEVNULL if quiet else None
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=log, text=True) as server:
        try:
            assert server.stdout is not None
            line = server.stdout.readline()
            if (found := re.match(r"serving at (\S+):", line)) is None:
                raise RuntimeError(f"moe-jax serve: found {line!r}, expected 'serving at …'")
            yield found[1]
        finally:
            server.terminate()
            server.wait(60)


def status(address: str) -> dict[str, Any]:
    with grpc.insecure_channel(address) as channel:
        return json.loads(rpc.AdminStub(channel).Status(pb.StatusRequest(), timeout=30).json)


def kill_a_host(address: str) -> int:
    """SIGKILL to the last rank's engine. Its process id."""
    pid = status(address)["ranks"][-1]["pid"]
    os.kill(pid, signal.SIGKILL)
    return pid
