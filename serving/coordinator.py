"""The coordinator: what binds workers, membership and requests together. It holds no device.

Decisions are elsewhere: who is in the mesh in serving.membership, which request is where in serving.ledger. Here their
actions are carried out, and what happens is told to them. Everything runs in one event loop, and nothing in it waits:
from the evidence of a loss to the abort of its survivors' collectives no other task gets a turn.
"""

from __future__ import annotations

import asyncio
import logging
import os
import time
from collections import deque
from collections.abc import Callable, Coroutine, Sequence
from dataclasses import dataclass
from typing import Any

import grpc
import numpy as np

from moe_jax.request import Request
from serving import actions as act
from serving import membership as m
from serving.access import Guard
from serving.admission import Owner
from serving.channel import MAX_MESSAGE, Message, encode
from serving.cluster import Cluster, sizes_after
from serving.drains import Drains
from serving.epoch import Epoch
from serving.fences import Fences
from serving.frame_server import FrameServer
from serving.journal import Journal
from serving.ledger import Entry, Place
from serving.membership import Membership
from serving.metrics import Metrics, Step
from serving.protos import cluster_pb2_grpc as rpc
from serving.rebalancing import Rebalancing
from serving.recoveries import Recoveries
from serving.router import Listener, Oblivion, Router
from serving.service_process import ServiceProcess
from serving.status import describe, ready_sizes
from serving.takeover import Takeover
from serving.tls import Tls
from serving.wire import WellFormed
from serving.worker import KEEPALIVE, PROTOCOL
from serving.worker_stream import ClusterService, WorkerStream

log = logging.getLogger(__name__)

_NOBODY = Owner()
_PENDING = 1 << 12
MAX_REQUEST = 4 << 20  # bytes of a message to this server: a prompt of a million tokens
SERVER_OPTIONS = (
    *KEEPALIVE,
    ("grpc.max_receive_message_length", MAX_REQUEST),
    ("grpc.max_send_message_length", MAX_MESSAGE),
    ("grpc.max_metadata_size", 16 << 10),
    ("grpc.http2.min_time_between_pings_ms", 5_000),
    ("grpc.so_reuseport", 0),
    # Calls that have come and are not yet begun. What is more gRPC ends with CANCELLED, at random: what is too much is
    # for the services to say, with the status that it should have.
    ("grpc.server.max_pending_requests", _PENDING),
    ("grpc.server.max_pending_requests_hard_limit", _PENDING),
)
_TICK = 0.2  # seconds, unless something is due before
_STOOD_STILL = 0.5  # seconds between two ticks
_FENCED = 64  # incarnations that are remembered
_PATIENCE = 1.0  # seconds for workers to go at the end


class Unavailable(RuntimeError):
    """New requests are refused for now; the message says why."""


@dataclass
class Watcher:
    """What others may want to know at once. None of these may block or raise."""

    engine_failed: Callable[[int, str, str], None] = lambda rank, kind, text: None  # kind: an exception's name, or ""
    dismissed: Callable[[int, int], None] = lambda rank, pid: None  # its supervisor has been told to exit
    drained: Callable[[str], None] = lambda host: None  # before its ranks are: nobody shall start them again
    # It may come back: start its workers. None: who starts them is elsewhere.
    wanted: Callable[[str], None] | None = None
    changed: Callable[[str, str], None] = lambda state, reason: None
    served: Callable[[Epoch], None] = lambda epoch: None  # all its members have entered it
    failed: Callable[[Exception], None] = lambda error: None  # the journal: nothing goes on, close the coordinator


