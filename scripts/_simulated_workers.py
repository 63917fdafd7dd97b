"""Workers that compute nothing, as many in one process as wanted: python scripts/_simulated_workers.py ADDRESS FIRST N

Each has a gRPC stream and a connection for frames of its own, as a supervisor and its engine have; heartbeats at their
pace. Frames are looked at, not parsed: a thousand engines have a thousand processors for that, these have one.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import re
import sys
from typing import Any

import grpc

from serving.channel import encode, whole_frames
from serving.protos import cluster_pb2 as pb
from serving.protos import cluster_pb2_grpc as rpc
from serving.worker import EOF, HEARTBEAT, KEEPALIVE, PROTOCOL

_EPOCH = re.compile(rb'\{"type":"epoch","number":(\d+)')


async def work(address: str, rank: int) -> None:
    """One worker, until its stream ends or it is dismissed."""
    async with grpc.aio.insecure_channel(address, options=KEEPALIVE) as channel:
        call = rpc.ClusterStub(channel).Control()
        hello = pb.Hello(rank=rank, host=f"host{rank:04}", pid=os.getpid(), device="none", version=PROTOCOL)
        await call.write(pb.WorkerMessage(hello=hello))
        tasks = [asyncio.create_task(_beat(call, rank))]
        try:
            while (message := await call.read()) is not EOF:
                match message.WhichOneof("kind"):
                    case "start":
                        host = address.rpartition(":")[0]
                        tasks.append(asyncio.create_task(_engine(host, message.start)))
                    case "dismiss":
                        return
        except grpc.aio.AioRpcError:
            pass  # the coordinator is gone
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.wait(tasks)


async def _beat(call: Any, rank: int) -> None:
    beat = pb.WorkerMessage(heartbeat=pb.Heartbeat(engine_running=True))
    await asyncio.sleep(HEARTBEAT * (rank % 97) / 97)  # not all at once
    with contextlib.suppress(grpc.aio.AioRpcError, asyncio.InvalidStateError):
        while True:
            await call.write(beat)
            await asyncio.sleep(HEARTBEAT)


async def _engine(host: str, start: pb.StartEngine) -> None:
    generation = json.loads(start.start_json)["generation"]
    reader, writer = await asyncio.open_connection(host, start.port, limit=1 << 24)
    ready = {"type": "ready", "generation": generation, "seconds": {}, "device": "none", "kernels": 0}
    said = [{"type": "started", "pid": os.getpid()}, {"type": "joined"}, ready]
    writer.write(start.key.encode() + b"".join(map(encode, said)))
    rest = bytearray()
    with contextlib.suppress(ConnectionError):
        while data := await reader.read(1 << 18):
            rest += data
            if size := whole_frames(rest):
                for number in _EPOCH.findall(bytes(rest[:size])):
                    entered = {"type": "entered", "epoch": int(number), "ms": {}, "compilations": 0}
                    writer.write(encode(entered))
                del rest[:size]


async def main() -> None:
    address, first, count = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
    await asyncio.gather(*(work(address, rank) for rank in range(first, first + count)))


if __name__ == "__main__":
    asyncio.run(main())
