"""Stand-ins for the engine process and the JAX service, without JAX: `python -m tests.serving.fake_engine RANK FD`, and
`python -m tests.serving.fake_service FD NUM_NODES`.

An engine's token is a function of (seed, index). How it behaves is said in the `start` command's config, under "fake":

    step, join, load, enter, halt   seconds that each takes
    busy                      this rank never says that it has halted
    error                     {"rank", "kind", "message"}: this rank says so instead of joining
    die                       {"rank", "at"}: this rank kills itself at "start", "joined" or "ready"
    deaf                      {"rank", "epoch"}: this rank never enters this epoch
    sizes                     of the meshes whose programs it has at hand
    routes                    [layers][experts], the tokens that a step of one request gives to each
    kernels                   the rank whose kernels are not those of the others
    dies_with_service         as an engine does when the JAX service is killed
"""

from __future__ import annotations

import os
import signal
import socket
import sys
import threading
import time
from typing import Any

import numpy as np

from serving.channel import Channel
from serving.inbox import Inbox
from serving.outbox import Outbox

VOCABULARY = 64


def token(seed: int, index: int) -> int:
    return (seed * 1000003 + index * 7919 + (index * index) % 101) % 32000


def tokens(seed: int, count: int) -> list[int]:
    return [token(seed, i) for i in range(count)]


class FakeEngine:
    def __init__(self, rank: int, inbox: Inbox, outbox: Outbox) -> None:
        self.rank, self.inbox, self.send = rank, inbox, outbox.send
        self.epoch = self.aborted = 0
        self.member = False
        self.requests: dict[int, dict[str, Any]] = {}
        self.fake: dict[str, Any] = {}
        self.steps = self.bell = self.prefill = 0
        self.scores: list[dict[str, Any]] = []
        self.loads = np.zeros((0, 0), np.int64)

    def run(self) -> None:
        while True:
            for message in self.inbox.take(wait=self.parked):
                self.handle(message.body)
            if not self.parked:
                self.step()

    @property
    def parked(self) -> bool:
        serving = self.member and self.aborted < self.epoch
        return not (serving and (self.requests or self.scores))

    def handle(self, body: dict[str, Any]) -> None:
        match body["type"]:
            case "start":
                self.start(body)
            case "abort":
                self.aborted = max(self.aborted, body["epoch"])
                if self.rank != self.fake.get("busy"):
                    time.sleep(self.fake.get("halt", 0.0))
                    self.send({"type": "halted", "epoch": self.aborted})
            case "epoch":
                self.enter(body)
            case "add":
                packed = body["request"]
                self.requests[int(packed["request_id"])] = packed | {"output_ids": list(packed["output_ids"])}
            case "cancel":
                self.requests.pop(body["number"], None)
            case "bell":
                self.bell = max(self.bell, body["bell"])
            case "score":
                self.scores.append(body)
            case "prefetch":
                self.send({"type": "prefetched"})
            case "adopt":
                self.requests.clear()
                self.scores.clear()
                epoch = self.epoch if self.member and self.aborted < self.epoch else 0
                self.send({"type": "adopted", "epoch": epoch, "bells": self.bell, "device": "fake", "sizes": [1]})
            case "loads":
                self.send({"type": "loads", "shape": self.loads.shape}, self.loads.tobytes())
                self.loads[:] = 0
            case "status":
                counts = {"compilations": 0, "steps": self.steps, "prefill": self.prefill}
                self.send({"type": "status", **counts, "parked": self.parked})
            case other:
                raise ValueError(other)

    def start(self, body: dict[str, Any]) -> None:
        self.fake = fake = body["config"].get("fake", {})
        self.die("start")
        self.loads = np.zeros_like(fake.get("routes", [[]]), np.int64)
        time.sleep(fake.get("join", 0.0))
        error = fake.get("error")
        if error is not None and error["rank"] == self.rank:
            self.send({"type": "error", "kind": error["kind"], "message": error["message"]})
            time.sleep(0.05)
            os._exit(1)
        if fake.get("dies_with_service"):
            threading.Thread(target=die_with, args=(int(body["address"].rpartition(":")[2]),), daemon=True).start()
        self.send({"type": "joined"})
        self.die("joined")
        time.sleep(fake.get("load", 0.0))
        self.die("ready")
        seconds = {"join": fake.get("join", 0.0), "load": fake.get("load", 0.0), "compile": 0.0}
        generation = body["generation"]
        ready = {"type": "ready", "generation": generation, "compilations": 0, "seconds": seconds, "device": "fake"}
        self.send(ready | {"kernels": int(fake.get("kernels") == self.rank)})
        if "sizes" in fake:
            self.send({"type": "programs", "sizes": fake["sizes"]})

    def die(self, at: str) -> None:
        if self.fake.get("die") == {"rank": self.rank, "at": at}:
            time.sleep(0.05)  # what was said goes out
            os.kill(os.getpid(), signal.SIGKILL)

    def enter(self, body: dict[str, Any]) -> None:
        if self.fake.get("deaf") == {"rank": self.rank, "epoch": body["number"]}:
            return
        assert body["number"] > self.epoch, (body["number"], self.epoch)
        self.epoch, self.member, self.prefill = body["number"], self.rank in body["order"], body["prefill"]
        time.sleep(self.fake.get("enter", 0.0))
        ms = {"fail": 0.0, "load": 0.0, "rebuild": 1e3 * self.fake.get("enter", 0.0), "agree": 0.0}
        self.send({"type": "entered", "epoch": self.epoch, "ms": ms, "compilations": 0})

    def step(self) -> None:
        time.sleep(self.fake.get("step", 0.002))
        self.steps += 1
        events: list[list[Any]] = []
        for number, request in list(self.requests.items()):
            params, output = request["params"], request["output_ids"]
            index = len(output)
            output.append(token(params["seed"], index))
            self.loads += self.fake.get("routes", 0)
            reason = "length" if len(output) >= params["max_tokens"] else None
            events.append([number, index, output[-1], -0.5, [], reason])
            if reason is not None:
                del self.requests[number]
        if events:
            self.send({"type": "events", "epoch": self.epoch, "events": events})
        for body in self.scores:
            number, count = body["number"], len(body["token_ids"])
            rows = b"\0" * (4 * VOCABULARY * count)
            self.send({"type": "score", "number": number, "shape": [count, VOCABULARY]}, rows)
            self.send({"type": "score", "number": number, "done": True})
        self.scores.clear()


def die_with(port: int) -> None:
    with socket.create_connection(("127.0.0.1", port)) as connection:
        connection.recv(1)
    os.abort()


def main() -> None:
    channel = Channel.inherited(int(sys.argv[2]))
    FakeEngine(int(sys.argv[1]), Inbox(channel), Outbox(channel)).run()


if __name__ == "__main__":
    main()
