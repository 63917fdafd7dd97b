"""The coordinator's handle of the JAX coordination service: a process without devices, one for each generation.

Its death and its standing still are faults like any other; here they are noticed, elsewhere they are dealt with.
"""

from __future__ import annotations

import secrets
import socket
import time
from collections import deque
from collections.abc import Mapping
from typing import Any, Protocol

from serving.channel import Decoder, encode
from serving.child import Child, Orphan
from serving.environment import with_packages
from serving.pipe import Pipe

START = 60.0  # seconds until it has an address
ANSWER = 1.0  # seconds until a fence is done; measured: 2 ms
STOPPED = 5.0  # seconds that it may stand still while nothing is asked of it; engines endure 30 (moe_jax.distributed)


class ServiceEvents(Protocol):
    def service_started(self, service: ServiceProcess) -> None: ...
    def service_fenced(self, service: ServiceProcess, node: int) -> None: ...
    def service_failed(self, service: ServiceProcess, reason: str) -> None:
        """Once, and nothing follows."""
        ...


class ServiceProcess:
    """Belongs to the running event loop."""

    def __init__(self, generation: int, name: str, process: Child | Orphan, events: ServiceEvents) -> None:
        """name: that another coordinator finds it by; "": none shall."""
        self.generation, self.name = generation, name
        self.address: str | None = None
        self._events, self._decoder = events, Decoder()
        self._child = process
        self._pipe = Pipe(self._child.channel.fileno(), self._received, lambda: self._fail("ended"))
        self._child.channel.close()  # the pipe has it now
        self._asked: deque[float] = deque()  # when, of what is not yet answered
        self._begun = self._running_at = time.monotonic()

    @staticmethod
    def start(
        generation: int,
        num_nodes: int,
        module: str,
        host: str,
        environ: Mapping[str, str],
        events: ServiceEvents,
        outlives: bool = False,
    ) -> ServiceProcess:
        """A new one, which listens at `host`. outlives: this process. Raises OSError if it cannot be started."""
        name = f"moe-jax-service-{secrets.token_hex(8)}" if outlives else ""
        environ = with_packages({**environ, "JAX_PLATFORMS": "cpu"})
        child = Child(_title(generation), module, ["{fd}", str(num_nodes), host, name], environ)
        return ServiceProcess(generation, name, child, events)

    @staticmethod
    def take_over(generation: int, name: str, events: ServiceEvents) -> ServiceProcess:
        """One that has outlived the coordinator that started it. Raises OSError if it has not."""
        sock = socket.socket(socket.AF_UNIX)
        sock.settimeout(ANSWER)
        try:
            sock.connect(f"\0{name}")
            return ServiceProcess(generation, name, Orphan(_title(generation), sock), events)
        except BaseException:
            sock.close()
            raise

    @property
    def pid(self) -> int:
        return self._child.pid

    @property
    def open(self) -> bool:
        return self._pipe.open

    def fence(self, node: int) -> None:
        """Shut node `node`'s process out, whatever it is doing. Answered by service_fenced."""
        self._ask({"type": "fence", "node": node})

    def forget(self) -> None:
        """Node 0 is about to start again. Takes effect before anything that is asked for later."""
        self._ask({"type": "forget"})

    def look(self, now: float) -> None:
        """To be called now and then; `now` as time.monotonic."""
        if not self.open:
            return
        stopped = self._child.stopped
        if not stopped:
            self._running_at = now
        if self._child.ended:
            self._fail("ended")
        elif self.address is None and now - self._begun > START:
            self._fail(f"had no address after {START:g} s")
        elif self._asked and now - self._asked[0] > ANSWER:
            self._fail(f"{'is stopped' if stopped else 'did not answer'} for {ANSWER:g} s")
        elif now - self._running_at > STOPPED:
            self._fail(f"was stopped for {STOPPED:g} s")

    def resume(self, now: float) -> None:
        """This process stood still itself: nothing that took long until now counts."""
        self._begun = self._running_at = now
        self._asked = deque(now for _ in self._asked)

    def close(self) -> None:
        """End it. Nothing more is heard of it."""
        self._pipe.close()
        self._child.kill()
        self._child.wait(5.0)
        self._child.close()

    def _ask(self, body: dict[str, Any]) -> None:
        self._asked.append(time.monotonic())
        self._pipe.write(encode(body))

    def _received(self, data: bytes) -> None:
        for message in self._decoder.feed(data):
            match message.body["type"]:
                case "address":
                    self.address = message.body["address"]
                    self._events.service_started(self)
                case "fenced":
                    self._asked.popleft()
                    self._events.service_fenced(self, message.body["node"])
                case "forgot":
                    self._asked.popleft()
                case "error":
                    return self._fail(message.body["message"])

    def _fail(self, reason: str) -> None:
        self._child.wait(0.02)  # for its exit code
        text = self._child.describe(reason)
        self.close()
        self._events.service_failed(self, text)


def _title(generation: int) -> str:
    return f"JAX service {generation}"
