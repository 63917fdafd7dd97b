"""The supervisor of one rank: `python -m serving.worker --coordinator ADDR --rank R --host NAME`.

It speaks gRPC with the coordinator and owns the engine process, which must hold no foreign TCP socket and may be inside
a collective or a compilation for any length of time. It passes the engine's frames on unread (serving.relay), and says
five times a second that it lives and whether its engine does. A worker is both processes or none: when the engine ends
it reports that and exits, and whatever ends it takes the engine along.

SIGTERM and SIGINT: it asks for its host's requests to be moved away and ends when they have been, or some seconds
later; a second signal ends it at once.

Exit codes: 75 dismissed by the coordinator (start it again, if it shall come back), 1 failed, 0 told to end.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import signal
import sys
import time
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import grpc

from serving.access import TOKEN_HEADER, TOKEN_VARIABLE
from serving.channel import MAX_MESSAGE, encode
from serving.child import Child
from serving.credentials import add_credentials, credentials
from serving.environment import Platform, engine_environment, guess_platform
from serving.pipe import Pipe
from serving.protos import cluster_pb2 as pb
from serving.protos import cluster_pb2_grpc as rpc
from serving.relay import Reach, Relay, connect
from serving.tls import Tls

PROTOCOL = "4"  # of what is said on the stream; the coordinator dismisses any other
DISMISSED = 75  # EX_TEMPFAIL of sysexits.h: start it again
HEARTBEAT = 0.2  # seconds
KEEPALIVE = (  # of both ends
    ("grpc.keepalive_time_ms", 10_000),  # a cut is noticed, though nobody says goodbye
    ("grpc.keepalive_timeout_ms", 10_000),
    ("grpc.http2.max_pings_without_data", 0),
    ("grpc.http2.min_ping_interval_without_data_ms", 5_000),
)
GRPC_OPTIONS = (
    *KEEPALIVE,
    ("grpc.max_receive_message_length", MAX_MESSAGE),
    ("grpc.use_local_subchannel_pool", 1),
    ("grpc.enable_http_proxy", 0),  # of the environment, meant for other things
)
EOF: Any = grpc.aio.EOF  # type: ignore[attr-defined]  # what `read` gives at the end of a stream
# Seconds. While a driver takes a dead process's memory back, 0.3 s for 60 GB, other processes of the machine wait for
# their GPUs, survivors among them. An engine that is stopped may stay until these go on.
_SURVIVORS_FIRST = 1.0
_LOOK = 0.1  # seconds between two looks at the engine and the parent
_RETRY = (0.05, 0.5)  # seconds: the first and the longest pause between two tries to reach the coordinator
_LONGER = 1.25  # times, from one pause to the next: they stay about a fifth of the time it has been away


@dataclass(frozen=True)
class Options:
    coordinator: str
    rank: int
    host: str
    platform: Platform
    patience: float = 30.0  # seconds without a coordinator
    grace: float = 20.0  # seconds from a signal to end to ending
    engine: str = "serving.engine_process"  # a module; tests have another
    parent: int | None = None  # socket whose end means to exit
    tls: Tls | None = None  # None: the coordinator speaks none
    token: str | None = None  # of the cluster
    gpu: int | None = None  # as in engine_environment


class Supervisor:
    """Runs in one event loop until `exit_code` is set."""

    def __init__(self, options: Options) -> None:
        """Raises ValueError as engine_environment does."""
        self.options = options
        self.exit_code: asyncio.Future[int] = asyncio.get_running_loop().create_future()
        environ = {name: value for name, value in os.environ.items() if name != TOKEN_VARIABLE}
        self._environ = engine_environment(options.rank, options.platform, environ, options.gpu)
        self._engine: Child | None = None
        self._relay: Relay | None = None
        self._outgoing: asyncio.Queue[pb.WorkerMessage] = asyncio.Queue()
        self._connected = self._failed = self._leaving = False
        self._incarnation = 0
        self._parent = os.getppid()
        self._parent_pipe: Pipe | None = None
        if options.parent is not None:
            self._parent_pipe = Pipe(options.parent, lambda data: None, lambda: self._exit(0))

    async def run(self) -> int:
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self._leave)
        tasks = [asyncio.create_task(self._look()), asyncio.create_task(self._stay_connected())]
        try:
            await asyncio.wait([self.exit_code, *tasks], return_when=asyncio.FIRST_COMPLETED)
            for task in tasks:
                if task.done():
                    task.result()  # raises what ended it
            if self.options.platform == "cuda" and self._engine is not None and self._engine.stopped:
                for task in tasks:
                    task.cancel()  # nobody shall take this worker for a new one meanwhile
                await asyncio.sleep(_SURVIVORS_FIRST)
            return self.exit_code.result()
        finally:
            self._end_engine()

    def _exit(self, code: int) -> None:
        if not self.exit_code.done():
            self.exit_code.set_result(code)

    def _leave(self) -> None:
        """Whoever has no engine, or nobody to tell, has nothing to move."""
        if self._leaving or self._engine is None or not self._connected:
            return self._exit(0)
        self._leaving = True
        self._outgoing.put_nowait(pb.WorkerMessage(leaving=pb.Leaving()))
        asyncio.get_running_loop().call_later(self.options.grace, self._exit, 0)

    # The coordinator

    async def _stay_connected(self) -> None:
        """One stream after the other. The engine outlives a stream, so that another coordinator could take it over."""
        pause, since = _RETRY[0], time.monotonic()  # without a coordinator
        while True:
            heard = False
            try:
                async with self._channel() as channel:
                    token = self.options.token
                    call = rpc.ClusterStub(channel).Control(metadata=[(TOKEN_HEADER, token)] if token else None)
                    async for message in self._messages(call):
                        heard = True
                        self._obey(message)
            except grpc.aio.AioRpcError as e:
                error = e.details()
            else:
                error = "it closed the stream"
            if self._failed or self._leaving:
                return self._exit(1 if self._failed else 0)
            if heard:
                pause, since = _RETRY[0], time.monotonic()
            if time.monotonic() - since > self.options.patience:
                _say(f"coordinator {self.options.coordinator}: not reached for {self.options.patience:g} s: {error}")
                self._exit(1)
            await asyncio.sleep(pause)
            pause = min(_LONGER * pause, _RETRY[1])

    def _channel(self) -> grpc.aio.Channel:
        address, tls = self.options.coordinator, self.options.tls
        if tls is None:
            return grpc.aio.insecure_channel(address, options=GRPC_OPTIONS)
        return grpc.aio.secure_channel(address, tls.channel_credentials(), options=GRPC_OPTIONS)

    async def _messages(self, call: Any) -> AsyncIterator[Any]:
        """What the coordinator says on one stream, while what waits for it is written."""
        hello = pb.Hello(
            rank=self.options.rank,
            host=self.options.host,
            pid=os.getpid(),
            device=self.options.platform,
            version=PROTOCOL,
            incarnation=self._incarnation,
        )
        await call.write(pb.WorkerMessage(hello=hello))
        writing = asyncio.create_task(self._write(call))
        self._connected = True
        try:
            while (message := await call.read()) is not EOF:
                yield message
        finally:
            self._connected = False
            writing.cancel()
            await asyncio.wait([writing])
            if not writing.cancelled():
                writing.exception()  # the stream broke, as the reader has seen, too

    async def _write(self, call: Any) -> None:
        while True:
            await call.write(await self._outgoing.get())

    def _obey(self, message: Any) -> None:
        match message.WhichOneof("kind"):
            case "start":
                self._start_engine(message.start)
            case "welcome":
                self._incarnation = message.welcome.incarnation
            case "attach":
                self._attach_engine(message.attach)
            case "dismiss":
                _say(f"dismissed: {message.dismiss.reason}")
                self._exit(1 if self._failed else 0 if self._leaving else DISMISSED)

    # The engine

    def _start_engine(self, wanted: pb.StartEngine) -> None:
        self._end_engine()
        self._failed, self._incarnation = False, wanted.incarnation
        name, arguments = f"rank {self.options.rank}", [str(self.options.rank), "{fd}"]
        self._engine = engine = Child(name, self.options.engine, arguments, self._environ, log=2, session=False)
        loop = asyncio.get_running_loop()

        def ended() -> None:
            loop.call_soon_threadsafe(self._engine_ended, engine)

        self._relay = Relay(
            engine.channel.fileno(),
            encode(json.loads(wanted.start_json)),
            self._reach(wanted.port),
            _greeting(wanted.key, engine),
            ended,
        )
        engine.channel.close()  # the relay has it now

    def _attach_engine(self, wanted: pb.Attach) -> None:
        """The coordinator follows another one. If that fails it hears nothing of this engine, and has us replace it."""
        if self._engine is not None and self._relay is not None:
            arguments = self._reach(wanted.port), _greeting(wanted.key, self._engine)
            asyncio.get_running_loop().run_in_executor(None, self._relay.attach, *arguments)

    def _reach(self, port: int) -> Reach:
        host, tls = self.options.coordinator.rpartition(":")[0].strip("[]"), self.options.tls
        return partial(connect, (host, port), None if tls is None else tls.client_context())

    def _engine_ended(self, engine: Child) -> None:
        if engine is not self._engine:
            return
        with contextlib.suppress(Exception):
            engine.process.wait(0.02)  # for its exit code
        # The coordinator closes the stream, which ends this process; or else has us start another engine.
        self._failed = True
        self._outgoing.put_nowait(pb.WorkerMessage(ended=pb.EngineEnded(reason=engine.describe())))
        engine.kill()

    def _end_engine(self) -> None:
        if self._engine is not None and self._relay is not None:
            self._engine.kill()
            self._relay.close()
            with contextlib.suppress(Exception):
                self._engine.process.wait(5.0)
            self._engine.close()
        self._engine = self._relay = None

    async def _look(self) -> None:
        """Heartbeats: five times a second, and at once when the engine's state changes."""
        said, said_at = None, 0.0
        while True:
            if os.getppid() != self._parent:
                return self._exit(0)
            state = "X" if self._engine is None else self._engine.state
            beat = pb.Heartbeat(engine_running=state not in "XZ", engine_stopped=state in "tT")
            now = time.monotonic()
            if self._connected and (beat != said or now - said_at >= HEARTBEAT):
                self._outgoing.put_nowait(pb.WorkerMessage(heartbeat=beat))
                said, said_at = beat, now
            await asyncio.sleep(_LOOK)


