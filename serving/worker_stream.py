"""The coordinator's end of its workers: gRPC and frames on one side, plain calls on the other.

It knows no membership: whoever owns it decides which stream is a member, and what is said to it.
"""

from __future__ import annotations

import asyncio
import json
import socket
import time
from collections.abc import Callable
from typing import Any, Protocol

import grpc

from serving.channel import Decoder, Message, encode
from serving.frame_server import FrameServer
from serving.pipe import Pipe
from serving.protos import cluster_pb2 as pb
from serving.protos import cluster_pb2_grpc as rpc
from serving.worker import EOF

_HELLO = 10.0  # seconds in which a stream must say who it is


class WorkerStream:
    """One worker process, as long as it is connected."""

    def __init__(self, hello: pb.Hello, frames: FrameServer, workers: Workers) -> None:
        self.rank, self.host, self.pid, self.device = hello.rank, hello.host, hello.pid, hello.device
        self.version, self.claimed = hello.version, hello.incarnation
        self.incarnation = 0  # as the coordinator draws it
        self.engine_pid: int | None = None
        self.generation = 0  # that its engine was started for
        self.heard = time.monotonic()
        self.ill_since: float | None = None  # when it was first seen to be stopped, ended or cut off
        self.steps = 0  # of its engine, as last heard
        self.usage: float | None = None  # of its engine's pages of the KV cache, 0 to 1
        self.told: tuple[int, bool] | None = None  # to membership: the steps, and whether there is work
        self.compiled: int | None = None  # programs, by its engine, as it last said
        self.kernels: int | None = None  # Executables.kernels_number of its engine, once that is ready
        self.seconds: dict[str, float] = {}  # that its engine took to start
        self.error: tuple[str, str] | None = None  # what its engine said before it ended: an exception's name and text
        self.answers: dict[str, dict[str, Any]] = {}  # to questions, the last one of each type
        self.dismissed: str | None = None  # why, if it was
        self.control: asyncio.Queue[pb.CoordinatorMessage] = asyncio.Queue()  # to be written
        self._workers, self._frames = workers, frames
        self._key = ""  # that its engine will come with
        self._pipe: Pipe | None = None  # to its engine
        self._decoder = Decoder()

    def welcome(self, incarnation: int) -> None:
        self.incarnation = incarnation
        self.control.put_nowait(pb.CoordinatorMessage(welcome=pb.Welcome(incarnation=incarnation)))

    def start_engine(self, generation: int, start: dict[str, Any]) -> None:
        """Nothing more is heard of the engine that it has."""
        self.disconnect()
        self.answers.clear()
        self.generation, self.engine_pid, self.steps, self.error, self.told = generation, None, 0, None, None
        self._key = self._frames.expect(self._connected)
        engine = pb.StartEngine(
            start_json=json.dumps(start), port=self._frames.port, key=self._key, incarnation=self.incarnation
        )
        self.control.put_nowait(pb.CoordinatorMessage(start=engine))

    def attach(self, incarnation: int, generation: int, connected: Callable[[], None]) -> None:
        """To the engine that it has, which another coordinator has started. `connected`: it may be spoken to."""

        def reached(sock: socket.socket) -> None:
            self._connected(sock)
            connected()

        self.incarnation, self.generation, self._key = incarnation, generation, self._frames.expect(reached)
        attach = pb.Attach(port=self._frames.port, key=self._key)
        self.control.put_nowait(pb.CoordinatorMessage(attach=attach))

    def dismiss(self, reason: str) -> None:
        if self.dismissed is None:
            self.dismissed = reason
            self.control.put_nowait(pb.CoordinatorMessage(dismiss=pb.Dismiss(reason=reason)))

    def send(self, body: dict[str, Any]) -> None:
        self.send_frames(encode(body))

    def send_frames(self, frames: bytes) -> None:
        """Whole frames for the engine. Dropped where there is none, or it is not wanted any more."""
        if self.dismissed is None and self._pipe is not None:
            self._pipe.write(frames)

    def catch_up(self) -> None:
        """Take in what its engine has said until now."""
        if self._pipe is not None:
            self._pipe.read()

    def disconnect(self) -> None:
        self._frames.forget(self._key)
        if self._pipe is not None:
            self._pipe.close()
        self._pipe = None

    def _connected(self, sock: socket.socket) -> None:
        self._decoder = Decoder()
        self._pipe = Pipe(sock, self._received, lambda: self._workers.worker_mute(self))

    def _received(self, frames: bytes) -> None:
        try:
            messages = self._decoder.feed(frames)
        except ValueError as e:
            self.disconnect()
            return self._workers.worker_mute(self, f"its engine sent what is no message ({e})")
        self._workers.worker_said(self, messages)


class Workers(Protocol):
    """Who is told of the streams. None of these may block or raise."""

    def worker_came(self, stream: WorkerStream) -> None:
        """To be answered with `welcome` or `dismiss`."""
        ...

    def worker_beat(self, stream: WorkerStream, running: bool, stopped: bool) -> None: ...
    def worker_said(self, stream: WorkerStream, messages: list[Message]) -> None: ...
    def worker_mute(self, stream: WorkerStream, reason: str = "its engine cannot be heard") -> None:
        """Nothing more comes from its engine, for another reason than that it ended."""
        ...

    def worker_ended(self, stream: WorkerStream, reason: str) -> bool:
        """Its engine ended. Whether the worker may stay, to be told to start another."""
        ...

    def worker_leaves(self, stream: WorkerStream) -> None:
        """It was told to end, and waits to be dismissed."""
        ...

    def worker_gone(self, stream: WorkerStream, reason: str) -> None:
        """The stream is no more; nothing follows."""
        ...


class ClusterService(rpc.ClusterServicer):
    def __init__(self, workers: Workers, frames: FrameServer) -> None:
        self._workers, self._frames = workers, frames

    async def Control(self, request_iterator: Any, context: grpc.aio.ServicerContext) -> None:
        try:
            first = await asyncio.wait_for(context.read(), _HELLO)
        except TimeoutError:
            first = EOF
        if first is EOF or first.WhichOneof("kind") != "hello":
            await context.abort(grpc.StatusCode.INVALID_ARGUMENT, "first message: expected Hello")
        stream, reason = WorkerStream(first.hello, self._frames, self._workers), "its stream ended"
        writing = asyncio.create_task(_write(stream.control, context))
        self._workers.worker_came(stream)
        try:
            while (message := await context.read()) is not EOF:
                stream.heard = time.monotonic()
                if not self._take(stream, message):
                    return
        except asyncio.CancelledError:
            reason = "its stream broke"
            raise
        finally:
            writing.cancel()
            stream.disconnect()
            self._workers.worker_gone(stream, reason)
            await asyncio.wait([writing])
            if not writing.cancelled():
                writing.exception()  # the stream broke, as the reader has seen, too

    def _take(self, stream: WorkerStream, message: pb.WorkerMessage) -> bool:
        """Whether to go on listening."""
        match message.WhichOneof("kind"):
            case "heartbeat":
                beat = message.heartbeat
                self._workers.worker_beat(stream, beat.engine_running, beat.engine_stopped)
            case "leaving":
                self._workers.worker_leaves(stream)
            case "ended":
                return self._workers.worker_ended(stream, message.ended.reason)
        return True


async def _write(messages: asyncio.Queue[pb.CoordinatorMessage], context: grpc.aio.ServicerContext) -> None:
    while True:
        await context.write(await messages.get())