class Coordinator:
    """Belongs to the running event loop; no method may be called from elsewhere."""

    def __init__(
        self,
        cluster: Cluster,
        journal: Journal | None = None,
        watcher: Watcher | None = None,
        tls: Tls | None = None,
        guard: Guard | None = None,
    ) -> None:
        """Without a journal nothing outlives this process. With one, the requests that are in it go on.

        tls, guard: for all who connect; without them everybody may, in plain text.
        """
        self.cluster, self.watcher = cluster, watcher or Watcher()
        self.address = ""
        self._membership = Membership(cluster.rules)
        self._journal = journal or Oblivion()
        self._membership.restore_from(*self._journal.last_numbers)
        self._recoveries = Recoveries()
        self.metrics = Metrics()
        self.router = Router(
            self._journal,
            self._recoveries,
            self._send,
            self._journal_failed,
            cluster.limits,
            cluster.max_tokens,
            cluster.max_wait,
            self.metrics,
            len(cluster.rules.hosts),
        )
        self._actions: deque[act.Action] = deque()
        self._acting = False
        self._numbers = self._membership.numbers
        self._streams: dict[int, WorkerStream] = {}  # of registered workers, by each incarnation they had
        self._current: dict[int, WorkerStream] = {}  # the last that registered, by rank
        self._services: dict[int, ServiceProcess] = {}  # by generation
        self._nodes: dict[int, tuple[int, ...]] = {}
        self._fences = Fences(cluster.halt_s)
        self._epochs: dict[int, int] = {}  # incarnation: in how many it has been, of the current members
        self._moved: asyncio.Future[str] | None = None  # the cause of the epoch that serves when no more is to move
        self.rebalancing = Rebalancing(self, cluster.policy)
        self._drains = Drains(self._journal.get, self._put)
        self._inherited_drains: list[str] = []  # hosts that another coordinator was draining
        self._background: set[asyncio.Task[None]] = set()
        self._served = False  # ever
        self._compiled = 0  # programs, while epochs waited for them since then
        self._tick_at = 0.0
        self._ticked = time.monotonic()
        self._timer: asyncio.TimerHandle | None = None
        self._closed = False
        self._server: grpc.aio.Server | None = None
        self._tls, self._guard = tls, guard
        self._frames = FrameServer(None if tls is None else tls.server_context())
        self._takeover: Takeover | None = None  # while it lasts, membership is not told of anything
        self._early: list[WorkerStream] = []  # that came meanwhile and have no part in it
        self._taken_over: list[int] = []  # ranks
        self._inherited = self._numbers[1]  # incarnations up to this one are another coordinator's
        self._lost: list[int] = list(self._journal.get("lost", ()) or ())  # incarnations, the last that were fenced

    async def start(self, address: str = "127.0.0.1:0", faces: Sequence[Callable[[grpc.aio.Server], None]] = ()) -> str:
        """Listen; returns "host:port". `faces` may add other services to the server. Raises OSError if it is taken."""
        guards = [] if self._guard is None else [self._guard]
        self._server = grpc.aio.server(interceptors=[*guards, WellFormed()], options=SERVER_OPTIONS)
        rpc.add_ClusterServicer_to_server(ClusterService(self, self._frames), self._server)
        for face in faces:
            face(self._server)
        try:
            if self._tls is None:
                port = self._server.add_insecure_port(address)
            else:
                port = self._server.add_secure_port(address, self._tls.server_credentials())
        except RuntimeError as e:
            raise OSError(f"address {address}: cannot listen there: {e}") from None
        self._frames.start(address.rpartition(":")[0].strip("[]"))
        self._find_predecessor()
        if self._takeover is None:
            self._drains.forget(*self._drains.kept)
        await self._server.start()
        self.address = f"{address.rpartition(':')[0]}:{port}"
        self._tick()
        self.rebalancing.start()
        return self.address

    async def close(self) -> None:
        """Dismiss all workers, end the service. Requests that have not ended stay in the journal."""
        self._closed = True
        self.rebalancing.stop()
        if self._timer is not None:
            self._timer.cancel()
        for stream in self._current.values():
            stream.dismiss("the coordinator closes")
        deadline = time.monotonic() + _PATIENCE
        while self._current and time.monotonic() < deadline:
            await asyncio.sleep(0.005)
        self._frames.close()
        if self._server is not None:
            await self._server.stop(None)
        for service in list(self._services.values()):
            service.close()

    @property
    def recoveries(self) -> Sequence[m.Recovery]:
        """How the last epochs came to be; times as time.monotonic."""
        return self._membership.recoveries

    # Requests

    @property
    def unservable(self) -> str | None:
        """Why nothing is served until ranks return; None if something is, or will be soon."""
        return self._membership.reason if self._membership.state == "UNSERVABLE" else None

    @property
    def epoch(self) -> int:
        """The last that was announced; 0: none."""
        return 0 if self._membership.epoch is None else self._membership.epoch.number

    def submit(
        self,
        request: Request,
        listener: Listener,
        wait: bool = False,
        owner: Owner = _NOBODY,
        priority: int = 0,
    ) -> Entry:
        """Serve a request: `listener` hears every token of it, from the first on, in order, once.

        The same request again attaches another listener, also if it ended a while ago. wait: accept it also while
        nothing can be served, and however long it will wait. owner: whose bounds it counts for, and whose turn it
        waits for.
        Raises ValueError for what can never be served, ledger.AlreadyExists, scheduler.QueueFull, Unavailable.
        """
        self.cluster.limits.check(request)
        if not wait and self.unservable is not None and self.router.ledger.find(request.request_id) is None:
            raise Unavailable(self.unservable)
        return self.router.submit(request, listener, owner, priority, wait)

    def finish(self, entry: Entry) -> None:
        """Its text is complete, by a stop string of which the engine does not know. Nothing more is heard of it."""
        self.router.finish(entry)

    def cancel(self, entry: Entry) -> None:
        """Forget it; nothing more is heard of it."""
        self.router.cancel(entry)

    async def score(self, token_ids: Sequence[int], chunk: int | None = None) -> np.ndarray:
        """float32 [T, vocab] as LLM.score. Raises ValueError for what an engine refuses, QueueFull."""
        return await self.router.score(token_ids, chunk)

    def _send(self, incarnation: int, frames: bytes) -> None:
        if incarnation in self._streams:
            self._streams[incarnation].send_frames(frames)

    def _put(self, name: str, value: Any) -> None:
        self.router.keep(lambda: self._journal.put(name, value))

    def _journal_failed(self, error: Exception) -> None:
        self._closed = True
        self.watcher.failed(error)

    # What workers say (worker_stream.Workers)

    def worker_came(self, stream: WorkerStream) -> None:
        if stream.version != PROTOCOL:
            return stream.dismiss(f"found protocol {stream.version!r}, expected {PROTOCOL!r}: install the same version")
        if self._takeover is not None:
            if self._takeover.expects(stream.rank, stream.claimed):
                self._attach(stream)
            else:
                self._early.append(stream)
                if not stream.claimed:
                    self._takeover.replaced(stream.rank)
                    self._look_at_takeover()
            return
        if stream.claimed > self._inherited:
            return stream.dismiss(f"rank {stream.rank} was lost as incarnation {stream.claimed}")
        self._register(stream)

    def _register(self, stream: WorkerStream) -> None:
        incarnation, actions = self._membership.hello(stream.rank, stream.host, time.monotonic())
        self._keep_numbers()
        stream.welcome(incarnation)
        self._streams[incarnation] = stream
        if not any(isinstance(a, act.Dismiss) and a.incarnation == incarnation for a in actions):
            self._current[stream.rank] = stream
        self._do(actions)

    def worker_beat(self, stream: WorkerStream, running: bool, stopped: bool) -> None:
        rank, incarnation, now = stream.rank, stream.incarnation, time.monotonic()
        if not incarnation or self._closed or self._takeover is not None:
            return
        done = stream.steps, self.router.ledger.load(Place(rank, incarnation)).jobs > 0
        if done != stream.told:
            stream.told = done
            self._do(self._membership.progress(rank, incarnation, *done, now))
        if stopped:
            stream.ill_since = stream.ill_since or now
        self._do(self._membership.heartbeat(rank, incarnation, now, running, stopped))

    def worker_ended(self, stream: WorkerStream, reason: str) -> bool:
        if not stream.incarnation or stream.dismissed is not None or self._closed or self._takeover is not None:
            return False
        if stream.generation not in self._services:
            return True  # it died with the JAX service; another will be started
        stream.catch_up()  # on why it ended
        stream.ill_since = time.monotonic()
        kind, text = stream.error or ("", reason)
        what = _first_line(text).removeprefix(f"rank {stream.rank}: ")
        self._do(self._membership.lost(stream.rank, stream.incarnation, what, stream.ill_since))
        self.watcher.engine_failed(stream.rank, kind, text)
        return False

    def worker_mute(self, stream: WorkerStream, reason: str = "its engine cannot be heard") -> None:
        if self._takeover is not None:
            self._takeover.gone(stream.rank)
        elif stream.incarnation and not self._closed and stream.dismissed is None:
            stream.ill_since = time.monotonic()
            self._do(self._membership.lost(stream.rank, stream.incarnation, reason, stream.ill_since))

    def worker_leaves(self, stream: WorkerStream) -> None:
        self._start_task(self._let_go(stream))

    async def _let_go(self, stream: WorkerStream) -> None:
        """It ends in any case, so the other ranks of its host leave with it, while that can be done in order."""
        try:
            await self.drain(stream.host, away=False)
        except (LookupError, Unavailable) as e:
            log.warning("rank %d: ends without having been drained: %s", stream.rank, e)
            stream.dismiss("it was told to end")

    def worker_gone(self, stream: WorkerStream, reason: str) -> None:
        now = time.monotonic()
        stream.ill_since = stream.ill_since or now
        if self._takeover is not None:
            self._takeover.gone(stream.rank)
            self._early = [s for s in self._early if s is not stream]
        elif stream.incarnation and not self._closed:
            self._do(self._membership.lost(stream.rank, stream.incarnation, reason, now))
        self._streams = {i: s for i, s in self._streams.items() if s is not stream}
        if self._current.get(stream.rank) is stream:
            del self._current[stream.rank]

    def worker_said(self, stream: WorkerStream, messages: list[Message]) -> None:
        if stream.dismissed is not None or not stream.incarnation or self._closed:
            return
        rank, incarnation = stream.rank, stream.incarnation
        for message in messages:
            body = message.body
            match body["type"]:
                case "started":
                    stream.engine_pid = body["pid"]
                case "adopted":
                    self._adopted(stream, body)
                case _ if self._takeover is not None:
                    pass  # not before it is clear who is who
                case "events":
                    stream.steps = body.get("steps", stream.steps + 1)
                    stream.usage = body.get("usage")
                    self.router.take_events(incarnation, Step(body["epoch"], rank, stream.steps), body["events"])
                case "score":
                    self.router.take_score(rank, incarnation, message)
                case "arrived":
                    self._do(self._membership.arrived(rank, incarnation, body["epoch"], time.monotonic()))
                case "joined":
                    self._do(self._membership.joined(rank, incarnation, stream.generation, time.monotonic()))
                case "ready":
                    stream.device, stream.seconds = body["device"], body["seconds"]
                    stream.compiled, stream.kernels = body.get("compilations"), body["kernels"]
                    others = [s for s in self._current.values() if s.kernels is not None and s.dismissed is None]
                    if unlike := [s for s in others if s.kernels != stream.kernels]:
                        why = f"its kernels are not those of rank {unlike[0].rank}: use the same moe-jax, C++ compiler "
                        self.worker_mute(stream, why + "and kind of processor everywhere, or --kernels xla")
                        continue
                    self._do(self._membership.ready(rank, incarnation, body["generation"], time.monotonic()))
                case "entered":
                    self._compiled += body["compilations"] if self._served else 0
                    stream.compiled = body.get("compiled", stream.compiled)
                    self._recoveries.entered(body["epoch"], body["ms"])
                    self._do(self._membership.entered(rank, incarnation, body["epoch"], time.monotonic()))
                case "halted":
                    self._fences.halted(incarnation, body["epoch"])
                case "failed":
                    log.warning("rank %d: epoch %d: %s", rank, body["epoch"], body["message"])
                    self._do(self._membership.failed(rank, incarnation, body["epoch"], time.monotonic()))
                case "loads":
                    counts = np.frombuffer(message.blob, np.int64).reshape(body["shape"])
                    self.rebalancing.loads.add(counts, time.monotonic())
                    stream.answers["loads"] = body
                case "prefetched":
                    self._do(self._membership.prefetched(rank, incarnation, time.monotonic()))
                case "error":
                    stream.error = body["kind"], body["message"]
                case other:
                    stream.answers[other] = body

    # What the JAX service does (service_process.ServiceEvents)

    def service_started(self, service: ServiceProcess) -> None:
        if self._takeover is not None:
            return self._look_at_takeover()
        nodes = self._nodes[service.generation]
        self._put("service", [service.generation, nodes, service.name])
        self._do(self._membership.service_up(service.generation, time.monotonic()))

    def service_fenced(self, service: ServiceProcess, node: int) -> None:
        rank, incarnation = self._fences.answered(service.generation, node)
        self._do(self._membership.fenced(rank, incarnation, time.monotonic()))

    def service_failed(self, service: ServiceProcess, reason: str) -> None:
        log.warning("%s", reason)
        self._services.pop(service.generation, None)
        if self._takeover is not None:
            return self._end_takeover()
        self._do(self._membership.service_lost(service.generation, time.monotonic()))

    # Another coordinator's workers (serving.takeover)

    def _find_predecessor(self) -> None:
        epoch, service = self._journal.last_epoch, self._journal.get("service")
        if epoch is None or service is None:
            return
        generation, nodes, name = service
        try:
            process = ServiceProcess.take_over(generation, name, self)
        except OSError as e:
            return log.info("JAX service %d: not found: %s", generation, e)
        if generation != epoch.generation or generation != self._membership.generation:
            return process.close()  # another generation was being started: let it start anew
        self._services[generation], self._nodes[generation] = process, tuple(nodes)
        self._takeover = Takeover(epoch, tuple(nodes), set(self._lost), time.monotonic())

    def _attach(self, stream: WorkerStream) -> None:
        """Have the worker's engine say where it stands."""
        assert self._takeover is not None
        stream.attach(stream.claimed, self._takeover.epoch.generation, lambda: stream.send({"type": "adopt"}))
        self._streams[stream.incarnation] = self._current[stream.rank] = stream

    def _adopted(self, stream: WorkerStream, answer: dict[str, Any]) -> None:
        if self._takeover is not None and self._current.get(stream.rank) is stream:
            stream.device, stream.seconds = answer.get("device", stream.device), answer.get("seconds", {})
            stream.kernels = answer.get("kernels")
            stream.answers["programs"] = {"sizes": answer.get("sizes", [])}
            self.router.bell = max(self.router.bell, answer["bells"])
            self._takeover.answered(stream.rank, answer, time.monotonic())
            self._look_at_takeover()

    def _look_at_takeover(self) -> None:
        """Whether it is time to go on. The service must have said where it is, for ranks that join."""
        takeover = self._takeover
        if takeover is None or not takeover.over(time.monotonic()):
            return
        service = self._services.get(takeover.epoch.generation)
        if service is not None and service.address is not None:
            self._end_takeover()

    def _end_takeover(self) -> None:
        takeover, self._takeover = self._takeover, None
        assert takeover is not None
        now, epoch = time.monotonic(), takeover.epoch
        found = [self._current[rank] for rank in sorted(takeover.answers)]
        others = [s for s in self._current.values() if s not in found] + self._early
        self._early.clear()
        self._streams = {s.incarnation: s for s in found}
        self._current = {s.rank: s for s in found}
        if epoch.generation in self._services and found:
            log.info("took over ranks %s in epoch %d", [s.rank for s in found], epoch.number)
            self._served = True
            self._taken_over = [s.rank for s in found]
            self._inherited_drains = self._drains.kept
            orders = self._journal.orders(epoch.generation)
            self._epochs = dict.fromkeys(epoch.incarnations, len(orders))  # at most
            actions = self._membership.take_over(epoch, takeover.nodes, orders, takeover.entered, now)
            if self._membership.state == "SERVING":
                self.router.serve({s.rank: s.incarnation for s in found}, ())
                self.router.wake()  # some may wait inside a step for others, which have heard no bell
            self._do(actions)
        else:
            others += found
            self._streams, self._current = {}, {}
            self._drains.forget(*self._drains.kept)  # all engines are new ones
            for service in self._services.values():
                service.close()
            self._services.clear()
        for stream in others:
            stream.disconnect()
            self._register(stream)

    # Actions

    def _do(self, actions: Sequence[act.Action]) -> None:
        """Carry them out in their order, and what follows from them."""
        self._keep_numbers()
        self._actions.extend(actions)
        if self._acting:
            return
        self._acting = True
        try:
            while self._actions:
                self._carry_out(self._actions.popleft())
        finally:
            self._acting = False
        self._fences.release()
        self._plan_tick()

    def _keep_numbers(self) -> None:
        """On disk before anybody hears of them, so that a later coordinator uses none of them again."""
        if self._membership.numbers != self._numbers:
            self._numbers = self._membership.numbers
            self.router.keep(lambda: self._journal.numbers(*self._numbers))

    def _carry_out(self, action: act.Action) -> None:
        now = time.monotonic()
        match action:
            case act.Fence(rank, incarnation, generation, node):
                self._fence(rank, incarnation, generation, node, now)
            case act.Abort(ranks, incarnations, epoch):
                self.router.members = {}
                last = self._membership.epoch
                assert last is not None
                nodes = self._nodes[last.generation]
                survivors = [nodes.index(rank) for rank in ranks]
                frame = encode({"type": "abort", "epoch": epoch, "survivors": survivors})
                for incarnation in incarnations:
                    self._send(incarnation, frame)
                self._fences.aborted(incarnations, epoch)
            case act.Dismiss(rank, incarnation, reason):
                self._dismiss(rank, incarnation, reason)
            case act.Persist(epoch):
                self.router.keep(lambda: self._journal.epoch(epoch))
                self._do(self._membership.persisted(epoch.number, now))
            case act.Announce(epoch, shrink, leavers):
                self._announce(epoch, shrink, leavers, now)
            case act.Serve(epoch):
                self._served = True
                self._recoveries.serving(now)
                if self._moved is not None:
                    cause = self._membership.recoveries[-1].cause
                    if cause not in m.MOVES or not self._membership.moving:
                        if not self._moved.done():
                            self._moved.set_result(cause)
                        self._moved = None
                self.router.place()
                self._drain_on()
                if self.cluster.repairs is not None:
                    self.cluster.repairs.expect(epoch.slots, epoch.order)
                self.watcher.served(epoch)
            case act.StartService(generation, nodes):
                self._start_service(generation, nodes)
            case act.StopService(generation):
                self._nodes.pop(generation, None)
                self._fences.forget(generation)
                if service := self._services.pop(generation, None):
                    service.close()
            case act.StartEngine():
                self._start_engine(action)
            case act.Forget(generation):
                if generation in self._services:
                    self._services[generation].forget()
            case act.Prefetch(_, incarnation, slots):
                self._send(incarnation, encode({"type": "prefetch", "slots": slots.tolist()}))
            case act.StateChange(name, reason):
                log.info("%s%s", name, reason and f": {reason}")
                self.watcher.changed(name, reason)
                if reason.startswith("drain dropped"):
                    self._drains.drop(Unavailable(reason))

    def _start_service(self, generation: int, nodes: tuple[int, ...]) -> None:
        self._nodes[generation] = nodes
        try:
            cluster = self.cluster
            module, host = cluster.service, cluster.service_host
            outlives = not isinstance(self._journal, Oblivion)
            service = ServiceProcess.start(generation, len(nodes), module, host, cluster.environ, self, outlives)
        except OSError as e:
            log.error("JAX service: cannot be started: %s", e)
            return self._do(self._membership.service_lost(generation, time.monotonic()))
        self._services[generation] = service

    def _fence(self, rank: int, incarnation: int, generation: int, node: int, now: float) -> None:
        service, stream = self._services.get(generation), self._streams.get(incarnation)
        self._lost = [*self._lost, incarnation][-_FENCED:]
        self._put("lost", self._lost)
        self._recoveries.fence(now if stream is None else stream.ill_since or stream.heard, now)
        if service is not None:
            self._fences.add(service, node, rank, incarnation)

    def _dismiss(self, rank: int, incarnation: int, reason: str) -> None:
        self.router.lost(rank, incarnation)
        stream = self._streams.get(incarnation)
        if stream is not None:
            log.info("rank %d: dismissed: %s", rank, reason)
            stream.dismiss(reason)
            self.watcher.dismissed(rank, stream.pid)
        self._drains.gone(incarnation)

    def _start_engine(self, action: act.StartEngine) -> None:
        stream = self._current[action.rank]
        self.router.lost(action.rank, stream.incarnation)
        stream.incarnation = action.incarnation
        self._streams[action.incarnation] = stream
        nodes = self._nodes[action.generation]
        start = {
            "type": "start",
            "address": self._services[action.generation].address,
            "node": action.node,
            "num_nodes": len(nodes),
            "generation": action.generation,
            "rank": action.rank,
            "slots": action.slots.tolist(),
            "sizes": (sizes := self._sizes(action.generation, len(nodes))),
            "further": [size for size in range(len(nodes), 0, -1) if size not in sizes],
            **self.cluster.start,
        }
        stream.start_engine(action.generation, start)

    def _sizes(self, generation: int, most: int) -> list[int]:
        """Of the meshes that an engine which starts now may be in: first that of its first epoch, then the next losses
        and returns, then what is left."""
        epoch = self._membership.epoch
        serving = epoch is not None and epoch.generation == generation
        first = min(len(self.router.members) + 1, most) if serving else most
        hosts = self.cluster.rules.hosts
        sizes = {len(hosts) - size for lost in (1, 2) for size in sizes_after(hosts, lost)}  # ranks of lost hosts
        near = {first - size for size in sizes if size < first} | {*range(first, most + 1)}
        return sorted(near, key=lambda size: (abs(size - first), -size))

    def _announce(self, epoch: Epoch, shrink: bool, leavers: Sequence[int], now: float) -> None:
        node = {rank: i for i, rank in enumerate(self._nodes[epoch.generation])}
        members = dict(zip(epoch.order, epoch.incarnations, strict=True))
        # Requests go before the epoch: its first step takes up what had to leave its rank, where programs are at hand.
        prefill = self.router.serve(members, leavers)
        streams = [self._streams.get(incarnation) for incarnation in epoch.incarnations]
        ready = all(s is not None and len(epoch.order) in ready_sizes(s) for s in streams)
        body = {
            "type": "epoch",
            "number": epoch.number,
            "order": list(epoch.order),
            "nodes": list(epoch.nodes),
            "slots": epoch.slots.tolist(),
            "shrink": shrink,
            "prefill": prefill if ready else 0,
            "bell": self.router.next_bell(),
            "ahead": [(order, [node[r] for r in order]) for order in self._membership.ahead()],
        }
        frame = encode(body)
        told = [*members.values(), *(self._current[rank].incarnation for rank in leavers if rank in self._current)]
        for incarnation in told:
            self._send(incarnation, frame)
        self._recoveries.announced(self._membership.recoveries[-1], list(leavers), now)
        self._epochs = {incarnation: self._epochs.get(incarnation, 0) + 1 for incarnation in epoch.incarnations}

    # Time

    def _tick(self) -> None:
        now = time.monotonic()
        if now - self._ticked > _STOOD_STILL:
            for service in self._services.values():
                service.resume(now)
        self._ticked = now
        self._tick_at = now + _TICK
        self._timer = asyncio.get_running_loop().call_at(self._tick_at, self._tick)
        for service in list(self._services.values()):
            service.look(now)
        if self._takeover is not None:
            return self._look_at_takeover()
        self._do(self._membership.tick(now))
        if self._membership.state == "SERVING" and self.cluster.repairs is not None:
            self.cluster.repairs.work()

    def _plan_tick(self) -> None:
        """Sooner than planned, if something is due."""
        if self._timer is None or self._closed or self._takeover is not None:
            return
        if self._membership.due < self._tick_at - 0.001:
            self._timer.cancel()
            self._tick_at = max(self._membership.due, time.monotonic())
            self._timer = asyncio.get_running_loop().call_at(self._tick_at, self._tick)

    # Operators

    async def drain(self, host: str, away: bool = True) -> dict[str, Any]:
        """Move a host's requests away and let its ranks leave; {"ranks": those, "epoch": the first without them}.

        away: they are not started again here until `undrain`, and a coordinator that takes over goes on with it;
        otherwise they come back as new processes. Where none is present there is nothing to wait for.
        Raises LookupError for an unknown host, Unavailable when the others could not hold all experts, or not now.
        """
        self._check_host(host)
        ranks = [r for r, s in sorted(self._current.items()) if s.host == host and s.dismissed is None]
        actions: list[act.Action] = []
        if ranks and host not in self._drains:
            refused, actions = self._membership.drain(host, time.monotonic())
            if refused is not None:
                raise Unavailable(refused)
            self._drains.begin(host, {self._current[r].incarnation for r in ranks}, keep=away)
        if away:
            self.watcher.drained(host)
        self._do(actions)
        await self._drains.left(host)
        return {"ranks": ranks, "epoch": self._membership.status()["epoch"]}

    async def undrain(self, host: str) -> dict[str, Any]:
        """Have a drained host's workers started again; {"ranks": its, "epoch": one in which they serve}.

        Raises LookupError for an unknown host, Unavailable while it still leaves, or when they are not started here.
        """
        self._check_host(host)
        if host in self._drains:
            raise Unavailable(f"host {host}: found a drain that is not over, expected none: try again then")
        if self.watcher.wanted is None:
            raise Unavailable(f"host {host}: its workers are not started from here: start `moe-jax worker` on it again")
        self.watcher.wanted(host)
        ranks = {r for r, name in enumerate(self.cluster.rules.hosts) if name == host}
        while not ranks <= self.router.members.keys():
            await asyncio.sleep(0.05)
        return {"ranks": sorted(ranks), "epoch": self._membership.status()["epoch"]}

    def _check_host(self, host: str) -> None:
        if host not in self.cluster.rules.hosts:
            expected = ", ".join(sorted(set(self.cluster.rules.hosts)))
            raise LookupError(f"host: found {host!r}, expected one of {expected}")

    def _drain_on(self) -> None:
        """Take up what the last coordinator was at; all that it takes is known again."""

        async def drain(host: str) -> None:
            try:
                await self.drain(host)
            except Unavailable as e:
                log.warning("host %s: its drain is given up: %s", host, e)
            self._drains.forget(host)

        hosts, self._inherited_drains = self._inherited_drains, []
        for host in hosts:
            self._start_task(drain(host))

    def _start_task(self, coroutine: Coroutine[Any, Any, None]) -> None:
        self._background.add(task := asyncio.ensure_future(coroutine))
        task.add_done_callback(self._background.discard)

    @property
    def placement(self) -> Epoch:
        """The epoch that serves. Raises Unavailable where experts cannot be moved now."""
        if (refused := self._membership.busy) is not None:
            raise Unavailable(refused)
        assert self._membership.epoch is not None
        return self._membership.epoch

    async def move(self, number: int, goal: np.ndarray) -> None:
        """Have the ranks of epoch `number` hold `goal`; returns when they do. Raises Unavailable when that is not
        possible now, or a change of the ranks comes between."""
        refused, actions = self._membership.rebalance(number, goal, time.monotonic())
        if refused is not None:
            raise Unavailable(refused)
        if not self._membership.moving:
            return  # they hold it already
        self._moved = moved = asyncio.get_running_loop().create_future()
        self._do(actions)
        cause = await moved
        if cause not in m.MOVES:
            raise Unavailable(f"a change of the ranks came between ({cause}): try again")

    def worn_host(self, most: int) -> str | None:
        """A host with an engine that has been in more than `most` epochs, the most worn one, or that keeps orders of
        ranks from being used again; None also while a rank is missing or another host could not be spared."""
        status = self.status()
        whole = all(rank["state"] == "live" for rank in status["ranks"])
        if status["state"] != "SERVING" or not whole or status["experts"]["survivable_host_losses"] < 1:
            return None
        epochs, rank = max((self._epochs[incarnation], rank) for rank, incarnation in self.router.members.items())
        worn = rank if epochs > most else self._membership.worn()
        return None if worn is None else self.cluster.rules.hosts[worn]

    def status(self, slots: bool = False, load: bool = False) -> dict[str, Any]:
        """What `moe-jax status --json` prints. slots: with what each slot holds, [layers][ranks][slots] of experts.
        load: with what was measured of the experts, [layers][experts]."""
        status = describe(self.cluster, self._membership, self.router.ledger, self._recoveries, self._current, slots)
        if (epoch := self._membership.epoch) is not None:
            status["experts"]["imbalance"] = self.rebalancing.imbalance(epoch)
        return {
            **status,
            "compilations": self._compiled,
            "rebalances": self.rebalancing.changes,
            "coordinator": {"pid": os.getpid(), "took_over": self._taken_over},
            "service_pid": next((s.pid for s in reversed(self._services.values())), None),
            **({"load": self.rebalancing.loads.tokens.tolist()} if load else {}),
        }

    def observe(self, slots: bool = False) -> dict[str, Any]:
        """`status`, once the metrics know of all recoveries that are over."""
        self.metrics.recoveries(self._recoveries.closed())
        return self.status(slots)

    async def ask(self, question: dict[str, Any], timeout: float = 10.0) -> dict[int, dict[str, Any]]:
        """Every member's answer of the question's type, by rank. Raises TimeoutError."""
        kind, streams = question["type"], {r: self._streams[i] for r, i in self.router.members.items()}
        for stream in streams.values():
            stream.answers.pop(kind, None)
            stream.send(question)
        async with asyncio.timeout(timeout):
            while not all(kind in stream.answers for stream in streams.values()):
                await asyncio.sleep(0.005)
        return {rank: stream.answers[kind] for rank, stream in streams.items()}


def _first_line(text: str) -> str:
    return text.strip().partition("\n")[0][:300]