def _greeting(key: str, engine: Child) -> bytes:
    return key.encode() + encode({"type": "started", "pid": engine.pid})


def _say(text: str) -> None:
    print(f"{time.strftime('%H:%M:%S')} worker: {text}", file=sys.stderr, flush=True)


def parse(argv: Sequence[str] | None) -> Options:
    parser = argparse.ArgumentParser(prog="serving.worker", description="One rank of a cluster.")
    parser.add_argument("--coordinator", required=True, metavar="ADDR", help="host:port of the coordinator")
    parser.add_argument("--rank", type=int, required=True, metavar="R", help="this worker's number, from 0")
    parser.add_argument("--host", required=True, metavar="NAME", help="label of the failure domain it belongs to")
    parser.add_argument("--platform", choices=("cpu", "cuda"), help="default: a GPU if there is one")
    parser.add_argument("--patience", type=float, default=30.0, metavar="S", help="seconds to go on uncoordinated")
    add_credentials(parser)
    parser.add_argument("--grace", type=float, default=20.0, metavar="S", help="seconds to leave in, after SIGTERM")
    parser.add_argument("--engine", default=Options.engine, help=argparse.SUPPRESS)
    parser.add_argument("--parent", type=int, help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    platform = args.platform or guess_platform(os.environ.get("JAX_PLATFORMS"))
    return Options(
        args.coordinator,
        args.rank,
        args.host,
        platform,
        args.patience,
        args.grace,
        args.engine,
        args.parent,
        **credentials(args),
    )


async def supervise(options: Options) -> int:
    """The exit code, once there is one."""
    return await Supervisor(options).run()


async def main() -> None:
    code = await supervise(parse(None))
    sys.stderr.flush()
    os._exit(code)  # nothing is left to say, and nothing shall keep this process that waits for a coordinator


if __name__ == "__main__":
    asyncio.run(main())
