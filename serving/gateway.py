"""The OpenAI-compatible gateway in front of the service: smg, where installed, as a process that ends with its owner.

`python -m serving.gateway FD COMMAND…` runs the command until the channel FD is closed: smg itself watches nobody.
"""

from __future__ import annotations

import asyncio
import contextlib
import importlib.util
import logging
import os
import select
import shutil
import signal
import socket
import subprocess
import sys
from pathlib import Path

from serving.child import Child
from serving.environment import with_packages
from serving.pipe import Pipe

_AGAIN = 1.0  # seconds until one that has ended is started again
_PATIENCE = 5.0  # seconds from asking it to end to killing it

log = logging.getLogger(__name__)


def find() -> list[str]:
    """The command. Raises ValueError where there is none, or where we could not speak with it."""
    program = shutil.which("smg", path=os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")]))
    if program is None or importlib.util.find_spec("smg_grpc_proto") is None:
        missing = "smg on the path" if program is None else "the package smg-grpc-proto"
        raise ValueError(f"openai-port: found no {missing}: pip install 'moe-jax[openai]'")
    return [program]


class Gateway:
    """Belongs to the running event loop."""

    def __init__(self, address: str, port: int, model: Path) -> None:
        """Listens at `port` of this machine's loopback interface, for the service at `address`."""
        listen = ("--host", "127.0.0.1", "--port", str(port), "--prometheus-host", "127.0.0.1")
        engine = ("--worker-urls", f"grpc://{address}", "--model-path", str(model.resolve()))
        quiet = ("--prometheus-port", str(_free_port()), "--log-level", "warn")
        self._command = [*find(), "launch", *listen, *engine, *quiet]
        self._child: Child | None = None
        self._pipe: Pipe | None = None
        self._closed = False
        self._start()

    def _start(self) -> None:
        if self._closed:
            return
        self._child = child = Child(
            "gateway", "serving.gateway", ["{fd}", *self._command], with_packages(os.environ), log=2
        )
        self._pipe = Pipe(child.channel.fileno(), lambda data: None, lambda: self._gone(child))
        child.channel.close()  # the pipe has it now

    def _gone(self, child: Child) -> None:
        child.wait(0.1)  # for its exit code
        log.warning("%s: started again", child.describe().partition("\n")[0])
        child.kill()
        child.close()
        asyncio.get_running_loop().call_later(_AGAIN, self._start)

    async def close(self) -> None:
        self._closed = True
        if self._pipe is not None:
            self._pipe.close()
        child = self._child
        if child is not None:
            await asyncio.to_thread(child.wait, _PATIENCE + 1.0)
            child.kill()
            child.close()


def _free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as sock:
        return sock.getsockname()[1]


def main() -> None:
    owner = socket.socket(fileno=int(sys.argv[1]))
    process = subprocess.Popen(sys.argv[2:], stdin=subprocess.DEVNULL)
    watching = os.pidfd_open(process.pid)
    readable, _, _ = select.select([owner, watching], [], [])
    if watching not in readable:
        process.send_signal(signal.SIGTERM)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(_PATIENCE)
        process.kill()
    sys.exit(process.wait())


if __name__ == "__main__":
    main()
