"""What operators ask of a cluster (protos/inference.proto, service Admin). The audit log has each change they want."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import grpc

from serving.access import audit, caller
from serving.coordinator import Coordinator, Unavailable
from serving.errors import CODES, FailedPrecondition, NotFound, abort
from serving.protos import inference_pb2 as pb
from serving.protos import inference_pb2_grpc as rpc


class Admin(rpc.AdminServicer):
    def __init__(self, coordinator: Coordinator) -> None:
        self._coordinator = coordinator
        self._watchers: set[asyncio.Event] = set()
        self._change: pb.WatchResponse | None = None  # the last one, once somebody has been told
        self._closed = False

    def changed(self) -> None:
        """State or epoch: whoever watches is told."""
        self._change = None
        for wake in self._watchers:
            wake.set()

    def close(self) -> None:
        """Those who watch are told no more."""
        self._closed = True
        self.changed()

    async def Status(self, request: pb.StatusRequest, context: grpc.aio.ServicerContext) -> pb.StatusResponse:
        if request.load:
            await self._coordinator.rebalancing.gather()
        return pb.StatusResponse(json=json.dumps(self._coordinator.status(request.slots, request.load)))

    async def Watch(self, request: pb.WatchRequest, context: grpc.aio.ServicerContext) -> None:
        wake, told = asyncio.Event(), None
        self._watchers.add(wake)
        try:
            while not self._closed:
                wake.clear()
                if told is None:
                    response = self._present()
                else:  # thousands may watch, and a recovery is no time to count slots for each
                    response = self._change = self._change or self._present()
                seen = response.epoch, response.state, response.reason
                if seen != told:
                    told = seen
                    await context.write(response)
                await wake.wait()
        finally:
            self._watchers.discard(wake)

    def _present(self) -> pb.WatchResponse:
        status = self._coordinator.status()
        ranks = [rank["rank"] for rank in status["ranks"] if rank["state"] == "live"]
        response = pb.WatchResponse(
            epoch=status["epoch"], state=status["state"], reason=status["reason"], ranks=ranks, time=time.time()
        )
        records = [r for r in status["recoveries"] + status["switches"] if r["epoch"] == status["epoch"]]
        for record in records:
            phases = {k.removesuffix("_ms"): v for k, v in record.items() if k.endswith("_ms") and v is not None}
            given = {name: record[name] for name in ("epoch", "cause", "reasons", "lost", "joined")}
            response.recovery.CopyFrom(pb.Recovery(phases_ms=phases, **given))
        return response

    async def Drain(self, request: pb.DrainRequest, context: grpc.aio.ServicerContext) -> pb.DrainResponse:
        response = pb.DrainResponse()
        async with _audited(context, f"Drain {request.host[:256]!r}"):
            try:
                response = pb.DrainResponse(**await self._coordinator.drain(request.host))
            except LookupError as e:
                raise NotFound(str(e)) from None
        return response

    async def Undrain(self, request: pb.UndrainRequest, context: grpc.aio.ServicerContext) -> pb.UndrainResponse:
        response = pb.UndrainResponse()
        async with _audited(context, f"Undrain {request.host[:256]!r}"):
            try:
                response = pb.UndrainResponse(**await self._coordinator.undrain(request.host))
            except LookupError as e:
                raise NotFound(str(e)) from None
        return response

    async def Rebalance(self, request: pb.RebalanceRequest, context: grpc.aio.ServicerContext) -> pb.RebalanceResponse:
        response = pb.RebalanceResponse()
        async with _audited(context, "Rebalance"):
            response = pb.RebalanceResponse(**await self._coordinator.rebalancing.rebalance())
        return response


@asynccontextmanager
async def _audited(context: grpc.aio.ServicerContext, what: str) -> AsyncIterator[None]:
    """Who had what done, or tried, and how it ended. What is not possible now is FAILED_PRECONDITION."""

    def log(outcome: str) -> None:
        who = {"key": caller().name, "peer": context.peer(), "outcome": outcome}
        audit.info("%s by %r from %s: %s", what, who["key"], who["peer"], outcome, extra=who)

    try:
        yield
    except (NotFound, Unavailable) as e:
        error = FailedPrecondition(str(e)) if isinstance(e, Unavailable) else e
        log(CODES[type(error)].name)
        await abort(context, error, 0.0)
    except BaseException as e:
        log(type(e).__name__)  # cancelled, above all
        raise
    else:
        log("OK")
