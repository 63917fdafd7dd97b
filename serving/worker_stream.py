"""The coordinator's end of the workers' control streams: gRPC on one side, plain calls on the other.

It knows no membership: whoever owns it decides which stream is a member, and what is said to it.
"""

from __future__ import annotations

import asyncio
import json
import time
from typing import Any, Protocol

import grpc

from serving.channel import Decoder, Message, encode
from serving.outgoing import Outgoing
from serving.protos import cluster_pb2 as pb
from serving.protos import cluster_pb2_grpc as rpc
from serving.worker import EOF

MAX_WAITING = 64 << 20  # bytes that a worker may be behind; beyond that it does not listen
_HELLO = 10.0  # seconds in which a stream must say who it is


class WorkerStream:
    """One worker process, as long as it is connected."""

    def __init__(self, hello: pb.Hello) -> None:
        self.rank, self.host, self.pid, self.device = hello.rank, hello.host, hello.pid, hello.device
        self.version, self.claimed = hello.version, hello.incarnation
        self.incarnation = 0  # as the coordinator draws it
        self.engine_pid: int | None = None
        self.generation = 0  # that its engine was started for
        self.heard = time.monotonic()
        self.ill_since: float | None = None  # when it was first seen to be stopped, ended or cut off
        self.steps = 0  # of its engine, as last heard
        self.seconds: dict[str, float] = {}  # that its engine took to start
        self.error: tuple[str, str] | None = None  # what its engine said before it ended: an exception's name and text
        self.answers: dict[str, dict[str, Any]] = {}  # to questions, the last one of each type
        self.dismissed: str | None = None  # why, if it was
        self.outgoing = Outgoing[pb.CoordinatorMessage](lambda frames: pb.CoordinatorMessage(frame=frames))
        self._decoder = Decoder()
        self._awaited = False  # an engine was asked for, and what comes is still from one before it

    def welcome(self, incarnation: int) -> None:
        self.incarnation = incarnation
        self.outgoing.put(pb.CoordinatorMessage(welcome=pb.Welcome(incarnation=incarnation)))

    def start_engine(self, generation: int, start: dict[str, Any]) -> None:
        self.generation, self.engine_pid, self._awaited = generation, None, True
        self.steps, self.error = 0, None
        self.outgoing.put(pb.CoordinatorMessage(start=pb.StartEngine(start_json=json.dumps(start))))

    def dismiss(self, reason: str) -> None:
        if self.dismissed is None:
            self.dismissed = reason
            self.outgoing.put(pb.CoordinatorMessage(dismiss=pb.Dismiss(reason=reason)))

    def send(self, body: dict[str, Any]) -> None:
        self.send_frames(encode(body))

    def send_frames(self, frames: bytes) -> None:
        """Whole frames for the engine. What is sent to a dismissed worker is dropped."""
        if self.dismissed is None:
            self.outgoing.put_frames(frames)

    @property
    def listens(self) -> bool:
        return self.outgoing.waiting <= MAX_WAITING

    def messages(self, frames: bytes) -> list[Message]:
        """What the engine says; nothing of an engine that has been replaced. Raises ValueError for broken frames."""
        messages = self._decoder.feed(frames)
        if not self._awaited:
            return messages
        for i, message in enumerate(messages):
            if message.body["type"] == "started":
                self._awaited, self.engine_pid = False, message.body["pid"]
                return messages[i + 1 :]
        return []


class Workers(Protocol):
    """Who is told of the streams. None of these may block or raise."""

    def worker_came(self, stream: WorkerStream) -> None:
        """To be answered with `welcome` or `dismiss`."""
        ...

    def worker_beat(self, stream: WorkerStream, running: bool, stopped: bool) -> None: ...
    def worker_said(self, stream: WorkerStream, messages: list[Message]) -> None: ...
    def worker_ended(self, stream: WorkerStream, reason: str) -> bool:
        """Its engine ended. Whether the worker may stay, to be told to start another."""
        ...

    def worker_gone(self, stream: WorkerStream, reason: str) -> None:
        """The stream is no more; nothing follows."""
        ...


class ClusterService(rpc.ClusterServicer):
    def __init__(self, workers: Workers) -> None:
        self._workers = workers

    async def Control(self, request_iterator: Any, context: grpc.aio.ServicerContext) -> None:
        try:
            first = await asyncio.wait_for(context.read(), _HELLO)
        except TimeoutError:
            first = EOF
        if first is EOF or first.WhichOneof("kind") != "hello":
            await context.abort(grpc.StatusCode.INVALID_ARGUMENT, "first message: expected Hello")
        stream, reason = WorkerStream(first.hello), "its stream ended"
        writing = asyncio.create_task(stream.outgoing.run(context.write))
        self._workers.worker_came(stream)
        try:
            while (message := await context.read()) is not EOF:
                stream.heard = time.monotonic()
                if not self._take(stream, message):
                    return
        except asyncio.CancelledError:
            reason = "its stream broke"
            raise
        except ValueError as e:
            reason = f"it sent what is no message ({e})"
        finally:
            writing.cancel()
            self._workers.worker_gone(stream, reason)
            await asyncio.wait([writing])
            if not writing.cancelled():
                writing.exception()  # the stream broke, as the reader has seen, too

    def _take(self, stream: WorkerStream, message: pb.WorkerMessage) -> bool:
        """Whether to go on listening."""
        match message.WhichOneof("kind"):
            case "frame":
                self._workers.worker_said(stream, stream.messages(message.frame))
            case "heartbeat":
                beat = message.heartbeat
                self._workers.worker_beat(stream, beat.engine_running, beat.engine_stopped)
            case "ended":
                return self._workers.worker_ended(stream, message.ended.reason)
        return True
